"""The trials of ties, optimizers, numbers and frameworks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from benchmarks.carriers.trials import MASK, TRIALS, X, layer_of, row, zeros
from benchmarks.carriers.ways import Way

__all__ = ["TRIALS"]


@row("4.3", "both owners of a tied weight, tied in a copy too")
def _tied(way: Way) -> bool:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    for part in model:
        way.put(part, "weight", MASK)
    twin = copy.deepcopy(model)
    return zeros(twin[1].weight + 0) and way.parameter(twin[0], "weight") is way.parameter(twin[1], "weight")


@row("5.1", "an optimizer made before, and after the mask is made permanent")
def _optimized(way: Way) -> bool:
    layer = nn.Linear(8, 8)
    held = layer.weight
    way.put(layer, "weight", MASK)
    same = way.parameter(layer, "weight") is held
    way.off(layer, "weight")
    return same and layer.weight is held and zeros(layer.weight)


@row("5.2", "the gradient under the mask is exactly 0, whatever comes from above")
def _gradient(way: Way) -> bool:
    layer = layer_of(way)
    (layer.weight * torch.where(MASK, 1.0, torch.inf)).sum().backward()
    gradient = way.parameter(layer, "weight").grad
    return gradient is not None and zeros(gradient)


@row("5.5", "the order of the parameters")
def _order(way: Way) -> bool:
    layer = layer_of(way)
    return [value.dim() for value in layer.parameters()] == [2, 1]


@row("5.10", "removed: class, names and object as before")
def _off(way: Way) -> bool:
    layer = layer_of(way)
    way.off(layer, "weight")
    return type(layer) is nn.Linear and list(layer.state_dict()) == ["weight", "bias"] and zeros(layer.weight)


@row("6.5", "nan and inf under the mask are 0")
def _poisoned(way: Way) -> bool:
    layer = layer_of(way)
    with torch.no_grad():
        way.parameter(layer, "weight").data[0, 0] = torch.nan
        way.parameter(layer, "weight").data[0, 3] = torch.inf
    return bool(layer(X).isfinite().all())


@row("6.13", "the layout of memory")
def _layout(way: Way) -> bool:
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    way.put(layer, "weight", torch.ones_like(layer.weight, dtype=torch.bool))
    return (layer.weight + 0).is_contiguous(memory_format=torch.channels_last)


@row("7.7", "compiled to one graph")
def _compiled(way: Way) -> bool:
    layer = layer_of(way)
    return torch.allclose(torch.compile(layer, backend="eager", fullgraph=True)(X), layer(X))


@row("7.8", "exported, with the mask in the graph")
def _exported(way: Way) -> bool:
    layer = layer_of(way)
    return torch.allclose(torch.export.export(layer, (X,)).module()(X), layer(X))


@row("7.9", "traced by torch.jit")
def _jit(way: Way) -> bool:
    layer = layer_of(way)
    return torch.allclose(torch.jit.trace(layer, X)(X), layer(X))


@row("7.10", "a leaf of a model traced by torch.fx")
def _leaf(way: Way) -> bool:
    model = nn.Sequential(layer_of(way), nn.ReLU())
    return torch.equal(torch.fx.symbolic_trace(model)(X), model(X))


@row("7.11", "torch.func: gradients and per-sample gradients")
def _functional(way: Way) -> bool:
    layer = layer_of(way)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(values: Any, x: Any) -> Any:
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    whole = torch.func.grad(loss)(parameters, X)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    weight = next(name for name, value in whole.items() if value.dim() == 2)
    return zeros(whole[weight]) and torch.allclose(each[weight].sum(0), whole[weight], atol=1e-5)


@row("7.13", "a replica of data parallelism")
def _replica(way: Way) -> bool:
    layer = layer_of(way)
    replica = layer._replicate_for_data_parallel()
    replica._parameters, replica._buffers = dict(layer._parameters), dict(layer._buffers)
    return torch.equal(replica(X), layer(X))


@row("7.15", "code that matches exact classes knows the layer")
def _exact(way: Way) -> bool:
    return type(layer_of(way)) is nn.Linear


@row("torch 14", "torch's is_pruned, its methods on top, its remove")
def _torch_on_top(way: Way) -> bool:
    layer = layer_of(way)
    known = prune.is_pruned(layer)
    prune.l1_unstructured(layer, "weight", 8)
    gone = int((layer.weight == 0).sum()) == int((~MASK).sum()) + 8
    prune.remove(layer, "weight")
    return known and gone and zeros(layer.weight, layer.weight != 0)
