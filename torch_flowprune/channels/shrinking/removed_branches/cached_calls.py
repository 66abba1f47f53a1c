"""A language model called as a text goes on: first on its beginning, then on the rest with the cache of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.inputs import takes, tree_leaves

_CACHES = ("cache", "past_key_values")
"""What it is called by, in order of preference."""


def cached_outputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
    """What it gives for the rest of the example. None where it has no cache, or takes none that it gave.

    Of the cache itself nothing is told: a smaller model may keep less.
    """
    words = [word for word in _CACHES if takes(model, word)]
    if kwargs.get("use_cache") is not False or not words:
        return None
    tokens = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.ndim > 1), None)
    if tokens is None or tokens.shape[1] < 2:
        return None
    length, half = tokens.shape[1], tokens.shape[1] // 2

    def part(value: Any, start: int, stop: int) -> Any:
        along = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == length
        return value[:, start:stop] if along else value

    def called(start: int, stop: int, **more: Any) -> Any:
        named = {name: part(value, start, stop) for name, value in kwargs.items() if "mask" not in name}
        return model(*(part(one, start, stop) for one in args), **{**named, "use_cache": True, **more})

    with torch.no_grad():
        first = called(0, half)
        cache = next((value for word in _CACHES if (value := first.get(word)) is not None), None)
        if cache is None:
            return None
        given = called(half, length, **{words[0]: cache})
    outputs = {name: value for name, value in given.items() if name not in _CACHES}
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
