"""Scores as whole numbers in the same order, and their digits: what can be counted in bins without an error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDEST = 16


@dataclass(frozen=True)
class Digit:
    """Some bits of a key: those from ``shift`` on, ``bits`` of them; ``offset`` makes the leading one's smallest 0."""

    shift: int
    bits: int
    offset: int = 0

    @property
    def bins(self) -> int:
        """How many values it has."""
        return 1 << self.bits

    def of(self, keys: Tensor) -> Tensor:
        """Every key's digit."""
        moved = keys >> self.shift if self.shift else keys
        if self.offset:
            return moved.int() + self.offset  # an int16 has no room for it
        return moved & (self.bins - 1) if self.shift + self.bits < 8 * keys.dtype.itemsize - 1 else moved

    def starting(self, keys: Tensor, prefix: int) -> Tensor:
        """Those keys whose bits before this digit are ``prefix``."""
        return keys[(keys >> (self.shift + self.bits)) == prefix]


@dataclass(frozen=True)
class OrderedKeys:
    """Values of one dtype as whole numbers in the same order.

    Attributes:
        dtype: what values are compared in.
        magnitudes: whether |value| is ranked, whose key is the value's own bits but the sign; else the value itself.
    """

    dtype: torch.dtype
    magnitudes: bool

    def __call__(self, values: Tensor) -> Tensor:
        """The keys; −0 is 0."""
        values = values.to(self.dtype)
        bits = whole_numbers(values if self.magnitudes else values + 0.0)
        largest = torch.iinfo(bits.dtype).max
        return bits & largest if self.magnitudes else _signed(bits, largest)

    @property
    def digits(self) -> list[Digit]:
        """Of a half-precision key one, which is all of it."""
        width = 8 * self.dtype.itemsize - self.magnitudes
        shifts = range(width - min(width, _WIDEST), -1, -_WIDEST) or [0]
        steps = [Digit(shift, min(width, _WIDEST)) for shift in shifts]
        if steps[-1].shift:
            steps.append(Digit(0, steps[-1].shift))
        first = steps[0]
        return [first if self.magnitudes else Digit(first.shift, first.bits, first.bins // 2), *steps[1:]]

    @property
    def infinity(self) -> int:
        """The key of the largest value; above it are those of nan."""
        return int(self(torch.tensor([torch.inf], dtype=self.dtype))[0])

    def tell_an_order(self, keys: Tensor) -> bool:
        """Whether none is nan, and no magnitude infinite."""
        low, high = torch.aminmax(keys) if keys.numel() else (torch.zeros(()), torch.zeros(()))
        return bool(high <= self.infinity - self.magnitudes) and bool(low >= ~self.infinity)

    def value(self, key: int) -> float:
        """The value, or magnitude, that has this key."""
        bits = torch.tensor([key], dtype=_WHOLE[self.dtype.itemsize])
        return float((bits if self.magnitudes else _signed(bits, torch.iinfo(bits.dtype).max)).view(self.dtype))


def whole_numbers(values: Tensor) -> Tensor:
    """The same memory as whole numbers."""
    return values.view(_WHOLE[values.element_size()])


def _signed(bits: Tensor, largest: int) -> Tensor:
    """Sign and magnitude as a whole number in the same order, and back."""
    return bits ^ ((bits >> (8 * bits.element_size() - 1)) & largest)
