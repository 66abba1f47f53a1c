"""What a layer computes its weight from, picked as the weight is: by the layer's own name, type, or pair."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.nn.utils import parametrize

from torch_flowprune.inputs.named_parameters.parameters import parameters_of
from torch_flowprune.inputs.named_parameters.target import Target
from torch_flowprune.inputs.named_parameters.unprunable import computed


def parameters_and_factors(model: nn.Module) -> dict[str, Target]:
    """:func:`parameters_of`, where the factors of a weight that a layer computes are also called as that weight is.

    Whoever picks ``conv.weight`` picks ``weight_g`` and ``weight_v`` of weight norm, or the original of a
    parametrization.
    """
    weights = {id(module): (path, module) for path, module in model.named_modules()}
    lists = {
        id(originals): (*weights[id(module)], name)
        for _, module in weights.values()
        if parametrize.is_parametrized(module)
        for name, originals in module.parametrizations.items()
    }
    return {name: _owned_by_its_layer(target, weights, lists) for name, target in parameters_of(model).items()}


def _owned_by_its_layer(
    target: Target, modules: dict[int, tuple[str, nn.Module]], lists: dict[int, tuple[str, nn.Module, str]]
) -> Target:
    owner, attribute = target.owners[0]
    path, layer, weight = lists.get(id(owner)) or (*modules[id(owner)], attribute.rpartition("_")[0])
    if computed(layer, weight) is None:
        return target
    alias = f"{path}.{weight}".removeprefix(".")
    return replace(target, owners=(*target.owners, (layer, weight)), aliases=(*target.aliases, alias))
