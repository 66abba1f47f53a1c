"""How many samples a batch has, told or read off it, and a batch cut along them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from numbers import Number
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_flowprune.inputs.data.batch_axes import Along, BatchDim, axes_of, below, length, mapped_along
from torch_flowprune.inputs.data.batches import inputs_of, target_key
from torch_flowprune.inputs.data.containers import Batch, held, is_leaf, leaves_in, on_device, tensors_in
from torch_flowprune.inputs.data.ragged import is_ragged, some_of

BatchSize: TypeAlias = int | Callable[[Batch], int]
_OF_TENSORS = "samples are counted in tensors, dicts, tuples, lists and dataclasses of them; for anything else "


def check_batch_size(batch_size: object) -> None:
    """An error for what is neither a whole number above 0 nor a function."""
    if batch_size is not None and not callable(batch_size):
        _whole_size(batch_size)


def _whole_size(size: Any) -> int:
    if not hasattr(size, "__index__") or isinstance(size, bool) or int(size) < 1:
        raise ValueError(
            f"batch_size should be a whole number of at least 1, or a function of a batch that gives one, got {size!r}"
        )
    return int(size)


def size_of(batch: Batch, told: BatchSize | None = None, along: BatchDim = 0) -> int:
    """How many samples a batch has: what was told, else what inputs and target agree on.

    Raises:
        ValueError: where they do not.
    """
    if told is not None:
        return _whole_size(told(batch) if callable(told) else told)
    inputs, target = _in_two_along(batch, along)
    of_inputs, of_target = _readings(inputs, every=target.value is None), _readings(target)
    agreed = of_inputs if target.value is None else of_inputs & of_target
    if len(agreed) == 1:
        return next(iter(agreed))
    seen = f"{_shown(of_inputs)} in the inputs" + (
        "" if target.value is None else f", {_shown(of_target)} in the target"
    )
    raise ValueError(
        f"the number of samples in a batch is unclear: {seen}; {_what_is_meant(batch)}pass batch_size=, a number or a "
        "function of the batch, or batch_dim=, the axis that samples lie along"
    )


def _what_is_meant(batch: Batch) -> str:
    """What may be meant, where no axis of any samples is there."""
    leaves, target = list(leaves_in(batch)), in_two(batch)[1]
    if target is not None and not any(is_ragged(leaf) or leaf.dim() for leaf in leaves_in(target)):
        single = isinstance(target, (Tensor, Number))
        return "if this is a single sample, wrap the data in a DataLoader; else " if single and leaves else _OF_TENSORS
    return "" if leaves else _OF_TENSORS


def first_axis(batch: Batch) -> int:
    """The length of the first axis of the first tensor that has one; 1 where there is none."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.dim()), 1)


def in_two(batch: Batch) -> tuple[Any, Any]:
    """Inputs and target; all of the batch and None where they cannot be told apart."""
    if isinstance(batch, Mapping):
        key = target_key(batch)
        return (batch, None) if key is None else (inputs_of(batch), batch[key])
    if isinstance(batch, (tuple, list)) and not is_leaf(batch):
        return (batch[0], batch[1]) if len(batch) == 2 else (tuple(batch), None)
    return batch, None


def _in_two_along(batch: Batch, along: BatchDim) -> tuple[Along, Along]:
    """Inputs and target, where samples lie in each; as :func:`in_two` tells them apart."""
    inputs, target = in_two(batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        first_part, second_part = below(Along(batch, along))
        return first_part, second_part
    if target is not None and isinstance(along, Mapping):
        return Along(inputs, along), Along(target, along.get(target_key(batch) or "", 0))
    return Along(inputs, along), Along(target, along)


def _readings(part: Along, *, every: bool = False) -> set[int]:
    """The numbers of samples that inputs or a target may be: entries of a list, or places along the tensors' axis.

    That is the first tensor's, as others may be of another form (a mask that all samples share); with ``every`` all
    have to agree, and those of a list in any case.
    """
    lengths = [length(leaf, axis) for leaf, axis in axes_of(part)]
    agreed = set(lengths if every or isinstance(part.value, list) else lengths[:1])
    found = agreed if len(agreed) == 1 else set()
    return found | {len(part.value)} if isinstance(part.value, list) and part.along == 0 else found


def _shown(readings: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(readings))) or "no one length"


def sized(
    batches: Iterable[Batch],
    device: torch.device,
    max_samples: int | None = None,
    batch_size: BatchSize | None = None,
    along: BatchDim = 0,
) -> Iterator[tuple[Batch, int]]:
    """Each batch on ``device`` with its number of samples, cut to exactly ``max_samples`` in all."""
    remaining = max_samples
    for batch in batches:
        if remaining == 0:
            return
        size = size_of(batch, batch_size, along)
        if remaining is not None and size > remaining:
            batch, size = _cut(batch, size, slice(0, remaining), along), remaining  # noqa: PLW2901 - the rest of the loop sees the part
        remaining = None if remaining is None else remaining - size
        yield on_device(batch, device), size


def parts(batch: Batch, size: int, most: int, along: BatchDim = 0) -> Iterator[tuple[Batch, int]]:
    """A batch in pieces of at most ``most`` samples, as equal as they can be, each with its size."""
    pieces = -(-size // most)
    edges = [size * i // pieces for i in range(pieces + 1)]
    for start, end in pairwise(edges):
        yield (batch if pieces == 1 else _cut(batch, size, slice(start, end), along)), end - start


def shapes(batch: Batch, along: BatchDim = 0) -> tuple[Any, ...]:
    """What the memory that one sample takes depends on: the shapes of the batch's tensors but for the samples' axis."""
    own = {id(tensor): axis for tensor, axis in axes_of(Along(batch, along))}
    return tuple(
        (tuple(n for i, n in enumerate(tensor.shape) if i != own.get(id(tensor))), tensor.dtype)
        for tensor in tensors_in(batch)
    )


def first(batch: Batch, size: int, count: int, along: BatchDim = 0) -> Batch:
    """A batch's first samples."""
    return batch if count >= size else _cut(batch, size, slice(0, count), along)


def spread_out(batch: Batch, size: int, count: int, along: BatchDim = 0, *, to_the_last: bool = False) -> Batch:
    """So many samples from all over a batch: the first among them, or the last."""
    step = size // count
    start = size - 1 - (count - 1) * step if to_the_last else 0
    return _cut(batch, size, slice(start, start + step * count, step), along)


def samples(batch: Batch, size: int, along: BatchDim = 0) -> Iterator[Batch]:
    """A batch's samples one by one, each as a batch of one."""
    for part, _ in parts(batch, size, 1, along):
        yield part


def halves(batch: Batch, size: int, along: BatchDim = 0) -> list[tuple[Batch, int]]:
    """A batch's even and odd samples, each with how many they are; none of a batch of one."""
    if size < 2:
        return []
    return [(_cut(batch, size, slice(start, None, 2), along), (size + 1 - start) // 2) for start in (0, 1)]


def _cut(batch: Batch, size: int, piece: slice, along: BatchDim = 0) -> Batch:
    """Some samples of a batch of so many: of what has that length in its place, inputs and target both.

    Raises:
        ValueError: where either has not.
    """
    in_lists = False
    for part in _in_two_along(batch, along):
        if isinstance(part.value, list) or any(is_ragged(leaf) or leaf.dim() for leaf in leaves_in(part.value)):
            _check_can_cut(part, size)
            in_lists = in_lists or _is_samples(part.value, size)
        elif part.along is not None and _is_opaque(part.value):
            raise ValueError(_cut_of(size, f"a {type(part.value).__name__}, which nothing here can cut"))

    def is_whole(value: object) -> bool:
        listed = in_lists and value is not batch and isinstance(value, list) and len(value) == size
        return listed or is_leaf(value) or is_ragged(value)

    def cut(value: Any, own: BatchDim) -> Any:
        if isinstance(value, list):
            return value[piece]
        axis = next((axis for _, axis in axes_of(Along(value, own))), None)
        if axis is None or length(value, axis) != size:
            return value
        return some_of(value, piece) if is_ragged(value) else value[(slice(None),) * axis + (piece,)]

    return mapped_along(cut, Along(batch, along), is_whole)


def _check_can_cut(part: Along, size: int) -> None:
    if part.along is not None and size not in _readings(part):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in list(tensors_in(part.value))[:3])
        raise ValueError(_cut_of(size, f"tensors of shape {shapes}"))


def _cut_of(size: int, found: str) -> str:
    return (
        "max_samples=, max_memory=, halves and squares of sample gradients cut a batch, which should have its "
        f"{size} samples along the first axis of inputs and target, or along batch_dim=, or in lists; got {found}"
    )


def _is_opaque(value: object) -> bool:
    """Whether samples may be in it and cannot be told: an object of a class of the user's, a graph say."""
    return value is not None and held(value) is None and not isinstance(value, (str, bytes, Number))


def _is_samples(value: Any, size: int) -> bool:
    """Whether a list has one entry a sample, as detectors take images, and is not one of whole tensors."""
    return isinstance(value, list) and len(value) == size and {t.shape[:1] for t in tensors_in(value)} != {(size,)}
