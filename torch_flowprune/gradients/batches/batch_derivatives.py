"""The derivatives of the loss on one batch: gradient, and its own derivative along a vector."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.batches.checkpointing import no_reentrant_checkpoints
from torch_flowprune.gradients.batches.loss_weights import LossWeights
from torch_flowprune.gradients.batches.memory_budget import Resources
from torch_flowprune.gradients.batches.other_mode import other_mode_told
from torch_flowprune.gradients.operators import check_twice, no_lost_graph, sound_norms
from torch_flowprune.inputs import Batch, Objective, settle, users_level
from torch_flowprune.torch_internals import differentiate

Grads: TypeAlias = "list[Tensor | None]"
Take: TypeAlias = "Callable[[Sequence[Tensor | None]], Grads]"


class Derivatives:
    """Of one model and objective, with respect to ``parameters``.

    One entry a parameter, None where the loss does not reach.
    """

    runs_alone = True  # each rank by itself: it may try things on the model that the others do not

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        objective: Objective,
        mode: str,
        resources: Resources,
        weights: LossWeights,
    ) -> None:
        self.model, self.parameters, self.objective, self.mode, self.resources = (
            model,
            list(parameters),
            objective,
            mode,
            resources,
        )
        self.weights = weights
        self.reached = [False] * len(self.parameters)

    def loss(self, batch: Batch, size: int) -> Tensor:
        settle(self.model, self.mode)
        told = other_mode_told(self.model, self.objective, batch, self.mode, alone=self.runs_alone)
        with told, self.cast(), sound_norms(self.parameters[0].device):
            return self.weights.mean(self.objective(self.model, batch), size)

    def weight(self, batch: Batch, size: int) -> float:
        """What this batch counts for in a mean."""
        with self.cast():
            return self.weights(batch, size)

    def cast(self) -> AbstractContextManager[Any]:
        """The forward in the dtype asked for; the parameters and their gradients keep theirs."""
        dtype = self.resources.autocast
        return nullcontext() if dtype is None else torch.autocast(self.parameters[0].device.type, dtype)

    def digits(self) -> torch.dtype:
        """The dtype of fewest digits that a loss goes through."""
        dtypes = (parameter.dtype for parameter in self.parameters)
        return self.resources.autocast or max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def gradient(
        self,
        loss: Tensor,
        *,
        create_graph: bool = False,
        among: Collection[int] | None = None,
        besides: Tensor | None = None,
    ) -> Grads:
        """That of the loss; of ``among`` alone, where they are given by number.

        ``besides`` is what the loss depends on in a way that has to be walked all the same.
        """
        numbers = range(len(self.parameters)) if among is None else sorted(among)
        wanted = [self.parameters[number] for number in numbers]
        watched = no_lost_graph(loss) if create_graph else nullcontext()
        with self._taken(enabled=not create_graph) as take, no_reentrant_checkpoints(), watched:
            ones = [torch.ones_like(loss)]
            every = wanted if besides is None else [*wanted, besides]
            found = dict(zip(numbers, differentiate([loss], every, ones, create_graph=create_graph), strict=False))
            grads = take([found.get(number) for number in range(len(self.parameters))])
        self.reached = [seen or grad is not None for seen, grad in zip(self.reached, grads, strict=True)]
        return grads

    def product(self, grads: Grads, along: Sequence[Tensor], *, retain_graph: bool = False) -> Grads:
        """(∂g/∂θ)ᵀ v, which is H·v since H is symmetric."""
        pairs = [
            (grad, v.to(grad.device, grad.dtype))
            for grad, v in zip(grads, along, strict=True)
            if grad is not None and grad.requires_grad
        ]
        if not pairs:
            return [None] * len(grads)
        outputs, vectors = zip(*pairs, strict=True)
        try:
            check_twice(outputs)
            with self._taken(enabled=True) as take:
                return take(differentiate(outputs, self.parameters, vectors, retain_graph=retain_graph))
        except RuntimeError as error:
            if not any(text in str(error) for text in ("derivative for", "double backward", "once_differentiable")):
                raise
            way_out = (
                "H·g needs second derivatives, and an operator of this model has none: use a measure that reads only g"
            )
            raise RuntimeError(f"{way_out} (torch says: {error})") from error

    @contextmanager
    def _taken(self, *, enabled: bool) -> Iterator[Take]:
        """Where sums are kept on the host.

        Each gradient moves there as it comes, and an empty one takes its place on the device.
        """
        taken: dict[int, Tensor] = {}

        def mover(index: int) -> Callable[[Tensor | None], Tensor | None]:
            def move(grad: Tensor | None) -> Tensor | None:
                if grad is None:  # of a second derivative that is 0
                    return None
                taken[index] = grad.to("cpu", copy=True)
                return grad.new_zeros(()).expand_as(grad)

            return move

        active = enabled and self.resources.offload
        hooks = (
            [parameter.register_hook(mover(index)) for index, parameter in enumerate(self.parameters)] if active else []
        )
        try:
            yield lambda grads: [None if grad is None else taken.get(index, grad) for index, grad in enumerate(grads)]
        finally:
            for hook in hooks:
                hook.remove()

    def warn_unreached(self, names: Sequence[str]) -> None:
        missed = [name for name, seen in zip(names, self.reached, strict=True) if not seen]
        if missed:
            listed = ", ".join(missed[:5]) + (f" and {len(missed) - 5} more" if len(missed) > 5 else "")
            warnings.warn(
                f"the loss does not reach {listed}: their gradient counts as 0", UserWarning, stacklevel=users_level()
            )
