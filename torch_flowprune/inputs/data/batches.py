"""What a user calls data, as batches of known size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset, Subset

from torch_flowprune.inputs.data.containers import Batch, is_leaf, mapped

TARGET_KEYS = ("labels", "label", "targets", "target")


def check_readable_again(why: str, *data: object) -> None:
    """An error for an iterator, of which a second reading would find nothing."""
    if any(isinstance(one, Iterator) for one in data):
        raise ValueError(f"{why}, and this iterator can be read only once: pass a list or a DataLoader")


def as_batches(data: object) -> Iterable[Batch]:
    """``data`` as something that yields batches.

    A mapping, a dataclass, a tensor, or a tuple or list that holds a tensor is one batch.

    Raises:
        ValueError: for no data, and for a list of tensors that may be inputs and target as well as batches of inputs.
        TypeError: for what holds no batches.
    """
    if data is None:
        raise ValueError(
            "this needs data: pass data= an iterable of (input, target) batches, of dict batches, or one batch"
        )
    if isinstance(data, list) and len(data) > 1 and all(isinstance(part, Tensor) for part in data):
        _check_told_apart(data)
    if isinstance(data, (Tensor, Mapping, PackedSequence)) or (
        isinstance(data, (tuple, list)) and any(is_leaf(part) for part in data)
    ):
        return [data]
    if _is_one_object(data):
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


@dataclass(frozen=True)
class OneBatch:
    """Data of a single batch, whatever its form: in a list a tensor may be a part of one as well."""

    batch: Batch

    def __iter__(self) -> Iterator[Batch]:
        yield self.batch

    def __len__(self) -> int:
        return 1


def _is_one_object(data: object) -> bool:
    """A dataclass, or an object with keys that is moved to a device as a whole: iterating a graph gives its parts."""
    if is_dataclass(data):
        return not isinstance(data, (type, Iterable))
    return hasattr(data, "keys") and callable(getattr(data, "to", None))


def _check_told_apart(tensors: list[Tensor]) -> None:
    """Loaders make lists of inputs and target, and users lists of batches: of tensors alike it may be either."""
    if len({(tensor.dtype, tensor.shape[1:]) for tensor in tensors}) == 1:
        raise ValueError(
            f"data= is a list of {len(tensors)} tensors alike, which may be one batch or several: give one batch as a "
            "tuple, (input, target), and batches of inputs alone as [(x,) for x in batches]"
        )


def in_dtype(batch: Batch, dtype: torch.dtype, *narrow: torch.dtype) -> Batch:
    """A batch whose tensors of the narrow dtypes are of this one."""
    return mapped(lambda leaf: leaf.to(dtype) if leaf.data.dtype in narrow else leaf, batch)


def inputs_of(batch: Batch) -> Any:
    """What of a batch the model is called with: all but the target, which is the second of two."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    if isinstance(batch, (tuple, list)) and not is_leaf(batch):
        return batch[0] if len(batch) in (1, 2) else tuple(batch)
    return batch


def target_key(batch: Mapping[str, Any]) -> str | None:
    """The key that a dict batch has its target under."""
    return next((key for key in TARGET_KEYS if key in batch), None)


def class_balanced(
    dataset: Dataset[Any],
    per_class: int,
    *,
    targets: Iterable[int] | None = None,
    generator: torch.Generator | None = None,
) -> Subset[Any]:
    """Exactly ``per_class`` samples of every class, drawn without replacement, in order of the classes.

    In batches of ``per_class`` this is the paper's protocol for gradient-norm scores: one batch per class, and the same
    data for g and H.

    Args:
        dataset: a map-style dataset of ``(input, class)`` samples.
        per_class: how many of each class.
        targets: the class of every sample; else the dataset's own ``targets``, else read sample by sample.
        generator: the random generator for the draw; without one, the first ``per_class`` samples of each class are
            used.

    Raises:
        ValueError: if ``per_class`` is not positive or a class has fewer samples.

    See Also:
        :func:`~torch_flowprune.scores`: takes batches of them as ``data``.

    >>> import torch, torch_flowprune as fp
    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.zeros(5, 2), torch.tensor([0, 1, 0, 1, 0]))
    >>> fp.class_balanced(data, 2).indices
    [0, 2, 1, 3]
    """
    if per_class < 1:
        raise ValueError(f"per_class should be at least 1, got {per_class}")
    known = targets if targets is not None else getattr(dataset, "targets", None)
    if known is not None and len(known := list(known)) != len(dataset):  # type: ignore[arg-type]  # it is map-style
        raise ValueError(f"targets= should have an entry for each sample, got {len(known)} for {len(dataset)}")  # type: ignore[arg-type]
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
