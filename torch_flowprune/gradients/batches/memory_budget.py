"""How much memory a sweep takes, measured on one and two samples, and how many samples then fit into a budget."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_flowprune.inputs import tree_leaves
from torch_flowprune.torch_internals import OperatorMode, storage_key

Bytes: TypeAlias = "int | str"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def in_bytes(size: Bytes | None) -> int | None:
    """A budget as a number of bytes: a positive whole number, or text such as ``"2GB"`` or ``"512 MiB"``.

    >>> in_bytes("2GB"), in_bytes("1.5 MiB"), in_bytes(4096)
    (2000000000, 1572864, 4096)
    """
    if size is None:
        return None
    text = str(size).lower() if isinstance(size, (int, str)) and not isinstance(size, bool) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text)
    count = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if not count:
        raise ValueError(
            f"max_memory should be a number of bytes above 0 or text such as '2GB' or '512MiB', got {size!r}"
        )
    return count


def readable(size: float) -> str:
    """Bytes as people write them.

    >>> readable(1536), readable(2.5e9)
    ('1.54 kB', '2.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


class Peak(OperatorMode):
    """Inside, the bytes of tensors made: those ``live`` now, and the ``peak``.

    Tensors there before and kernels' own scratch do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._was_there(storage)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage_key(storage) not in self._known:
                self._made(storage)
        return result

    def _was_there(self, storage: torch.UntypedStorage) -> None:
        """Until it is freed: what is made at its address then is new."""
        key = storage_key(storage)
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._known.discard, key)

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [
        value.untyped_storage()
        for value in tree_leaves(values)
        if isinstance(value, Tensor) and value.layout is torch.strided
    ]


@dataclass(frozen=True)
class Cost:
    """Bytes of one batch as a line: ``first`` for its first sample, ``more`` for each after it."""

    first: float
    more: float

    def of(self, samples: int) -> float:
        return self.first + (samples - 1) * self.more

    def samples(self, room: float) -> int:
        """How many samples fit; 0 where not even one does."""
        return int(1 + (room - self.first) // self.more if self.more > 0 else 2**62) if room >= self.first else 0


@dataclass(frozen=True)
class Resources:
    """What a sweep may use: bytes besides the model, or None for no limit; the host's memory for sums.

    A dtype to run the model in.
    """

    max_memory: int | None = None
    offload: bool = False
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(
                "autocast should be torch.bfloat16 or None (gradients underflow in float16 without loss scaling), "
                f"got {self.autocast!r}"
            )


def bounded(work: Callable[[int], object], _: int) -> tuple[Cost, Cost]:
    """What ``work(n)`` takes and goes on holding at most: n times what one sample does, in a single run."""
    peak, kept = _of_run(work, 1)
    return Cost(peak, peak), Cost(kept, kept)


def measured(work: Callable[[int], object], samples: int) -> tuple[Cost, Cost]:
    """``work(n)`` on one sample and on two, if there are two.

    What it takes at most, and what its result goes on holding. It has run before: what a first call loads and caches is
    not the samples'.
    """
    (peak, kept), (peaks, both) = _of_run(work, 1), _of_run(work, min(2, samples))
    return Cost(peak, peaks - peak), Cost(kept, both - kept)


def _of_run(work: Callable[[int], object], count: int) -> tuple[int, int]:
    with Peak() as memory:
        result = work(count)
        kept = memory.live
        del result
    return memory.peak, kept
