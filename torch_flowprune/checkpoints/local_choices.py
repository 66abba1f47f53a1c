"""Which of a tensor's keys stay, a part at a time: below a cut, by output row, by n:m block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from torch_flowprune.checkpoints.exact_cuts import KeyCut
from torch_flowprune.checkpoints.key_counts import PART
from torch_flowprune.scoring import Blocks

ReadKeys: TypeAlias = Callable[[int, int], Tensor]
"""From the first element and the one after the last to their keys, flat."""
KeptPart: TypeAlias = tuple[int, int, Tensor]
"""The same two, and which of these elements stay."""


@dataclass(frozen=True)
class BelowCut:
    """All below a key go, and the first of those equal to it."""

    cut: KeyCut

    def parts(self, shape: tuple[int, ...], read: ReadKeys) -> Iterator[KeptPart]:
        size, rest = prod(shape), self.cut.taken
        for start in range(0, size if self.cut.gone else 0, PART):
            stop = min(size, start + PART)
            keys = read(start, stop)
            keep = keys > self.cut.key if self.cut.taken == self.cut.equal else keys >= self.cut.key
            if 0 < self.cut.taken < self.cut.equal and rest:
                first = (keys == self.cut.key).nonzero()[:rest, 0]
                keep[first] = False
                rest -= len(first)
            yield start, stop, keep


@dataclass(frozen=True)
class LowestOfRows:
    """Of every output the ``gone`` lowest go."""

    gone: int

    def parts(self, shape: tuple[int, ...], read: ReadKeys) -> Iterator[KeptPart]:
        row = prod(shape[1:])
        for start, stop in _whole_rows(shape):
            yield start, stop, _all_but_lowest(read(start, stop).view(-1, row), self.gone).view(-1)


@dataclass(frozen=True)
class LowestOfBlocks:
    """Of every ``m`` that follow each other along the input axis ``n`` stay."""

    blocks: Blocks

    def parts(self, shape: tuple[int, ...], read: ReadKeys) -> Iterator[KeptPart]:
        n, m = self.blocks.n, self.blocks.m
        for start, stop in _whole_rows(shape):
            keys = read(start, stop).view(-1, *shape[1:])
            keep = _all_but_lowest(self.blocks.rows(keys).view(-1, m), m - n)
            yield start, stop, self.blocks.mask(keep.view(-1), keys.shape).reshape(-1)


TensorChoice: TypeAlias = BelowCut | LowestOfRows | LowestOfBlocks


def _whole_rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    row, size = prod(shape[1:]), prod(shape)
    step = max(1, PART // max(1, row)) * row
    return ((start, min(size, start + step)) for start in range(0, size, step or 1))


def _all_but_lowest(keys: Tensor, gone: int) -> Tensor:
    """Which of every row's keys stay when the ``gone`` lowest go, of equal ones the first: ``(row, key)`` bool.

    >>> _all_but_lowest(torch.tensor([[3, 1, 2, 1], [0, 0, 0, 0]]), 2).int()
    tensor([[1, 0, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    if gone == 0:
        return torch.ones_like(keys, dtype=torch.bool)
    return _by_places(keys, gone) if keys.shape[1] <= 8 else _by_kth(keys, gone)


def _by_places(keys: Tensor, gone: int) -> Tensor:
    """By each one's place in its short row, counted pair by pair: no row is sorted."""
    columns = [column.contiguous() for column in keys.unbind(1)]
    places = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]
    for j in range(len(columns)):
        for i in range(j):
            after = columns[i] <= columns[j]
            places[j] += after
            places[i] += ~after
    return torch.stack([place >= gone for place in places], dim=1)


def _by_kth(keys: Tensor, gone: int) -> Tensor:
    kth = keys.kthvalue(gone, dim=1, keepdim=True).values
    lower, equal = keys < kth, keys == kth
    rest = gone - lower.sum(1, keepdim=True)
    return ~(lower | (equal & (equal.cumsum(1) <= rest)))
