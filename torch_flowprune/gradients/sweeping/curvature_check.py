"""H·g held against the change of g along g: it shows operators that hide what their gradients depend on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torch_flowprune.gradients.batches import Derivatives, Resources, taken
from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.operators import twice_differentiable
from torch_flowprune.inputs import Batch, BatchDim, first, in_dtype, same_randomness, untouched, users_level, widened

_CHECKED = 2
_FROM = 16
"""Batches, from which on six passes over two samples are under a tenth of two sweeps."""
_STEPS = 1e-9, 1e-4
"""Of the norm of θ. In float64 the first leaves six digits, and few activations are so near to a kink as to cross it;
code that computes in float32 whatever it is given sees the other."""
_NARROW = (torch.float16, torch.bfloat16, torch.float32)
_WIDER: dict[Any, Callable[..., Any]] = dict.fromkeys((Tensor.half, Tensor.bfloat16, Tensor.float), Tensor.double)
_OFF = 0.05
_MARGIN = 3
"""How many times what the sides of a difference miss their middle by it may be off by."""


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
    part = _checked_part(batch, size, derivatives.weights.along)
    try:
        off, whole, worst = min(_differences(derivatives, names, g, part))
    except RuntimeError as error:
        if not asked:  # code that is fixed to a dtype
            return
        raise RuntimeError(f"check=True runs the model in float64, where it fails: {error}") from error
    if not off:
        return
    warnings.warn(
        f"H·g is not the change of g along g: off by {off / max(whole, off):.0%}, most in {', '.join(worst)}. An "
        "operator there or after it hides from autograd what its gradient depends on (a backward that reads detached "
        "tensors): use its plain form, or a measure that reads only g; check=False skips this check",
        UserWarning,
        stacklevel=users_level(),
    )


def _differences(
    derivatives: Derivatives, names: Sequence[str], g: Sequence[Tensor], part: tuple[Batch, int]
) -> Iterator[tuple[float, float, list[str]]]:
    """By how much H·g is off, of how much, and where most: by each step until it is not, which ends with a 0.

    A small step crosses few kinks, a large one is seen by code that rounds.
    """
    for step in _STEPS:
        found, expected, error = _both(derivatives, g, *part, step)
        differences = [float((h - d).norm()) for h, d in zip(found, expected, strict=True)]
        off, whole = sum(d * d for d in differences) ** 0.5, _norm(expected)
        right = off <= _OFF * whole + error
        yield 0.0 if right else off, whole, [n for _, n in sorted(zip(differences, names, strict=True))[:-4:-1]]
        if right:
            return


def _checked_part(batch: Batch, size: int, along: BatchDim) -> tuple[Batch, int]:
    count = min(size, _CHECKED)
    try:
        few = first(batch, size, count, along)
    except ValueError:  # one that cannot be cut
        few, count = batch, size
    return in_dtype(few, torch.float64, *_NARROW), count


def _both(
    derivatives: Derivatives, g: Sequence[Tensor], batch: Batch, size: int, share: float
) -> tuple[list[Tensor], list[Tensor], float]:
    """H·g by autograd and by a central difference, and what rounding, and kinks between, make of the latter.

    Of code that computes in fewer digits whatever it is given, that is nearly all of it: the mean of the two sides
    misses the gradient between them by as much.
    """
    model = derivatives.model
    with untouched(model, mode=derivatives.mode) as rewind, widened(model, torch.float64, *_NARROW), _NoNarrowing():
        same = Derivatives(
            model, derivatives.parameters, derivatives.objective, derivatives.mode, Resources(), derivatives.weights
        )
        along = [value.to(p.device, torch.float64) for value, p in zip(g, same.parameters, strict=True)]
        step = share * _norm(same.parameters) / max(_norm(along), 1e-300)
        found, sides, padding = _product(same, batch, size, along), [], list[Tensor]()
        rewind()
        with _Padding(padding, again=False):
            middle = _gradient(same, batch, size)
        for sign in (1, -1):
            rewind()
            with _moved(same, along, sign * step), _Padding(padding, again=True):
                sides.append(_gradient(same, batch, size))
        ahead, behind = sides
        expected = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
        missed = _norm([a + b - 2 * m for a, b, m in zip(ahead, behind, middle, strict=True)])
        return found, expected, (1e-13 * _norm(ahead) + _MARGIN * missed / 2) / step


def _gradient(derivatives: Derivatives, batch: Batch, size: int) -> list[Tensor]:
    """As the model's own operators have it: what takes their place for H·g is held against them too.

    In train mode it is through those, for kernels draw dropout in ways of their own.
    """
    own = nullcontext() if derivatives.mode == "eval" else twice_differentiable()
    with same_randomness(derivatives.model), own:
        return taken(derivatives.gradient(derivatives.loss(batch, size)), derivatives.parameters)


def _product(derivatives: Derivatives, batch: Batch, size: int, along: Sequence[Tensor]) -> list[Tensor]:
    """H times a vector, by all operators that a sweep may put in place."""
    with same_randomness(derivatives.model), twice_differentiable(values_read=False):
        grads = derivatives.gradient(derivatives.loss(batch, size), create_graph=True)
        return taken(derivatives.product(grads, along), derivatives.parameters)


class _NoNarrowing(TorchFunctionMode):
    """Inside, code that asks for fewer digits than float64, as norms and softmax of language models do, gets those."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = [torch.float64 if any(value is narrow for narrow in _NARROW) else value for value in args]
        words = {
            word: torch.float64 if any(value is narrow for narrow in _NARROW) else value
            for word, value in (kwargs or {}).items()
        }
        return _WIDER.get(func, func)(*wide, **words)


class _Padding(TorchFunctionMode):
    """Notes the row of ``padding_idx`` at each lookup, or gives those that were noted: autograd has it for a constant.

    In a table that is the output's weight too it is one of the parameters that move, so that g as a function of them
    would change by more than H·g, the derivative of the loss in which it stands still, can tell.
    """

    def __init__(self, noted: list[Tensor], *, again: bool) -> None:
        super().__init__()
        self.noted, self.again = noted, iter(noted) if again else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        place = _padding_read(*args, **(kwargs or {})) if func is functional.embedding else None
        if place is None:
            return result
        here, row = place
        if self.again is None:
            self.noted.append(row)
            return result
        return torch.where(here, next(self.again, row), result)


def _padding_read(
    ids: Tensor, table: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor] | None:
    """Of a lookup, where it reads the row of padding, and that row; None where there is none."""
    if padding_idx is None:
        return None
    row = padding_idx % len(table)  # it may be told from the end
    return (ids == row).unsqueeze(-1), table[row].detach()


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
