"""Why a tensor of a module is no parameter that can be pruned, and the way out."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.utils import parametrize

from torch_flowprune.inputs.named_parameters.names import plain_name
from torch_flowprune.inputs.named_parameters.target import Pair, default_weights


def no_such_parameter(pair: Pair) -> str:
    """Why a ``(module, name)`` pair cannot be pruned, and what can."""
    module, name = pair
    if reason := computed(module, name):
        return f"{name!r} of {type(module).__name__} is {reason}"
    own = [plain_name(key, module._buffers) for key, value in module._parameters.items() if value is not None]
    if name in own:
        return (
            f"({type(module).__name__}, {name!r}) is not part of this model: take the module from the model that is "
            "pruned"
        )
    if module._parameters.get(name, 0) is None:
        return (
            f"{type(module).__name__} has no {name!r}: it is None (made with {name}=False?); its parameters are {own}"
        )
    if name in module._buffers:
        return (
            f"{name!r} of {type(module).__name__} is a buffer: only parameters can be pruned; its parameters are {own}"
        )
    return f"{type(module).__name__} has no parameter {name!r}; its parameters are {own or 'none'}"


def computed_weights(module: nn.Module) -> list[str]:
    """What is said of the weights that a layer computes, or that a parametrization computes of its own parameters."""
    if isinstance(module, parametrize.ParametrizationList):
        return ["the weight made from it is parametrized: torch.nn.utils.parametrize.remove_parametrizations first"]
    reasons = {name: computed(module, name) for name in default_weights(module)}
    return [f"{name!r} of {type(module).__name__} is {reason}" for name, reason in reasons.items() if reason]


def computed(module: nn.Module, name: str) -> str | None:
    """What computes a tensor from other parameters before it is used, with the way out.

    None for a parameter of its own.
    """
    if parametrize.is_parametrized(module, name):
        return "parametrized: torch.nn.utils.parametrize.remove_parametrizations first"
    for hook in module._forward_pre_hooks.values():
        if computes_weight(hook) and hook.name in (name, name.rsplit("_", 1)[0]):  # type: ignore[attr-defined]
            kind = type(hook).__name__
            remover = "remove" + re.sub("([A-Z])", r"_\1", kind).lower()
            return f"rewritten by {kind} before every forward: torch.nn.utils.{remover} first"
    return None


def is_factor(module: nn.Module, name: str) -> bool:
    """Whether a layer computes its weight from this parameter, so that zeros in it need not be zeros in the weight."""
    return isinstance(module, parametrize.ParametrizationList) or computed(module, name) is not None


def computes_weight(hook: object) -> bool:
    """Whether a hook is one of torch's that make a weight of other parameters before each forward."""
    return hasattr(type(hook), "compute_weight") and hasattr(hook, "name")
