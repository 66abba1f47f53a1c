"""The loss of a model on one batch: the scalar that a flow differentiates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from torch_flowprune.inputs.batches import TARGET_KEYS, Batch

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Closure: TypeAlias = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Objective:
    """The scalar a flow differentiates: ``objective(model, batch)``.

    ``closure`` has the last word. Otherwise the model's output on the batch's inputs, divided by ``temperature``, goes
    into ``loss`` with the batch's target; a dict batch without ``loss`` uses the loss that the model itself returns
    (Hugging Face's habit).
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
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss should be one number, got {kind}; use reduction='mean'")
        return value.reshape(())

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
        if self.loss is None and self.temperature == 1.0:
            own = getattr(output := model(**batch), "loss", None)
            if own is None and isinstance(output, Mapping):
                own = output.get("loss")
            if own is not None:
                return own  # type: ignore[no-any-return]
        key = next((key for key in TARGET_KEYS if key in batch), None)
        if key is None:
            raise ValueError(
                f"a dict batch without a loss from the model needs its target under one of {TARGET_KEYS}, got keys "
                f"{list(batch)}"
            )
        return self._compare(model(**{name: value for name, value in batch.items() if name != key}), batch[key])

    def _compare(self, output: Any, target: Any) -> Tensor:
        logits = logits_of(output)
        return (self.loss or functional.cross_entropy)(
            logits if self.temperature == 1.0 else logits / self.temperature, target
        )


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on inputs as data loaders give them: a tensor, a tuple of arguments or a dict of them."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def logits_of(output: Any) -> Tensor:
    """The tensor a loss reads of a model's output: itself, its ``logits``, or a dict's ``logits`` or ``out``.

    Raises:
        TypeError: for any other output.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    raise TypeError(
        f"the model returned {_describe(output)}, not logits: pass closure=lambda model, batch: ... that returns the "
        "loss"
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def _check_function(name: str, value: object, form: str) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name} should be a function, called as {form}; got {value!r}")
