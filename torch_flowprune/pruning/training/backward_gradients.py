"""The flow at one minibatch, with g read from ``.grad``, where the training's backward left it."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_flowprune.gradients import Flow
from torch_flowprune.inputs import local, wide
from torch_flowprune.scoring import Candidates, ranks_of, targets_of
from torch_flowprune.torch_internals import version_of

_FEW_HELD = 4
"""How many gradients are held, the smallest, so that their addresses tell them apart from later ones."""


class BackwardGradients:
    """Reads gradients once each: those of a model that trains no more stay as they are, and would be read for ever."""

    def __init__(self) -> None:
        self._last: list[tuple[int, int]] = []
        self._held: list[Tensor] = []

    def __reduce__(self) -> tuple[type[BackwardGradients], tuple[()]]:
        """Addresses tell nothing of a copy's gradients."""
        return BackwardGradients, ()

    def read(self, point: Flow, found: Candidates, *, squares: bool) -> Flow:
        """The flow with g, and with their squares where these are read; zeros where a layer was not used in the batch.

        Raises:
            ValueError: where there is no gradient at all, and where all are those that were read last.
        """
        parameters = {name: target.parameter for name, target in targets_of(found).items()}
        given = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        if not given:
            raise ValueError(
                f".grad of {', '.join(list(parameters)[:5])} is None: call track() after loss.backward() and before "
                "zero_grad()"
            )
        self._remember(given)
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
            for name, parameter in parameters.items()
        }
        g = {name: wide(gradient) for name, gradient in gradients.items()}
        g2 = {name: value.square() for name, value in g.items()} if squares else None
        return Flow(theta=point.theta, theta0=point.theta0, g=g, g2=g2)

    def _remember(self, gradients: list[Tensor]) -> None:
        now = [(id(gradient), version_of(gradient)) for gradient in gradients]
        if now == self._last:
            raise ValueError(
                "every .grad is the one that was tracked last: call track() once after each loss.backward(); if you "
                "train a model that shrink returned, pass the pruner to shrink too: shrink(..., pruner=)"
            )
        self._last, self._held = now, sorted(gradients, key=Tensor.numel)[:_FEW_HELD]


def overflown(found: Candidates) -> bool:
    """Whether some gradient is not finite, on any rank; asked of the devices once."""
    grads = [local(target.parameter.grad) for target in targets_of(found).values() if target.parameter.grad is not None]
    return bool(ranks_of(found).add_up([int(_overflown(grads))])[0])


def _overflown(grads: list[Tensor]) -> bool:
    # a sum is not finite where one of its terms is not, and takes a fifth of the time; one that overflows tells nothing
    if not grads or _are_finite_numbers([grad.sum() for grad in grads]):
        return False
    # 0 times what is not finite is nan
    return not _are_finite_numbers([grad.mul(0).sum() for grad in grads])


def _are_finite_numbers(numbers: list[Tensor]) -> bool:
    return bool(torch.stack([number.to(numbers[0].device) for number in numbers]).isfinite().all())
