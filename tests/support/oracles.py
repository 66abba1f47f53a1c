"""Answers by the simplest means: the whole Hessian, loops over single numbers, one stable sort.

Too simple to be wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Dense:
    """The loss, its gradient by name, and its Hessian as one matrix in the order of the names."""

    loss: float
    g: dict[str, Tensor]
    H: Tensor

    @property
    def Hg(self) -> dict[str, Tensor]:
        return unflatten(self.H @ flatten(self.g), self.g)


def flatten(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def unflatten(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for part, (name, value) in zip(parts, like.items(), strict=True)}


def mean_loss(
    model: nn.Module, batches: Sequence[Batch], loss: Loss = F.cross_entropy
) -> Callable[[dict[str, Tensor]], Tensor]:
    """The sample-weighted mean loss as a function of the parameters by name.

    On a copy, so that batch norm may count.
    """
    model = _twice_differentiable(copy.deepcopy(model))

    def value(parameters: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            terms = [len(y) * loss(functional_call(model, parameters, (x,)), y) for x, y in batches]
        return sum(terms) / sum(len(y) for _, y in batches)

    return value


class _PlainHardsigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6


def _twice_differentiable(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(module, name, _PlainHardsigmoid())
    return model


def trainable(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    return {
        name: p.detach()
        for name, p in model.named_parameters()
        if (p.requires_grad if names is None else name in names)
    }


def dense(
    model: nn.Module, batches: Sequence[Batch], loss: Loss = F.cross_entropy, names: Sequence[str] | None = None
) -> Dense:
    value, theta = mean_loss(model, batches, loss), trainable(model, names)

    def of_vector(vector: Tensor) -> Tensor:
        return value(unflatten(vector, theta))

    vector = flatten(theta).requires_grad_()
    total = of_vector(vector)
    (gradient,) = torch.autograd.grad(total, vector)
    return Dense(
        total.item(), unflatten(gradient, theta), torch.autograd.functional.hessian(of_vector, vector.detach())
    )


def squared_gradients(model: nn.Module, batches: Sequence[Batch], loss: Loss = F.cross_entropy) -> dict[str, Tensor]:
    """The sample-weighted mean over batches of the squared batch gradients.

    Over samples, if the batches hold one each.
    """
    total: dict[str, Tensor] = {}
    for batch in batches:
        for name, gradient in gradients(model, [batch], loss).items():
            total[name] = total.get(name, 0) + len(batch[1]) * gradient**2
    return {name: value / sum(len(y) for _, y in batches) for name, value in total.items()}


def gradients(model: nn.Module, batches: Sequence[Batch], loss: Loss = F.cross_entropy) -> dict[str, Tensor]:
    theta = {name: value.clone().requires_grad_() for name, value in trainable(model).items()}
    return dict(
        zip(theta, torch.autograd.grad(mean_loss(model, batches, loss)(theta), list(theta.values())), strict=True)
    )


def assert_named_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equal names, shapes and values, to a relative error of the largest value over all."""
    assert list(found) == list(expected)
    scale = max(value.abs().max().item() for value in expected.values())
    assert scale > 0, "the oracle is zero everywhere: the test would show nothing"
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = (found[name] - value).abs().max().item() / scale
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def synflow(model: nn.Module, shape: Sequence[int], integer: bool = False) -> dict[str, Tensor]:
    """|θ ∂R/∂θ| as published: on a copy whose whole state is replaced by its absolute value, on one input of ones."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.abs_()
    model.zero_grad()
    model(torch.ones(1, *shape, dtype=torch.int64 if integer else torch.float64)).sum().backward()
    return {name: (p * p.grad).abs().detach() for name, p in model.named_parameters()}


def lowest(
    scores: Sequence[Tensor], k: int, alive: Sequence[Tensor] | None = None, floors: Sequence[int] | None = None
) -> list[Tensor]:
    """Which stay when k go: one stable sort of Python numbers, the protected and the dead left out."""
    alive = [torch.ones(len(s), dtype=torch.bool) for s in scores] if alive is None else list(alive)
    candidates = []
    for layer, (values, left) in enumerate(zip(scores, alive, strict=True)):
        own = sorted((value, i) for i, value in enumerate(values.double().tolist()) if left[i])
        protected = floors[layer] if floors else 0
        candidates += [(value, layer, i) for value, i in own[: max(0, len(own) - protected)]]
    candidates.sort()
    keeps = [left.clone() for left in alive]
    for _, layer, i in candidates[:k]:
        keeps[layer][i] = False
    return keeps


# The paper code's filter scores, written out filter by filter and weight by weight.


def _filters(tensor: Tensor) -> list[list[float]]:
    return tensor.double().flatten(1).tolist()


def _by_filter(formula: Callable[..., float], *tensors: Tensor) -> Tensor:
    return torch.tensor([formula(*rows) for rows in zip(*map(_filters, tensors), strict=True)], dtype=torch.float64)


PAPER: dict[str, Callable[..., Tensor]] = {
    "magnitude": lambda theta: _by_filter(lambda t: sum(x * x for x in t) ** 0.5, theta),
    "l1": lambda theta: _by_filter(lambda t: sum(abs(x) for x in t), theta),
    "loss_preservation": lambda theta, g: _by_filter(
        lambda t, d: sum(abs(x * y) for x, y in zip(t, d, strict=True)), theta, g
    ),
    "taylor": lambda theta, g: _by_filter(lambda t, d: abs(sum(x * y for x, y in zip(t, d, strict=True))), theta, g),
    "biased_loss_preservation": lambda theta, g: _by_filter(
        lambda t, d: sum(abs(x * x * y) for x, y in zip(t, d, strict=True)), theta, g
    ),
    "distance_biased_loss_preservation": lambda theta, theta0, g: _by_filter(
        lambda t, s, d: sum(abs(x - z) * abs(x * y) for x, z, y in zip(t, s, d, strict=True)), theta, theta0, g
    ),
    "gradient_norm_increase": lambda theta, Hg: _by_filter(
        lambda t, h: sum(x * y for x, y in zip(t, h, strict=True)), theta, Hg
    ),
    "gradient_norm_preservation": lambda theta, Hg: _by_filter(
        lambda t, h: abs(sum(x * y for x, y in zip(t, h, strict=True))), theta, Hg
    ),
    "fisher": lambda theta, g2: _by_filter(lambda t, q: sum(x * x * y for x, y in zip(t, q, strict=True)), theta, g2),
    "fisher_sample": lambda theta, g2_sample: _by_filter(
        lambda t, q: sum(x * x * y for x, y in zip(t, q, strict=True)), theta, g2_sample
    ),
    "wanda": lambda theta, x2: _by_filter(
        lambda t, q: sum(abs(x) * y**0.5 for x, y in zip(t, q, strict=True)), theta, x2
    ),
    "reconstruction": lambda theta, x2: _by_filter(
        lambda t, q: sum(x * x * y for x, y in zip(t, q, strict=True)), theta, x2
    ),
    "obd": lambda theta, diagH: _by_filter(
        lambda t, q: sum(x * x * y / 2 for x, y in zip(t, q, strict=True)), theta, diagH
    ),
    "synflow": lambda theta, gR: _by_filter(lambda t, d: sum(abs(x * y) for x, y in zip(t, d, strict=True)), theta, gR),
}
