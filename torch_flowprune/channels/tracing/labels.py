"""Labels for the positions of tensor dimensions, and what follows from joining them.

Every dimension of every tensor in a traced graph carries a vector of integer *labels*, one per position. Two positions
with the same label, or with labels that were joined, live or die together. A label that was frozen can never be
removed, and neither can anything joined to it. Label 0 (``FIXED``) stands for all positions that nobody may remove:
batch, space, tokens of the input.

Labels rather than one name per dimension, because concatenation, splitting, grouped convolution and flattening couple
single positions, not whole dimensions. A product of axes (``heads * head_dim``) is a vector with repeated labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

FIXED = 0
_JOINED_AT_ONCE = 1 << 18
"""Joins looked at together: what that takes besides stays small beside the labels."""


@dataclass(frozen=True, eq=False)
class Value:
    """What is known about one tensor of the graph.

    Attributes:
        dims: the labels of each dimension.
        zero: for each dimension, True where it is proved that the masked model has exact zeros at the positions of a
            removed unit of it; the smaller model has nothing there, so sums over that dimension agree.
        constant: True where the tensor is computed from parameters and buffers alone.
    """

    dims: tuple[Tensor, ...]
    zero: tuple[bool, ...]
    constant: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.numel() for d in self.dims)  # several times faster than len

    @property
    def ndim(self) -> int:
        return len(self.dims)

    def with_zero(self, zero: bool | Sequence[bool]) -> Value:
        flags = (zero,) * self.ndim if isinstance(zero, bool) else tuple(zero)
        return replace(self, zero=flags)

    def without_zero(self) -> Value:
        return self.with_zero(False)


@dataclass(frozen=True)
class Block:
    """A contiguous range of labels made for one dimension of one named tensor."""

    start: int
    size: int
    name: str
    axis: int
    kind: str  # "parameter" or "buffer"


@dataclass(frozen=True)
class Solution:
    """Labels resolved.

    Attributes:
        root: of each label, the class that it is in.
        reasons: the frozen classes and why.
        soft: those of them that are frozen only by a choice that could be made otherwise.
    """

    root: Tensor
    reasons: dict[int, str]
    soft: frozenset[int]

    def frozen(self, labels: Tensor) -> Tensor:
        """(positions,) bool: True where the position cannot be removed."""
        return self._frozen_roots[self.root[labels]]

    def reason(self, label: int) -> str | None:
        return self.reasons.get(int(self.root[label]))

    @cached_property
    def _frozen_roots(self) -> Tensor:
        table = torch.zeros(len(self.root), dtype=torch.bool)
        table[list(self.reasons)] = True
        return table


class Axes:
    """Makes labels, joins them, freezes them; ``solve`` tells what follows. Joins are recorded, none resolved early."""

    def __init__(self) -> None:
        self.count = 1
        self.blocks: list[Block] = []
        self._edges: list[tuple[Tensor, Tensor]] = []
        self._frozen: list[tuple[Tensor, str]] = [(torch.tensor([FIXED]), "fixed")]
        self._soft: list[tuple[Tensor, str]] = []
        self._immovable = torch.tensor([True])
        self._whole: dict[
            int, tuple[Block, Tensor]
        ] = {}  # by the labels' id; they are held, so that no other tensor gets it
        self._starts = torch.empty(0, dtype=torch.long)

    def fresh(self, size: int) -> Tensor:
        """Labels of a new axis. A dimension of one position has nothing to remove and is fixed from the start."""
        if size <= 1:
            return self.fixed(size)
        labels = torch.arange(self.count, self.count + size)
        self.count += size
        return labels

    def fixed(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.long)

    def softly_fixed(self, size: int, reason: str) -> Tensor:
        """Labels frozen by a choice (which factor of a product is removable), to be told apart from hard facts."""
        labels = self.fresh(size)
        if size > 1:
            self._soft.append((labels, reason))
            grown = torch.zeros(self.count, dtype=torch.bool)
            grown[: len(self._immovable)] = self._immovable
            grown[labels] = True
            self._immovable = grown
        return labels

    def named(self, name: str, shape: Sequence[int], kind: str) -> Value:
        """The value of a parameter or buffer: a new axis per dimension. Parameters are masked, hence zero."""
        dims = []
        for axis, size in enumerate(shape):
            start = self.count
            dims.append(self.fresh(size))
            if size > 1:
                self.blocks.append(Block(start, size, name, axis, kind))
                self._whole[id(dims[-1])] = self.blocks[-1], dims[-1]
        return Value(tuple(dims), (kind == "parameter",) * len(dims), constant=True)

    def join(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Position i of ``a`` and position i of ``b`` live or die together; the reason is kept where one is fixed."""
        if a is b or torch.equal(a, b):
            return
        loose = (a != FIXED) & (b != FIXED)
        self._edges.append((a[loose], b[loose]))
        if not loose.all():
            rest = torch.maximum(a, b)[~loose]
            self.freeze(rest[~self._at(rest)], reason)

    def freeze(self, labels: Tensor, reason: str) -> None:
        labels = labels[labels != FIXED]
        if len(labels):
            self._frozen.append((labels, reason))

    def is_fixed(self, labels: Tensor) -> bool:
        """True where no position of the dimension can be removed, as far as is known without solving."""
        return bool(self._at(labels).all())

    def is_named(self, labels: Tensor) -> bool:
        """True where some of the labels were made for a parameter or buffer."""
        return any(True for _ in self.blocks_of(labels))

    def blocks_of(self, labels: Tensor) -> Iterator[Block]:
        """The named dimensions the labels were made for."""
        if (whole := self._whole.get(id(labels))) is not None:
            yield whole[0]
            return
        if len(self._starts) != len(self.blocks):
            self._starts = torch.tensor([b.start for b in self.blocks], dtype=torch.long)
        distinct = torch.unique(labels[labels != FIXED])
        where = torch.searchsorted(self._starts, distinct, right=True) - 1
        for i in torch.unique(where).tolist():
            block = self.blocks[i] if i >= 0 else None
            if block is not None and bool(((distinct >= block.start) & (distinct < block.start + block.size)).any()):
                yield block

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every label of a named dimension, in order: the number of its block, its position there, and the label."""
        sizes = torch.tensor([b.size for b in self.blocks], dtype=torch.long)
        block = torch.arange(len(self.blocks)).repeat_interleave(sizes)
        position = torch.arange(len(block)) - (sizes.cumsum(0) - sizes)[block]
        return block, position, torch.tensor([b.start for b in self.blocks], dtype=torch.long)[block] + position

    def _at(self, labels: Tensor) -> Tensor:
        known = labels < len(self._immovable)
        return known & self._immovable[labels.clamp(max=len(self._immovable) - 1)]

    def solve(self) -> Solution:
        a = torch.cat([e[0] for e in self._edges]) if self._edges else torch.empty(0, dtype=torch.long)
        b = torch.cat([e[1] for e in self._edges]) if self._edges else torch.empty(0, dtype=torch.long)
        self._edges = [(a, b)]  # many small tensors are let go
        root = _components(self.count, a, b)
        reasons: dict[int, str] = {}
        for labels, reason in self._frozen:
            for r in torch.unique(root[labels]).tolist():
                reasons.setdefault(r, reason)
        hard = set(reasons)
        for labels, reason in self._soft:
            for r in torch.unique(root[labels]).tolist():
                reasons.setdefault(r, reason)
        return Solution(root, reasons, frozenset(set(reasons) - hard))


def _components(count: int, a: Tensor, b: Tensor) -> Tensor:
    """Connected components of ``count`` nodes under the edges a[i] - b[i]: the smallest node of each's component."""
    root = torch.arange(count)
    joined = True
    while joined:
        joined = False
        for some_a, some_b in zip(a.split(_JOINED_AT_ONCE), b.split(_JOINED_AT_ONCE), strict=True):
            ra, rb = root[some_a], root[some_b]
            low, high = torch.minimum(ra, rb), torch.maximum(ra, rb)
            apart = low != high
            if apart.any():
                # hook each larger root onto the smallest root it meets, then shorten all paths to their end
                root.scatter_reduce_(0, high[apart], low[apart], reduce="amin")
                while not torch.equal(root, root[root]):
                    root = root[root]
                joined = True
    return root
