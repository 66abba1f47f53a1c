"""A model of somebody's library, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """How a model is built, and its inputs for so many samples of such a size (resolution, length)."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]
    sizes: tuple[int, int]


def add(
    name: str, make: Callable[[], nn.Module], inputs: Callable[[int, int], Any], size: int, other: int | None = None
) -> None:
    """Known as `library/model`; without another size it takes one alone."""
    CASES[name] = Case(make, inputs, (size, other or size))


def image(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size)


def gray(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 1, size, size)


def volume(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 1, size, size, size)


def clip(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, 4, size, size)


def wave(batch: int, size: int) -> Tensor:
    return torch.randn(batch, size)


def words(batch: int, size: int) -> Tensor:
    return torch.randint(3, 90, (batch, size))


def rows(width: int) -> Callable[[int, int], Tensor]:
    return lambda batch, size: torch.randn(batch, size, width)


def tokens(batch: int, size: int) -> dict[str, Tensor]:
    return {"input_ids": words(batch, size), "attention_mask": torch.ones(batch, size, dtype=torch.long)}


def pixels(batch: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": image(batch, size)}


def sound(batch: int, size: int) -> dict[str, Tensor]:
    return {"input_values": wave(batch, size)}
