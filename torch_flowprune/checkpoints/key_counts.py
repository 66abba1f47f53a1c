"""How often each digit of the keys occurs, tensor by tensor: one pass over the shards a digit, kept in files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from torch_flowprune.checkpoints.ordered_keys import Digit, OrderedKeys
from torch_flowprune.checkpoints.shards import StoredTensor
from torch_flowprune.checkpoints.unfinished import Unfinished

PART = 1 << 18
"""Elements in memory at once, of each shard that is read: they stay in a core's cache."""
_T = TypeVar("_T")


def each_shard(work: Callable[[_T], Any], shards: Iterable[_T], threads: int) -> Iterator[Any]:
    """The work on every shard, some side by side, in order."""
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, shards)


@dataclass(frozen=True)
class KeyCounts:
    """The keys of many tensors, counted by digit.

    Attributes:
        shards: the tensors whose keys are ranked, by the file that holds them.
        keys: what turns their values into keys.
        kept: where counts are kept.
        threads: how many shards are read side by side.
    """

    shards: Mapping[Path, Sequence[StoredTensor]]
    keys: OrderedKeys
    kept: Unfinished
    threads: int

    def of(self, digit: Digit, prefixes: Mapping[str, int] | None) -> Iterator[tuple[str, Tensor]]:
        """One count a value of the digit, for every tensor that ``prefixes`` names, among keys that begin so."""
        count = partial(self._counted, digit, prefixes)
        for path in each_shard(count, self.shards.items(), self.threads):
            for name, (bins, counts) in torch.load(path, weights_only=True).items():
                yield name, torch.zeros(digit.bins, dtype=torch.int64).index_copy_(0, bins.long(), counts)

    def _counted(
        self, digit: Digit, prefixes: Mapping[str, int] | None, shard: tuple[Path, Sequence[StoredTensor]]
    ) -> Path:
        """The file with a shard's counts; of each tensor those bins that are not empty."""
        path, tensors = shard
        wanted = {
            one: prefixes[one.name] if prefixes else None for one in tensors if not prefixes or one.name in prefixes
        }
        told = repr((path.name, digit, list(wanted.values()))).encode()

        def write(half: Path) -> None:
            with path.open("rb") as file:
                counts = {one.name: _sparse(self._bins(file, one, digit, prefix)) for one, prefix in wanted.items()}
            torch.save(counts, half)

        return self.kept.counts(hashlib.sha256(told).hexdigest()[:32], write)

    def _bins(self, file: BinaryIO, one: StoredTensor, digit: Digit, prefix: int | None) -> Tensor:
        counts = torch.zeros(digit.bins, dtype=torch.int64)
        for start in range(0, one.numel, PART):
            values = one.values(one.read(file, start, min(one.numel, start + PART)))
            keys = self.keys(values)
            if prefix is not None:
                keys = digit.starting(keys, prefix)
            elif not self.keys.magnitudes and values.isnan().any():
                raise not_ordered(one, self.keys)
            counts += digit.of(keys).bincount(minlength=digit.bins)
        if prefix is None and self.keys.magnitudes and counts[self.keys.infinity >> digit.shift :].any():
            raise not_ordered(one, self.keys)
        return counts


def not_ordered(one: StoredTensor, keys: OrderedKeys) -> ValueError:
    """What is said of weights that are not finite (infinite scores are an order), and of scores that are nan."""
    what, wrong = ("weights", "infinite or nan") if keys.magnitudes else ("scores", "nan")
    return ValueError(f"some {what} of {one.name!r} are {wrong}: they cannot be ranked; leave it out with exclude=")


def _sparse(counts: Tensor) -> tuple[Tensor, Tensor]:
    bins = counts.nonzero()[:, 0]
    return bins.int(), counts[bins]
