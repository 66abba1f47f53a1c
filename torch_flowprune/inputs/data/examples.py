"""Inputs to show a model's shapes with: those given, or what the loss calls the model with on the first batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import nn

from torch_flowprune.inputs.data.arguments import call, takes
from torch_flowprune.inputs.data.batches import as_batches, inputs_of, target_key
from torch_flowprune.inputs.data.containers import Batch, on_device
from torch_flowprune.inputs.data.objective import Closure, Objective


def example_of(data: object, example_inputs: Any, device: torch.device) -> Any:
    """Inputs on ``device``: those given, or the first batch's.

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
    return on_device(example_inputs, device)


def example_for(model: nn.Module, objective: Objective, data: object, example_inputs: Any) -> Any:
    """Inputs on the model's device: those given, or what the loss calls it with on the first batch.

    The model should be looked at without leaving a trace, as it may be run.
    """
    device = next(model.parameters()).device
    if example_inputs is not None or data is None:
        return example_of(data, example_inputs, device)
    batch = on_device(next(iter(as_batches(data))), device)
    if objective.closure is not None:
        return _called_with(model, objective.closure, batch)
    if isinstance(batch, Mapping) and objective.is_the_models and takes(model, target_key(batch) or ""):
        return _inputs_that_run(model, batch)
    return inputs_of(batch)


_WITHOUT_NAMES = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


class _CalledError(Exception):
    """The model is called, which is all there was to see."""


def _called_with(model: nn.Module, closure: Closure, batch: Batch) -> Any:
    """What a user's closure calls the model with first; the batch's inputs where it does not call it as a whole."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> NoReturn:
        seen.append((args, keywords))
        raise _CalledError

    hook = model.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
    try:
        with suppress(_CalledError):
            closure(model, batch)
    finally:
        hook.remove()
    inputs = _as_inputs(model, *seen[0]) if seen else None
    return inputs_of(batch) if inputs is None else inputs


def _as_inputs(model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The arguments of a call as one value, which calls the model in the same way; None where none does."""
    if not keywords:
        return args
    named = inspect.signature(model.forward).bind(*args, **keywords)
    kinds = {name: parameter.kind for name, parameter in named.signature.parameters.items()}
    if any(kinds[name] in _WITHOUT_NAMES for name in named.arguments):
        return None
    others = {name: value for name, value in named.arguments.items() if kinds[name] is inspect.Parameter.VAR_KEYWORD}
    return {name: value for name, value in named.arguments.items() if name not in others} | {
        key: value for group in others.values() for key, value in group.items()
    }


def _inputs_that_run(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the target, if the model runs so: some decoders read it."""
    inputs: Mapping[str, Any] = inputs_of(batch)
    with suppress(Exception), torch.no_grad():  # whatever the model raises where it lacks an input
        call(model, inputs)
        return inputs
    return batch
