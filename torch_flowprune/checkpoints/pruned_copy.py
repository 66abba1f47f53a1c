"""A shard copied with zeros in it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from torch_flowprune.checkpoints.key_counts import not_ordered
from torch_flowprune.checkpoints.local_choices import BelowCut, TensorChoice
from torch_flowprune.checkpoints.ordered_keys import OrderedKeys, whole_numbers
from torch_flowprune.checkpoints.shards import StoredTensor

_CHUNK = 1 << 22


def write_pruned(
    source: Path,
    out: Path,
    choices: Mapping[StoredTensor, TensorChoice],
    ranked: Mapping[str, StoredTensor],
    keys: OrderedKeys,
) -> None:
    """The shard again, zeros where the choices say: every byte is read once and written once."""
    with ExitStack() as opened:
        file, target = opened.enter_context(source.open("rb")), opened.enter_context(out.open("wb"))
        scored = {path: opened.enter_context(path.open("rb")) for path in {ranked[one.name].path for one in choices}}
        for one, choice in sorted(choices.items(), key=lambda item: item[0].begin):
            _copy(file, target, one.begin)
            _write_tensor(file, scored[ranked[one.name].path], target, one, choice, ranked[one.name], keys)
        _copy(file, target, source.stat().st_size)


def _copy(file: BinaryIO, target: BinaryIO, end: int) -> None:
    """What comes next in the source, up to ``end``, as it is."""
    file.seek(target.tell())
    while target.tell() < end:
        target.write(file.read(min(_CHUNK, end - target.tell())))


def _write_tensor(
    file: BinaryIO,
    scored: BinaryIO,
    target: BinaryIO,
    one: StoredTensor,
    choice: TensorChoice,
    scores: StoredTensor,
    keys: OrderedKeys,
) -> None:
    held = bytearray()

    def read(start: int, stop: int) -> Tensor:
        nonlocal held
        held = one.read(file, start, stop)
        ordered = keys(scores.values(held if scores is one else scores.read(scored, start, stop)))
        if not isinstance(choice, BelowCut) and not keys.tell_an_order(ordered):  # those of a cut have been counted
            raise not_ordered(one, keys)
        return ordered

    for _, _, keep in choice.parts(one.shape, read):
        whole_numbers(one.values(held)).mul_(keep)
        target.write(held)
