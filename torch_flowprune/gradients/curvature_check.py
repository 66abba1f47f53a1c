"""H·g held against the change of g along g: it shows operators that hide what their gradients depend on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torch_flowprune.gradients.batch_derivatives import Derivatives, Grads
from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.memory_budget import Resources
from torch_flowprune.gradients.operators import twice_differentiable
from torch_flowprune.gradients.weighted_sums import taken
from torch_flowprune.inputs import Batch, first, in_dtype, same_randomness, untouched, widened

_CHECKED = 2
_FROM = 16
"""Batches, from which on five passes over two samples are under a tenth of two sweeps."""
_STEP = 1e-9
"""Of the norm of θ. In float64 it leaves six digits, and few activations are so near to a kink as to cross it."""
_NARROW = (torch.float16, torch.bfloat16, torch.float32)
_OFF = 0.05


def check_is_due(source: FlowSource, batches: int, *, alone: bool) -> bool:
    """Where it was asked for; else where it costs little, in time and in the memory of a model in float64."""
    if source.check is not None:
        return source.check
    free = source.max_memory is None and not source.offload and source.autocast is None
    return free and alone and batches >= _FROM


def check_curvature(
    derivatives: Derivatives, names: Sequence[str], g: Sequence[Tensor], batch: Batch, size: int, *, asked: bool | None
) -> None:
    """A warning that names the layers whose H·g is not the derivative of g, by samples of one batch in float64."""
    try:
        found, expected, error = _both(derivatives, g, *_checked_part(batch, size))
    except RuntimeError as error_:
        if not asked:  # code that is fixed to a dtype
            return
        raise RuntimeError(f"check=True runs the model in float64, and it does not: {error_}") from error_
    differences = [float((h - d).norm()) for h, d in zip(found, expected, strict=True)]
    whole = float(torch.stack([d.norm() for d in expected]).norm())
    off = sum(d * d for d in differences) ** 0.5
    if off <= _OFF * whole + error:
        return
    worst = sorted(zip(differences, names, strict=True), reverse=True)[:3]
    warnings.warn(
        f"H·g is not how g changes along g: off by {off / max(whole, off):.0%}, most in "
        f"{', '.join(name for _, name in worst)}. An operator there or behind hides from autograd what its gradient "
        "depends on (a backward that reads detached tensors): use its plain form, or a measure of g alone; check=False "
        "leaves this out",
        UserWarning,
        stacklevel=7,
    )


def _checked_part(batch: Batch, size: int) -> tuple[Batch, int]:
    count = min(size, _CHECKED)
    try:
        few = first(batch, size, count)
    except ValueError:  # one that cannot be cut
        few, count = batch, size
    return in_dtype(few, torch.float64, *_NARROW), count


def _both(
    derivatives: Derivatives, g: Sequence[Tensor], batch: Batch, size: int
) -> tuple[list[Tensor], list[Tensor], float]:
    """H·g by autograd and by a central difference, and what rounding makes of the latter."""
    model = derivatives.model
    with untouched(model, mode=derivatives.mode) as rewind, widened(model, torch.float64, *_NARROW):
        same = Derivatives(
            model, derivatives.parameters, derivatives.objective, derivatives.mode, Resources(), derivatives.weights
        )
        along = [value.to(p.device, torch.float64) for value, p in zip(g, same.parameters, strict=True)]
        step = _STEP * _norm(same.parameters) / max(_norm(along), 1e-300)
        found = _gradient(same, batch, size, along)
        sides = []
        for sign in (1, -1):
            rewind()
            with _moved(same, along, sign * step):
                sides.append(_gradient(same, batch, size))
        ahead, behind = sides
        expected = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
        return found, expected, 1e-13 * _norm(ahead) / step


def _gradient(derivatives: Derivatives, batch: Batch, size: int, along: Sequence[Tensor] | None = None) -> list[Tensor]:
    """That of the loss, or H times a vector."""
    with same_randomness(derivatives.model), twice_differentiable():
        loss = derivatives.loss(batch, size)
        grads: Grads = derivatives.gradient(loss, create_graph=along is not None)
        return taken(grads if along is None else derivatives.product(grads, along), derivatives.parameters)


@contextmanager
def _moved(derivatives: Derivatives, along: Sequence[Tensor], step: float) -> Iterator[None]:
    kept = [parameter.data for parameter in derivatives.parameters]
    try:
        for parameter, direction in zip(derivatives.parameters, along, strict=True):
            parameter.data = parameter.data + step * direction
        yield
    finally:
        for parameter, value in zip(derivatives.parameters, kept, strict=True):
            parameter.data = value


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.detach().norm().cpu() for tensor in tensors]).norm())
