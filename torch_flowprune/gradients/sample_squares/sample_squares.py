"""Squares of sample gradients in one pass over a batch: where that is seen to be what a pass a sample gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.gradients.batches import Derivatives, Grads, add_weighted_squares, parts_that_run, zero_sums
from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.sample_squares.squared_sums import SquaredSums
from torch_flowprune.gradients.sample_squares.tapped_operators import INNER
from torch_flowprune.gradients.sample_squares.taps import Taps
from torch_flowprune.inputs import Batch, Target, first, same_randomness, samples, tensors_in

_PROBED = 2
_DIGITS = {torch.float32: 1e-4, torch.float64: 1e-9}
"""How far the squares of a probe may be from those of passes, in each dtype that they are taken in at once."""


@dataclass(frozen=True)
class _Passed:
    """One pass over a batch: its loss, its gradient where that was wanted, and the axes of what was met once."""

    loss: Tensor
    gradient: Grads
    axes: dict[int, int | None]


class SampleSquares:
    """Of one sweep: on the first batch a probe finds the parameters whose squares one pass gives.

    What it does not give (a parameter that is used twice, or by an operator that is not known) takes a pass a sample,
    for itself alone.

    Args:
        targets: the parameters of the derivatives, with their masks.
        source: where batches are cut to fit, or sums kept on the host, every sample takes its pass.
    """

    def __init__(self, derivatives: Derivatives, targets: Iterable[Target], source: FlowSource) -> None:
        self.derivatives, self.batch_dim = derivatives, source.batch_dim
        masks = {number: target.mask for number, target in enumerate(targets) if target.mask is not None}
        self.masks = {} if source.under_masks else masks
        at_once = source.max_memory is None and not source.offload and derivatives.runs_alone
        self.parameters: Sequence[Tensor] = derivatives.parameters
        self.tolerance = max((_DIGITS.get(one.dtype, -1.0) for one in self.parameters), default=-1.0)
        plain = all(one.dtype is self.parameters[0].dtype in _DIGITS for one in self.parameters)
        self.at_once = at_once and plain and derivatives.resources.autocast is None
        self._found = dict[Any, dict[int, int | None]]()

    def add(self, total: list[Tensor], batch: Batch, size: int) -> list[Tensor]:
        """Each sample's squared gradient, times its weight; the weighted losses of the samples, where each is run."""
        if self.with_gradient(total, batch, size, wanted=False) is None:
            return self._in_passes(total, batch, size, set(range(len(self.parameters))))
        return []

    def with_gradient(
        self, total: list[Tensor], batch: Batch, size: int, *, wanted: bool = True
    ) -> tuple[Tensor, Grads] | None:
        """As :meth:`add`, and the loss of the batch with, where it is wanted, its gradient, of the same pass.

        None, and nothing done, where no squares can be had in one pass.
        """
        axes = self._axes(batch, size) if self.at_once and size > _PROBED else {}
        weights = (
            [self.derivatives.weight(sample, 1) for sample in samples(batch, size, self.batch_dim)] if axes else []
        )
        passed = self._in_one_pass(total, batch, size, weights, axes, gradient=wanted) if any(weights) else None
        if passed is None:
            return None
        with same_randomness(self.derivatives.model):
            self._in_passes(total, batch, size, set(range(len(self.parameters))) - set(axes))
        return passed.loss, passed.gradient

    def _axes(self, batch: Batch, size: int) -> dict[int, int | None]:
        """Of each parameter whose squares one pass gives, the axis that samples lie along where it is used."""
        kind = tuple((tensor.dim(), tensor.dtype) for tensor in tensors_in(batch))
        if kind not in self._found:
            try:
                few = first(batch, size, _PROBED, self.batch_dim)
                self._found[kind] = self._probe(few)
            except (RuntimeError, ValueError, TypeError, IndexError):
                self._found[kind] = {}
        return self._found[kind]

    def _probe(self, batch: Batch) -> dict[int, int | None]:
        every, expected = set(range(len(self.parameters))), self._zeros()
        weights = self._weights(batch, _PROBED)
        if not all(weights):
            return {}
        with same_randomness(self.derivatives.model):
            self._in_passes(expected, batch, _PROBED, every)
        met = self._tried(expected, batch, weights, dict.fromkeys(every), probing=True)
        right = {number: axis for number, (axis, close) in met.items() if close}
        others: dict[int, int | None] = {
            number: INNER for number, (axis, _) in met.items() if axis == 0 and number not in right
        }
        again = self._tried(expected, batch, weights, others) if others else {}
        return right | {number: axis for number, (axis, close) in again.items() if close}

    def _tried(
        self, expected: Sequence[Tensor], batch: Batch, weights: Sequence[float], axes: dict[int, int | None],
        *, probing: bool = False,
    ) -> dict[int, tuple[int | None, bool]]:  # fmt: skip
        """Of the parameters met once, the axis, and whether their squares are the expected ones."""
        found = self._zeros()
        with same_randomness(self.derivatives.model):
            passed = self._in_one_pass(found, batch, _PROBED, weights, axes, probing=probing)
        sizes = [float(one.square().mean().sqrt()) if one.numel() else 0.0 for one in expected]
        noise = (10 * torch.finfo(self.parameters[0].dtype).eps) ** 2 * max(sizes)  # of gradients that are rounding
        errors = [float((a - b).square().mean().sqrt()) for a, b in zip(found, expected, strict=True)]
        close = [error <= self.tolerance * scale + noise for error, scale in zip(errors, sizes, strict=True)]
        return {number: (axis, close[number]) for number, axis in (passed.axes if passed else {}).items()}

    def _in_one_pass(
        self, total: list[Tensor], batch: Batch, size: int, weights: Sequence[float],
        axes: dict[int, int | None], *, probing: bool = False, gradient: bool = False,
    ) -> _Passed | None:  # fmt: skip
        """The gradient of the batch's loss has those of all samples in it, each by its share of the weight.

        None, and nothing done, where this batch goes another way through the model than the first.
        """
        whole = self.derivatives.weight(batch, size)
        factors = [whole**2 / weight if weight else 0.0 for weight in weights]
        sums = SquaredSums(total, factors, self.masks)
        frozen = nullcontext() if gradient else self._frozen()
        leading = [number for number in self.masks if number not in axes]  # they are not frozen: walk to them, too
        with frozen, Taps(self.parameters, set(axes), sums, None if probing else axes) as taps:
            loss = self.derivatives.loss(batch, size)
            once = {number: taps.axes[number] for number, count in taps.uses.items() if count == 1}
            if not probing and (taps.strange or len(once) != len(axes)):
                return None
            grads = self.derivatives.gradient(loss, besides=taps.anchor, among=None if gradient else leading)
        self.derivatives.reached = [seen or i in taps.told for i, seen in enumerate(self.derivatives.reached)]
        return _Passed(loss.detach(), grads, once)

    def _in_passes(self, total: list[Tensor], batch: Batch, size: int, numbers: set[int]) -> list[Tensor]:
        """A pass a sample, for these parameters alone; the weighted losses of the samples."""
        if not numbers:
            return []
        losses, into = [], [total[number] for number in sorted(numbers)]
        for sample in samples(batch, size, self.batch_dim):
            if weight := self.derivatives.weight(sample, 1):
                with parts_that_run() if size > 1 else nullcontext():
                    loss = self.derivatives.loss(sample, 1)
                gradients = self.derivatives.gradient(loss, among=numbers)
                add_weighted_squares(into, [gradients[number] for number in sorted(numbers)], weight)
                losses.append(loss.detach().double() * weight)
        return losses

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No gradients of parameters are prepared. A masked weight has to lead to its parameter."""
        frozen = [parameter for number, parameter in enumerate(self.parameters) if number not in self.masks]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _weights(self, batch: Batch, size: int) -> list[float]:
        """Of each sample."""
        return [self.derivatives.weight(sample, 1) for sample in samples(batch, size, self.batch_dim)]

    def _zeros(self) -> list[Tensor]:
        return zero_sums(self.parameters, on_host=False)
