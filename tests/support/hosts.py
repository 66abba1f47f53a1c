"""What the host tests share: small models, and one oracle for "the mask is in force"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of


def mlp() -> nn.Sequential:
    """Two prunable layers of 64 and 32 weights."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def pruned(model: nn.Module | None = None, sparsity: float = 0.5, **options: Any) -> Any:
    """The model (an ``mlp`` if left out), pruned by magnitude."""
    model = mlp() if model is None else model
    fp.global_prune(model, "magnitude", sparsity, **options)
    return model


def train(
    model: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer | None = None, steps: int = 2
) -> torch.optim.Optimizer:
    """A few steps on the mean square of the output; returns the optimizer."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        output(model, inputs).square().mean().backward()
        optimizer.step()
    return optimizer


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's first output, whatever it returns."""
    found = model(inputs)
    return found[0] if isinstance(found, tuple) else found


@contextmanager
def poison(model: nn.Module) -> Iterator[None]:
    """Inside, every pruned entry of a ``weight_orig`` is nan.

    Whoever reads it instead of the masked weight computes nan.
    """
    kept = [
        (target.parameter, target.parameter.detach().clone(), target.mask == 0)
        for target in parameters_of(model).values()
        if target.mask is not None
    ]
    assert kept, "nothing is pruned"
    with torch.no_grad():
        for parameter, _, gone in kept:
            parameter[gone] = torch.nan
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values, _ in kept:
                parameter.copy_(values)


def assert_in_force(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """What lies under the masks reaches neither the output nor any gradient, however ``run`` reads the weights."""
    expected = run().detach()
    with poison(model):
        found = run()
        assert torch.equal(found, expected)
        model.zero_grad()
        found.square().sum().backward()
    for target in parameters_of(model).values():
        if target.parameter.grad is not None:
            assert target.parameter.grad.isfinite().all(), target.name
            if target.mask is not None:
                assert not target.parameter.grad[target.mask == 0].any(), target.name
    model.zero_grad()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that pruning could touch, comparable with ``==``.

    Classes, hooks, and every entry with its identity and bytes, in order.
    """
    return {
        path: (
            type(module),
            tuple(module.__dict__),
            tuple(
                (key, hook, getattr(hook, "_pruning_methods", None)) for key, hook in module._forward_pre_hooks.items()
            ),
            tuple(
                (key, id(value), _bytes(value))
                for entries in (module._parameters, module._buffers)
                for key, value in entries.items()
            ),
        )
        for path, module in model.named_modules()
    }


def _bytes(value: Tensor | None) -> bytes | None:
    return (
        None
        if value is None or value.is_meta
        else value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if value.numel()
        else b""
    )


def masked_names(model: nn.Module) -> set[str]:
    """The names of the pruned parameters."""
    return {name for name, target in parameters_of(model).items() if target.mask is not None}


def hooks_of(module: nn.Module) -> list[Any]:
    """The module's pruning hooks."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
