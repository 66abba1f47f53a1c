"""How a model is called with what a data loader gives it: as its own signature takes it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_CACHE = "use_cache"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on inputs as data loaders give them, see :func:`arguments`."""
    args, keywords = arguments(model, inputs)
    return model(*args, **keywords)


def arguments(
    model: nn.Module, inputs: Any, keywords: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as the arguments and keywords of a call, with further keywords.

    A tuple is spread over the arguments. A list is one argument, as detectors take it, and so is a tuple of a class of
    its own, unless the forward needs several (a ``DataLoader`` makes lists of a dataset's tuples). Of a mapping the
    model gets what its signature takes.
    """
    if isinstance(inputs, Mapping):
        return (), {**_taken(model, inputs), **(keywords or {})}
    if type(inputs) is tuple or (isinstance(inputs, (tuple, list)) and _needs_several(model)):
        _check_takes(model, inputs, keywords or {})
        return tuple(inputs), dict(keywords or {})
    return (inputs,), dict(keywords or {})


def _check_takes(model: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """An error for more or fewer parts of a batch than the model has arguments."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*inputs, **keywords)
    except TypeError as error:
        raise ValueError(
            f"the model is called with the {len(inputs)} parts of a batch's inputs, and takes "
            f"({', '.join(signature.parameters)}): give batches of (inputs, target), with the inputs in a tuple where "
            "the model takes several, or pass closure=, or example_inputs= where only these are run"
        ) from error


def _taken(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a mapping the model's signature takes: all of it where it takes any keyword.

    Raises:
        ValueError: where that is nothing.
    """
    parameters = _signature(model)
    if _takes_any(model) or not parameters:
        return dict(batch)
    names = [parameter.name for parameter in parameters]
    if accepted := {key: value for key, value in batch.items() if key in names}:
        return accepted
    raise ValueError(
        f"the keys of a dict batch should be what the model takes ({', '.join(names)}), got {list(batch)}: rename "
        "them, or pass closure="
    )


def takes(model: nn.Module, key: str) -> bool:
    """Whether the model has an argument of that name."""
    return any(parameter.name == key for parameter in _signature(model))


def without_cache(model: nn.Module, args: Sequence[Any] = ()) -> dict[str, bool]:
    """The keyword that keeps a language model from handing out its keys and values, where the model knows it.

    What is handed out is read by the model's next call alone, so nothing of it is a result; and a wrapper that takes
    any keyword has it from the one model inside.

    >>> without_cache(nn.Linear(1, 1))
    {}
    """
    inner = model
    while not takes(inner, _CACHE) and _takes_any(inner) and len(children := list(inner.children())) == 1:
        inner = children[0]
    positional = [p.name for p in _signature(model) if p.kind in _POSITIONAL][: len(args)]
    return {_CACHE: False} if takes(inner, _CACHE) and _CACHE not in positional else {}


def _takes_any(model: nn.Module) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in _signature(model))


def _needs_several(model: nn.Module) -> bool:
    required = [p for p in _signature(model) if p.kind in _POSITIONAL and p.default is inspect.Parameter.empty]
    return len(required) > 1


def _signature(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a model's forward; none where they cannot be read (a scripted module)."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []
