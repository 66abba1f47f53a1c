"""How a model is called with what a data loader gives it: as its own signature takes it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on inputs as data loaders give them, see :func:`arguments`."""
    args, keywords = arguments(model, inputs)
    return model(*args, **keywords)


def arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as the arguments and keywords of a call.

    A tuple is spread over the arguments. A list is one argument, as detectors take it, unless the forward needs several
    (a ``DataLoader`` makes lists of a dataset's tuples). Of a mapping the model gets what its signature takes.
    """
    if isinstance(inputs, Mapping):
        return (), _taken(model, inputs)
    spread = isinstance(inputs, tuple) or (isinstance(inputs, list) and _needs_several(model))
    return (tuple(inputs) if spread else (inputs,)), {}


def _taken(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a mapping the model's signature takes: all of it where it takes any keyword.

    Raises:
        ValueError: where that is nothing.
    """
    parameters = _signature(model)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters) or not parameters:
        return dict(batch)
    names = [parameter.name for parameter in parameters]
    if found := {key: value for key, value in batch.items() if key in names}:
        return found
    raise ValueError(
        f"the keys of a dict batch should be what the model takes ({', '.join(names)}), got {list(batch)}: rename "
        "them, or pass closure="
    )


def takes(model: nn.Module, key: str) -> bool:
    """Whether the model has an argument of that name."""
    return any(parameter.name == key for parameter in _signature(model))


def _needs_several(model: nn.Module) -> bool:
    required = [p for p in _signature(model) if p.kind in _POSITIONAL and p.default is inspect.Parameter.empty]
    return len(required) > 1


def _signature(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a model's forward; none where they cannot be read (a scripted module)."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []
