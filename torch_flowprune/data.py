"""What a user calls data, as batches of known size, and the loss of a model on one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset

Batch: TypeAlias = Any
Loss: TypeAlias = Callable[[Any, Any], Tensor]
Closure: TypeAlias = Callable[[nn.Module, Batch], Tensor]

_TARGET_KEYS = ("labels", "label", "targets", "target")


def as_batches(data: object) -> Iterable[Batch]:
    """``data`` as something that yields batches: a mapping, a tensor, or a tuple or list that holds a tensor is one batch."""
    if data is None:
        raise ValueError("this needs data: pass data= an iterable of (input, target) batches, of dict batches, or one batch")
    if isinstance(data, (Tensor, Mapping)) or (isinstance(data, (tuple, list)) and any(isinstance(part, Tensor) for part in data)):
        return [data]
    if isinstance(data, Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        raise TypeError(f"data= is a dataset ({type(data).__name__}), which yields single samples: wrap it in a torch.utils.data.DataLoader")
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise TypeError(f"data= takes a DataLoader, any iterable of batches, or one batch, got {type(data).__name__}: {data!r}")
    return data


def sized(batches: Iterable[Batch], device: torch.device, max_samples: int | None = None) -> Iterator[tuple[Batch, int]]:
    """Each batch on ``device`` with its number of samples, cut to exactly ``max_samples`` in all."""
    left = max_samples
    for batch in batches:
        if left == 0:
            return
        size = size_of(batch)
        if left is not None and size > left:
            batch, size = _slice(batch, size, 0, left), left  # noqa: PLW2901 - what the rest of the loop sees is the part
        left = None if left is None else left - size
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


@dataclass(frozen=True)
class Objective:
    """The scalar a flow differentiates: ``objective(model, batch)``.

    ``closure`` has the last word. Otherwise the model's output on the batch's inputs, divided by ``temperature``, goes into ``loss``
    with the batch's target; a dict batch without ``loss`` uses the loss that the model itself returns (Hugging Face's habit).
    """

    loss: Loss | None = None
    closure: Closure | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature should be above 0 (the logits are divided by it), got {self.temperature!r}")
        if self.closure is not None and (self.loss is not None or self.temperature != 1.0):
            raise ValueError("closure= computes the whole loss: give it alone, and apply loss and temperature inside it")
        _check_function("loss", self.loss, "loss(output, target), such as torch.nn.functional.cross_entropy")
        _check_function("closure", self.closure, "closure(model, batch), such as lambda model, batch: model(batch).mean()")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        value = self.number(model, batch)
        if not value.requires_grad:
            raise ValueError("the loss does not depend on any parameter: it has no gradient (is it detached, or computed under no_grad?)")
        return value

    def number(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss as a 0-d tensor, with or without a gradient."""
        value = self.closure(model, batch) if self.closure else self._value(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
            raise ValueError(f"the loss should be one number, got {found}; use reduction='mean'")
        return value.reshape(())

    def _value(self, model: nn.Module, batch: Batch) -> Tensor:
        if isinstance(batch, Mapping):
            return self._of_mapping(model, batch)
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(f"a batch should be (input, target) or a dict, got {_describe(batch)}; for anything else pass closure=")
        inputs, target = batch
        return self._compare(call(model, inputs), target)

    def _of_mapping(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        if self.loss is None and self.temperature == 1.0:
            own = getattr(output := model(**batch), "loss", None)
            if own is None and isinstance(output, Mapping):
                own = output.get("loss")
            if own is not None:
                return own  # type: ignore[no-any-return]
        key = next((key for key in _TARGET_KEYS if key in batch), None)
        if key is None:
            raise ValueError(f"a dict batch without a loss from the model needs its target under one of {_TARGET_KEYS}, got keys {list(batch)}")
        return self._compare(model(**{name: value for name, value in batch.items() if name != key}), batch[key])

    def _compare(self, output: Any, target: Any) -> Tensor:
        logits = logits_of(output)
        return (self.loss or functional.cross_entropy)(logits if self.temperature == 1.0 else logits / self.temperature, target)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on inputs as data loaders give them: a tensor, a tuple of arguments or a dict of them."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def inputs_of(batch: Batch) -> Any:
    """What of a batch the model is called with: all but the target."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in _TARGET_KEYS}
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch


def example_of(data: object, example_inputs: Any, device: torch.device) -> Any:
    """Inputs to show the model's shapes with, on ``device``: those given, or the first batch's.

    Raises:
        ValueError: where there are none.
    """
    if example_inputs is None:
        if data is None:
            raise ValueError("an example input is needed, and there is no data: pass example_inputs=, e.g. torch.ones(2, 3, 224, 224)")
        example_inputs = inputs_of(next(iter(as_batches(data))))
    return _map(lambda tensor: tensor.to(device), example_inputs)


def logits_of(output: Any) -> Tensor:
    """The tensor a loss reads of a model's output: itself, its ``logits``, or a dict's ``logits`` or ``out`` (torchvision's segmentation).

    Raises:
        TypeError: for any other output.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"the model returned {_describe(output)}, not logits: pass closure=lambda model, batch: ... that returns the loss")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def class_balanced(
    dataset: Dataset[Any], per_class: int, *, targets: Iterable[int] | None = None, generator: torch.Generator | None = None
) -> Subset[Any]:
    """Exactly ``per_class`` samples of every class, drawn without replacement, class after class.

    In batches of ``per_class`` it is the protocol of the paper's gradient-norm scores: one batch a class, the same data for g and H.

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
    labels = torch.as_tensor(list(known) if known is not None else [int(dataset[i][1]) for i in range(len(dataset))])  # type: ignore[arg-type]
    order = torch.arange(len(labels)) if generator is None else torch.randperm(len(labels), generator=generator)
    indices: list[int] = []
    for label in labels.unique().tolist():
        members = order[labels[order] == label]
        if len(members) < per_class:
            raise ValueError(f"class {label} has {len(members)} samples, per_class={per_class} asks for more: lower it or leave the class out")
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


def _check_function(name: str, given: object, form: str) -> None:
    if given is not None and not callable(given):
        raise TypeError(f"{name} should be a function, called as {form}; got {given!r}")
