"""The loss of a model on one batch: the scalar that a flow differentiates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_flowprune.inputs.data.arguments import call, takes
from torch_flowprune.inputs.data.batches import TARGET_KEYS, inputs_of, target_key
from torch_flowprune.inputs.data.containers import Batch, tensors_in

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Closure: TypeAlias = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Objective:
    """The scalar a flow differentiates: ``objective(model, batch)``.

    ``closure`` has the last word. Otherwise ``loss`` gets what the model returned on the batch's inputs, as it is, and
    the batch's target. torch's own losses, which read tensors, get the logits of an output that has them (an
    attribute or entry ``logits`` or ``out``); so does cross-entropy, which is taken where no loss is given. A dict
    batch without ``loss`` uses the loss that the model itself returns (Hugging Face's habit). ``temperature`` divides
    the logits.
    """

    loss: Loss | None = None
    closure: Closure | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature should be above 0 (the logits are divided by it), got {self.temperature!r}")
        if self.closure is not None and (self.loss is not None or self.temperature != 1.0):
            raise ValueError(
                "closure= computes the whole loss: give it alone, and apply loss and temperature inside it"
            )
        _check_function("loss", self.loss, "loss(output, target), such as torch.nn.functional.cross_entropy")
        _check_function(
            "closure", self.closure, "closure(model, batch), such as lambda model, batch: model(batch).mean()"
        )

    @property
    def is_the_models(self) -> bool:
        """Whether a dict batch uses the loss that the model itself returns, if it returns one."""
        return self.loss is None and self.closure is None and self.temperature == 1.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        value = self.number(model, batch)
        if not value.requires_grad:
            raise ValueError(
                "the loss does not depend on any parameter: it has no gradient (is it detached, or computed under "
                "no_grad?)"
            )
        return value

    def number(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss as a 0-d tensor, with or without a gradient."""
        value = self.closure(model, batch) if self.closure else self._value(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"the loss should be one number, got {_not_a_number(value)}")
        return value.reshape(())

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model as the loss has it run, for what it computes on the way."""
        if self.closure:
            return self.closure(model, batch)
        whole = isinstance(batch, Mapping) and self.is_the_models  # models with a decoder read the targets
        return call(model, batch if whole else inputs_of(batch))

    def number_alone(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss for its own sake, without a graph where it does not take gradients itself or ask for one."""
        with torch.no_grad(), suppress(Exception):
            return self.number(model, batch)
        with torch.enable_grad():  # where an error is one of the user's
            return self.number(model, batch).detach()

    def _value(self, model: nn.Module, batch: Batch) -> Tensor:
        if isinstance(batch, Mapping):
            return self._of_mapping(model, batch)
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(
                f"a batch should be (input, target) or a dict, got {_describe(batch)}; for anything else pass closure="
            )
        inputs, target = batch
        return self._compare(call(model, inputs), target)

    def _of_mapping(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        key = target_key(batch)
        if self.is_the_models:
            output = call(model, batch)
            if (own := _own_loss(output)) is not None:
                return own
            if key is not None and not takes(model, key):
                return self._compare(output, batch[key])
        if key is None:
            raise ValueError(
                f"a dict batch without a loss from the model needs its target under one of {TARGET_KEYS}, got keys "
                f"{list(batch)}; or pass closure="
            )
        return self._compare(call(model, inputs_of(batch)), batch[key])

    def _compare(self, output: Any, target: Any) -> Tensor:
        if self.loss is None:
            return cross_entropy(self._warmed(logits_of(output)), target)
        if isinstance(output, Tensor) or self.temperature != 1.0 or _is_torchs(self.loss):
            output = self._warmed(logits_of(output))
        return self.loss(output, target)

    def _warmed(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1.0 else logits / self.temperature


def answer(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """What the model returned on a batch's inputs, as a loss of torch's would read it, and the batch's target.

    Raises:
        ValueError: for a batch that has no target.
    """
    if isinstance(batch, Mapping):
        key = target_key(batch)
        if key is None:
            raise ValueError(f"a dict batch needs its target under one of {TARGET_KEYS}, got keys {list(batch)}")
        return logits_of(call(model, inputs_of(batch))), batch[key]
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ValueError(f"a batch should be (input, target) or a dict, got {_describe(batch)}")
    return logits_of(call(model, batch[0])), batch[1]


def _not_a_number(value: object) -> str:
    """What it is, and how to make one of it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}; use reduction='mean' in it"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value))}; add them up in a closure: sum(losses.values())"
    return f"{_describe(value)}; return the tensor that you call backward() on"


def _own_loss(output: Any) -> Tensor | None:
    own: Tensor | None = getattr(output, "loss", None)
    return output.get("loss") if own is None and isinstance(output, Mapping) else own


def _is_torchs(loss: Loss) -> bool:
    """Whether a loss is one of torch's functions or modules, with some of its arguments set or not."""
    while isinstance(loss, partial):
        loss = loss.func
    module = type(loss).__module__ if isinstance(loss, nn.Module) else getattr(loss, "__module__", None) or "torch"
    return module.partition(".")[0] == "torch"


def cross_entropy(logits: Tensor, target: Any) -> Tensor:
    """The loss where none is given, of targets that it is meant for.

    Raises:
        ValueError: for targets that are neither class indices nor class probabilities.
    """
    if reason := _no_classes(logits, target):
        raise ValueError(
            f"no loss= is given, and the default is cross-entropy, which takes class indices or probabilities: {reason}"
        )
    return functional.cross_entropy(logits, target)


def _no_classes(logits: Tensor, target: Any) -> str | None:
    """What makes targets no classes, with the way out."""
    other = "pass loss=, such as torch.nn.functional.mse_loss or binary_cross_entropy_with_logits"
    if not isinstance(target, Tensor):
        return f"the target is {_describe(target)}: make it a tensor, or {other}, or closure="
    classes = min(1, logits.dim() - 1)
    if logits.dim() == 0 or logits.shape[classes] == 1:
        return f"the model's output has no axis of several classes (shape {tuple(logits.shape)}); {other}"
    if target.is_floating_point():
        return _no_probabilities(logits, target, classes, other)
    return _no_indices(logits, target, classes, other)


def _no_indices(logits: Tensor, target: Tensor, classes: int, other: str) -> str | None:
    if target.shape == logits.shape and target.dim() > 1:
        return f"the targets are whole numbers, several a sample (shape {tuple(target.shape)}); {other}"
    if target.dtype is not torch.long:
        return f"the targets are {target.dtype}: make indices torch.long, or {other}"
    places = logits.shape[:classes] + logits.shape[classes + 1 :]
    if target.shape != places:
        return (
            f"the indices are of shape {tuple(target.shape)}, the logits of {tuple(logits.shape)}: indices of shape "
            f"{tuple(places)} go with them (target.squeeze(-1), logits.flatten(0, 1) in a loss of your own); {other}"
        )
    return None


def _no_probabilities(logits: Tensor, target: Tensor, classes: int, other: str) -> str | None:
    if target.shape != logits.shape:
        return (
            f"the targets are {target.dtype} of shape {tuple(target.shape)}, the logits of shape "
            f"{tuple(logits.shape)}: make class indices torch.long, or {other}"
        )
    tolerance = 1e-3 if target.dtype.itemsize >= 4 else 2e-2
    sums = target.detach().sum(classes, dtype=torch.float32)
    if bool((target.detach() >= 0).all()) and bool(((sums - 1).abs() <= tolerance).all()):
        return None
    return f"the targets are numbers that are negative or do not sum to 1 over the classes; {other}"


def logits_of(output: Any) -> Tensor:
    """The tensor a loss reads of a model's output: itself, its ``logits`` or ``out``, or the only one that it holds.

    Raises:
        TypeError: for any other output.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    tensors = [part for part in parts if part is not None]
    if len(tensors) == 1 and isinstance(tensors[0], Tensor):
        return tensors[0]
    raise TypeError(
        f"the model returned {_describe(output)}, not logits: pass loss= a function of your own, which gets it as it "
        "is, or closure=lambda model, batch: ... that returns the loss"
    )


def summed_outputs(output: Any) -> list[Tensor]:
    """All tensors of numbers that a model's output consists of: its logits alone, where it tells them."""
    try:
        return [logits_of(output)]
    except TypeError:
        return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def _check_function(name: str, value: object, form: str) -> None:
    if isinstance(value, type):
        raise TypeError(f"{name} should be a function, got the class {value.__name__}: make one, {value.__name__}()")
    if value is not None and not callable(value):
        raise TypeError(f"{name} should be a function, called as {form}; got {value!r}")
