"""Batches on their way through a sweep: how many there are, up to which, and how far it has come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from tqdm.auto import tqdm

from torch_flowprune.inputs import Batch

SizedBatch: TypeAlias = tuple[Batch, int]


def with_progress(
    batches: Iterable[SizedBatch], total: int | None, name: str, progress: bool | None
) -> Iterable[SizedBatch]:
    """A bar: always, never, or (None) on a terminal and where it takes longer than two seconds."""
    bar: Iterable[SizedBatch] = tqdm(
        batches,
        desc=name,
        total=total,
        unit="batch",
        leave=False,
        delay=0 if progress else 2,
        disable=None if progress is None else not progress,
    )
    return bar


def until(batches: Iterator[SizedBatch], samples_left: int) -> Iterator[SizedBatch]:
    """Batches up to so many samples."""
    while samples_left > 0 and (sized_batch := next(batches, None)):
        yield sized_batch
        samples_left -= sized_batch[1]


def length_of(data: object) -> int | None:
    """How many batches, where the data tell."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None
