"""What the commands hand on to the library: the words that measures and units are chosen by, checked first."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.cli.sources import ImageOptions, example_input, existing, image_loader
from torch_flowprune.scoring import SHRINKABLE, measure_lookup, parse_granularity

_OF_A_LOSS = {"g", "g2", "g2_sample", "Hg", "x2", "diagH"}


def _needs_of(methods: list[str]) -> set[str]:
    """What these measures read."""
    return {kind for method in methods for kind in measure_lookup.needs(method)}


def check_measures(chosen: argparse.Namespace, methods: list[str]) -> None:
    """What can be told before a model is built; ``methods`` are those that will be asked."""
    needs = _needs_of(methods)
    if chosen.granularity not in (None, *SHRINKABLE):
        parse_granularity(chosen.granularity)
    for option in ("data", "held_out"):
        _check_image_folder(f"--{option.replace('_', '-')}", getattr(chosen, option, None))
    if chosen.data is None and (reads := sorted(needs & _OF_A_LOSS)):
        free = [name for name in fp.MEASURES if not _needs_of([name]) & (_OF_A_LOSS | {"theta0"})]
        raise ValueError(
            f"{', '.join(methods)} reads {', '.join(reads)} of a loss, and no data was given: "
            f"pass --data DIR (one folder of images per class), or a measure that needs none: {', '.join(free)}"
        )
    if "theta0" in needs and chosen.theta0 is None:
        raise ValueError(
            f"{', '.join(methods)} reads theta0, the weights at initialisation: pass --theta0 FILE, a checkpoint from "
            "there"
        )


def _check_image_folder(option: str, folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"{option} {folder}: there is no such folder; expected one with a folder of images for each class"
        )


def units_of(chosen: argparse.Namespace) -> dict[str, Any]:
    """Which units."""
    return {word: getattr(chosen, word) for word in ("include", "exclude")} | {
        "granularity": chosen.granularity or "weight"
    }


def source_of(
    chosen: argparse.Namespace, model: nn.Module, methods: list[str], *, always: bool = False
) -> dict[str, Any]:
    """What these measures read, as far as they read it; and the shape of an input, for synflow and for channels."""
    words: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(chosen.seed),
        "example_inputs": example_input(model),
    }
    needs = _needs_of(methods)
    if always or needs & _OF_A_LOSS:
        words |= {"data": images(chosen, model, "data"), "mode": chosen.mode, "temperature": chosen.temperature}
    if "theta0" in needs:
        from timm.models import load_state_dict

        words["theta0"] = load_state_dict(str(existing("--theta0", chosen.theta0)))
    return words


def images(chosen: argparse.Namespace, model: nn.Module, option: str) -> Any:
    """The loader of an option that names a folder."""
    reading = ImageOptions(chosen.samples, chosen.batch_size, chosen.workers, chosen.seed)
    return image_loader(f"--{option.replace('_', '-')}", getattr(chosen, option), model, reading)
