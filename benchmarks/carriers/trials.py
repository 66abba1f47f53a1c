"""One trial a row of the host page: a function of a carrier that is true where the row holds."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from benchmarks.carriers.ways import Way, alive

X = torch.arange(16.0).view(2, 8) / 16
MASK = torch.arange(64).view(8, 8) % 3 != 0

TRIALS: dict[str, tuple[str, Callable[[Way], bool]]] = {}


def row(number: str, what: str) -> Callable[[Callable[[Way], bool]], Callable[[Way], bool]]:
    def kept(trial: Callable[[Way], bool]) -> Callable[[Way], bool]:
        TRIALS[number] = what, trial
        return trial

    return kept


def layer_of(way: Way, kind: Callable[[int, int], Any] = nn.Linear) -> Any:
    layer = kind(8, 8)
    way.put(layer, "weight", MASK)
    return layer


def zeros(weight: Tensor, mask: Tensor = MASK) -> bool:
    return not weight.detach()[~mask].any() and bool(weight.detach()[mask].any())


@row("1.1", "copied after a forward with gradients, apart from the original")
def _copied(way: Way) -> bool:
    layer = layer_of(way)
    layer(X).sum()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        way.parameter(layer, "weight").zero_()
    return zeros(twin.weight + 0)


@row("1.2", "torch's average of a model trains along")
def _averaged(way: Way) -> bool:
    layer = layer_of(way)
    average = AveragedModel(layer, use_buffers=True, avg_fn=lambda old, new, _: (old + new) / 2)
    for _ in range(2):
        average.update_parameters(layer)
    return zeros(average.module.weight + 0)


@row("1.4", "pickled whole")
def _pickled(way: Way) -> bool:
    layer = layer_of(way)
    twin = pickle.loads(pickle.dumps(layer))
    return torch.equal(twin(X), layer(X)) and zeros(twin.weight + 0)


@row("1.6", "torch's names in a state dict: weight_orig, weight_mask")
def _names(way: Way) -> bool:
    return {"weight_orig", "weight_mask"} <= set(layer_of(way).state_dict())


@row("1.7", "a dense state loads into the masked layer")
def _dense_state(way: Way) -> bool:
    layer, dense = layer_of(way), nn.Linear(8, 8)
    layer.load_state_dict(dense.state_dict(), strict=False)
    return torch.equal((layer.weight + 0)[MASK], dense.weight[MASK]) and zeros(layer.weight + 0)


@row("1.8", "a loaded state is in force at once, in place and assigned (1.9)")
def _loaded(way: Way) -> bool:
    layer, other = layer_of(way), layer_of(way)
    layer.load_state_dict(copy.deepcopy(other.state_dict()))
    found = torch.equal(layer.weight + 0, other.weight + 0)
    layer, other = layer_of(way), layer_of(way)
    layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    return found and torch.equal(layer.weight + 0, other.weight + 0) and zeros(layer.weight + 0)


@row("1.10", "another dtype reaches the weight")
def _cast(way: Way) -> bool:
    layer = layer_of(way).double()
    return (layer.weight + 0).dtype is torch.float64 and zeros(layer.weight + 0)


@row("1.12", "requires_grad_(False) reaches the weight")
def _frozen(way: Way) -> bool:
    return not (layer_of(way).requires_grad_(False).weight + 0).requires_grad


@row("1.13", "a state dict of plain tensors, as safetensors stores them")
def _plain_state(way: Way) -> bool:
    layer = layer_of(way)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    twin = layer_of(way)
    twin.load_state_dict(kept)
    same = all(type(value) is Tensor for value in kept.values()) and torch.equal(twin.weight + 0, layer.weight + 0)
    return same and any("mask" in name for name in kept)


@row("2.1", "attention's out_proj, read without a call of its owner, trains")
def _attention(way: Way) -> bool:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    way.put(layer.out_proj, "weight", MASK)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = way.parameter(layer.out_proj, "weight").detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(X[None], X[None], X[None])[0].square().sum().backward()
        optimizer.step()
    return zeros(layer.out_proj.weight + 0) and not torch.equal(before, way.parameter(layer.out_proj, "weight"))


@row("2.5", "read directly after a step")
def _read(way: Way) -> bool:
    layer = layer_of(way)
    torch.optim.SGD([way.parameter(layer, "weight")], lr=1.0, weight_decay=0.5)
    with torch.no_grad():
        way.parameter(layer, "weight").add_(1)
    expected = way.parameter(layer, "weight").detach().as_subclass(Tensor) * MASK
    return torch.equal(functional.linear(X, layer.weight), functional.linear(X, expected))


@row("2.6", "recurrent layers compute with the mask, as loaded")
def _recurrent(way: Way) -> bool:
    layer, dense = nn.RNN(8, 8, batch_first=True), nn.RNN(8, 8, batch_first=True)
    way.put(layer, "weight_ih_l0", MASK)
    with torch.no_grad():
        way.parameter(layer, "weight_ih_l0").mul_(3)
        for name, value in dense.named_parameters():
            held = name == "weight_ih_l0"
            value.copy_(way.parameter(layer, name) * MASK if held else getattr(layer, name))
    return torch.allclose(layer(X)[0], dense(X)[0])


@row("2.7", "writes in place reach the parameter: methods, nn.init, out=")
def _written(way: Way) -> bool:
    layer = layer_of(way)
    with torch.no_grad():
        layer.weight.data.fill_(2)
        first = torch.equal(layer.weight + 0, 2.0 * MASK)
        nn.init.constant_(layer.weight, 3.0)
        second = torch.equal(layer.weight + 0, 3.0 * MASK)
        nn.init.eye_(layer.weight)
    return first and second and torch.equal(layer.weight + 0, torch.eye(8) * MASK)


@row("3.12", "a second backward through one forward")
def _twice(way: Way) -> bool:
    layer = layer_of(way)
    for _ in range(2):
        layer(X).sum().backward()
    value = way.parameter(layer, "weight")
    (gradient,) = torch.autograd.grad(layer(X).square().sum(), value, create_graph=True)
    return zeros(torch.autograd.grad(gradient.square().sum(), value)[0])


@row("3.13", "an embedding with sparse gradients")
def _sparse(way: Way) -> bool:
    layer = nn.Embedding(8, 8, sparse=True)
    way.put(layer, "weight", MASK)
    layer(torch.tensor([1, 2])).sum().backward()
    gradient = way.parameter(layer, "weight").grad
    return gradient is not None and not gradient.to_dense()[~MASK].any()


@row("3.15", "a subclass that uses other kernels beside its own")
def _subclassed(way: Way) -> bool:
    class Beside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, torch.ones_like(self.weight)) + super().forward(x)

    layer = layer_of(way, Beside)
    expected = X.sum(1, keepdim=True) + functional.linear(X, layer.weight + 0, layer.bias)
    return torch.allclose(layer(X), expected)


@row("3.16", "a class that keeps a registry of its subclasses hears of nothing")
def _registered(way: Way) -> bool:
    known: dict[str, type] = {}

    class Base(nn.Linear):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            known[cls.__name__] = cls

    class Mine(Base):
        pass

    layer_of(way, Mine)
    return known == {"Mine": Mine}


@row("3.16 (end)", "classes are freed with their models")
def _gone(way: Way) -> bool:
    def one() -> weakref.ref[Any]:
        return weakref.ref(type(layer_of(way, type("Local", (nn.Linear,), {}))))

    kinds = [one() for _ in range(3)]
    gc.collect()
    return alive(kinds) == 0


@row("3.17", "a parametrization of the bias is added and removed beside the mask")
def _parametrized(way: Way) -> bool:
    layer = layer_of(way)
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    layer(X)
    copy.deepcopy(layer)(X)
    way.off(layer, "weight")
    return zeros(layer.weight) and layer(X).shape == (2, 8)


@row("3.19", "a root parameter of a traced model: forward, copy")
def _traced_root(way: Way) -> bool:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight)

    model = torch.fx.symbolic_trace(Root())
    way.put(model, "weight", MASK)
    model(X).sum()
    return torch.equal(copy.deepcopy(model)(X), functional.linear(X, model.weight + 0))
