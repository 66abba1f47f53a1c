"""The order of a model's parameters, which decides between equal scores, where the files do not tell it.

Shards are written with their tensors sorted by name, and ``save_pretrained`` sorts the index too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from torch_flowprune.checkpoints.shards import CheckpointFolder


def in_model_order(folder: CheckpointFolder, order: nn.Module | Iterable[str] | None) -> list[str]:
    """The names of the tensors: as ``order`` says, else as the index does; a sorted index is an order of the alphabet.

    Where the index is sorted, the model that ``config.json`` names is asked, if transformers is there to make it.
    """
    names = list(folder.tensors)
    if order is not None:
        ordered = [name for name, _ in order.named_parameters()] if isinstance(order, nn.Module) else list(order)
        return _first(ordered, names)
    if names == sorted(names) and (own := _of_config(folder.path)):
        return _first(own, names)
    return _in_number_order(names)


def _first(order: Iterable[str], names: list[str]) -> list[str]:
    held = set(names)
    return list(dict.fromkeys([*(name for name in order if name in held), *names]))


def _in_number_order(names: Iterable[str]) -> list[str]:
    """Numbers among their like as numbers: ``layers.2`` before ``layers.10``; all else in the order it has.

    >>> _in_number_order(["b.10.w", "b.2.w", "a.w"])
    ['b.2.w', 'b.10.w', 'a.w']
    """
    tree: dict[str, dict] = {}  # type: ignore[type-arg]  # of itself
    for name in names:
        node = tree
        for part in name.split("."):
            node = node.setdefault(part, {})
    return list(_leaves(tree, ""))


def _leaves(tree: Mapping[str, dict], path: str) -> Iterable[str]:  # type: ignore[type-arg]
    parts = sorted(tree, key=int) if tree and all(part.isdecimal() for part in tree) else list(tree)
    for part in parts:
        yield from _leaves(tree[part], f"{path}{part}.") if tree[part] else [f"{path}{part}"]


def _of_config(folder: Path) -> list[str]:
    """The parameters of the model that transformers makes of a configuration, without values; none where it cannot."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = getattr(transformers, named)(config)
    except Exception:  # noqa: BLE001  # whatever a configuration or another library lacks: the index's order is left
        return []
    return [name for name, _ in model.named_parameters()]
