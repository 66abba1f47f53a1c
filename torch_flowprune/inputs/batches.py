"""What a user calls data, as batches of known size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

Batch: TypeAlias = Any

TARGET_KEYS = ("labels", "label", "targets", "target")


def as_batches(data: object) -> Iterable[Batch]:
    """``data`` as something that yields batches.

    A mapping, a tensor, or a tuple or list that holds a tensor is one batch.
    """
    if data is None:
        raise ValueError(
            "this needs data: pass data= an iterable of (input, target) batches, of dict batches, or one batch"
        )
    if isinstance(data, (Tensor, Mapping)) or (
        isinstance(data, (tuple, list)) and any(isinstance(part, Tensor) for part in data)
    ):
        return [data]
    if isinstance(data, Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        raise TypeError(
            f"data= is a dataset ({type(data).__name__}), which yields single samples: wrap it in a "
            "torch.utils.data.DataLoader"
        )
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data= takes a DataLoader, any iterable of batches, or one batch, got {type(data).__name__}: {data!r}"
        )
    return data


def sized(
    batches: Iterable[Batch], device: torch.device, max_samples: int | None = None
) -> Iterator[tuple[Batch, int]]:
    """Each batch on ``device`` with its number of samples, cut to exactly ``max_samples`` in all."""
    remaining = max_samples
    for batch in batches:
        if remaining == 0:
            return
        size = size_of(batch)
        if remaining is not None and size > remaining:
            batch, size = _slice(batch, size, 0, remaining), remaining  # noqa: PLW2901 - the rest of the loop sees the part
        remaining = None if remaining is None else remaining - size
        yield _map(lambda tensor: tensor.to(device, non_blocking=True), batch), size


def size_of(batch: Batch) -> int:
    """The length of the first axis of the batch's first tensor that has one; 1 where there is none."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.dim()), 1)


def _slice(batch: Batch, size: int, start: int, end: int) -> Batch:
    return _map(lambda tensor: tensor[start:end] if tensor.dim() and len(tensor) == size else tensor, batch)


def _map(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _map(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(function, part) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_map(function, part) for part in batch)
    return batch


def _tensors(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def inputs_of(batch: Batch) -> Any:
    """What of a batch the model is called with: all but the target."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch


def example_of(data: object, example_inputs: Any, device: torch.device) -> Any:
    """Inputs to show the model's shapes with, on ``device``: those given, or the first batch's.

    Raises:
        ValueError: where there are none.
    """
    if example_inputs is None:
        if data is None:
            raise ValueError(
                "an example input is needed, and there is no data: pass example_inputs=, e.g. torch.ones(2, 3, 224, "
                "224)"
            )
        example_inputs = inputs_of(next(iter(as_batches(data))))
    return _map(lambda tensor: tensor.to(device), example_inputs)


def class_balanced(
    dataset: Dataset[Any],
    per_class: int,
    *,
    targets: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
) -> Subset[Any]:
    """Exactly ``per_class`` samples of every class, drawn without replacement, class after class.

    In batches of ``per_class`` it is the protocol of the paper's gradient-norm scores: one batch a class, the same data
    for g and H.

    Args:
        dataset: a map-style dataset of ``(input, class)`` samples.
        per_class: how many of each class.
        targets: the class of every sample; else the dataset's own ``targets``, else read sample by sample.
        generator: the source of the draw; without one the first ``per_class`` of each class are taken.

    Raises:
        ValueError: if ``per_class`` is not positive or a class has fewer samples.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.zeros(5, 2), torch.tensor([0, 1, 0, 1, 0]))
    >>> class_balanced(data, 2).indices
    [0, 2, 1, 3]
    """
    if per_class < 1:
        raise ValueError(f"per_class should be at least 1, got {per_class}")
    known = targets if targets is not None else getattr(dataset, "targets", None)
    classes = known if known is not None else [dataset[i][1] for i in range(len(dataset))]  # type: ignore[arg-type]
    labels = torch.tensor([int(label) for label in classes], device="cpu")
    order = torch.arange(len(labels), device="cpu")
    if generator is not None:
        order = torch.randperm(len(labels), generator=generator, device="cpu")
    indices: list[int] = []
    for label in labels.unique().tolist():
        members = order[labels[order] == label]
        if len(members) < per_class:
            raise ValueError(
                f"class {label} has {len(members)} samples, per_class={per_class} asks for more: lower it or leave "
                "the class out"
            )
        indices.extend(members[:per_class].tolist())
    return Subset(dataset, indices)


def parts(batch: Batch, size: int, most: int) -> Iterator[tuple[Batch, int]]:
    """A batch in pieces of at most ``most`` samples, as equal as they can be, each with its size."""
    pieces = -(-size // most)
    edges = [size * i // pieces for i in range(pieces + 1)]
    for start, end in pairwise(edges):
        yield _slice(batch, size, start, end), end - start


def first(batch: Batch, count: int) -> Batch:
    """A batch's first samples."""
    return _slice(batch, size_of(batch), 0, count)


def shapes(batch: Batch) -> tuple[Any, ...]:
    """What the memory that one sample takes depends on: the shapes of the batch's tensors but for the first axis."""
    return tuple((tensor.shape[1:], tensor.dtype) for tensor in _tensors(batch))


def samples(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch's samples one by one, each as a batch of one."""
    for part, _ in parts(batch, size, 1):
        yield part


def halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """A batch's even and odd samples; None for a batch of one."""
    size = size_of(batch)
    if size < 2:
        return None

    def every(start: int) -> Batch:
        return _map(lambda tensor: tensor[start::2] if tensor.dim() and len(tensor) == size else tensor, batch)

    return every(0), every(1)
