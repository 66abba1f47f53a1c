"""The k-th lowest of whole numbers that lie on many ranks: found digit by digit, counts are added up, numbers stay.

Scores are searched by keys that have their order, places in the model as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from torch_flowprune.inputs import Ranks

KEY_BITS = {torch.float32: 32, torch.float64: 64}
_COUNTS_AT_ONCE = 1 << 13
"""Counts that are sent at once, at most: 64 KiB."""
_WIDEST_DIGIT = 11

Chunks: TypeAlias = Callable[[], Iterable[Tensor]]
"""Gives the numbers of a pool part by part, as often as it is called."""


@dataclass(frozen=True)
class Found:
    """The k-th lowest of a pool, how many are below it, and how many equal it, itself among them."""

    value: int
    below: int
    equal: int


def kth_of_each(pools: Sequence[Chunks], ks: Sequence[int], bits: int, ranks: Ranks) -> list[Found]:
    """Of each pool of numbers of so many bits, on all ranks together, the k-th lowest, counted from 1.

    One sum of counts over the ranks a digit, for all pools together. Numbers of 64 bits are patterns, without a sign.
    """
    if not pools:
        return []
    width = min(_WIDEST_DIGIT, max(1, (_COUNTS_AT_ONCE // len(pools)).bit_length() - 1))
    found, rest, equal = [0] * len(pools), list(ks), [0] * len(pools)
    for shift in reversed(range(0, max(bits, 1), width)):
        high = min(width, bits - shift)
        counts = ranks.summed(
            torch.stack(
                [_digit_counts(chunks, shift, high, bits, first) for chunks, first in zip(pools, found, strict=True)]
            )
        )
        for i, upto in enumerate(counts.cumsum(1)):
            digit = int(torch.searchsorted(upto, rest[i]))
            rest[i] -= int(upto[digit - 1]) if digit else 0
            equal[i], found[i] = int(counts[i, digit]), (found[i] << high) + digit
    return [Found(*one) for one in zip(found, (k - r for k, r in zip(ks, rest, strict=True)), equal, strict=True)]


def _digit_counts(chunks: Chunks, shift: int, width: int, bits: int, first: int) -> Tensor:
    """How often each digit stands at a place, in the numbers that begin with these digits."""
    counts = torch.zeros(1 << width, dtype=torch.int64)
    above = bits - shift - width
    for numbers in chunks():
        if above:
            begins = (numbers >> (shift + width)) & ((1 << above) - 1)
            numbers = numbers[begins == first]  # noqa: PLW2901 - the rest is done with
        digits = (numbers >> shift) & ((1 << width) - 1)
        counts += digits.bincount(minlength=1 << width).cpu()
    return counts


def keys_of(values: Tensor) -> Tensor:
    """Patterns in the order of floating-point numbers, as int64; 0.0 and -0.0 are one."""
    width = KEY_BITS[values.dtype]
    bits = (values + 0.0).view(torch.int64 if width == 64 else torch.int32)
    ordered = bits ^ ((bits >> (width - 1)) | torch.iinfo(bits.dtype).min)
    return ordered if width == 64 else ordered.long() & 0xFFFFFFFF


def key_of(value: float, dtype: torch.dtype) -> int:
    """The key of one number, without a sign."""
    return int(keys_of(torch.tensor(value, dtype=dtype))) % (1 << KEY_BITS[dtype])


def value_of(key: int, dtype: torch.dtype) -> float:
    """The number that a key is of."""
    sign = 1 << (KEY_BITS[dtype] - 1)
    bits = key - sign if key >= sign else 2 * sign - 1 - key
    code, number = ("<Q", "<d") if dtype is torch.float64 else ("<I", "<f")
    found: float = struct.unpack(number, struct.pack(code, bits))[0]
    return found
