"""Batches in parts that fit into a budget of memory, and the graphs that can be kept in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch

from torch_flowprune.gradients.batches.batch_derivatives import Derivatives, Grads
from torch_flowprune.gradients.batches.loss_of_parts import difference_of_halves
from torch_flowprune.gradients.batches.memory_budget import Cost, bounded, measured, readable
from torch_flowprune.gradients.batches.parts_that_run import parts_that_run
from torch_flowprune.gradients.operators import twice_differentiable
from torch_flowprune.inputs import Batch, first, parts, shapes, spread_out, untouched, wide_type
from torch_flowprune.torch_internals import AnyBatchNorm

Part: TypeAlias = "tuple[Batch, int]"


class MicroBatches:
    """Batches cut so that the sums of a sweep and what one part takes stay below ``max_memory``; whole without one.

    What a part takes is linear in its samples: at most so many times what one sample takes, which one run tells, and
    may do; where it does not, one sample and two are measured, from then on for every shape.
    ``held`` says how many tensors a parameter a sweep holds, where it is not one for each derivative wanted.
    """

    def __init__(self, derivatives: Derivatives, wanted: set[str], held: int | None = None) -> None:
        self.along = derivatives.weights.along
        self.derivatives, self.second = derivatives, "Hg" in wanted
        self.limit, self.costs = derivatives.resources.max_memory, dict[Any, tuple[Cost, Cost]]()
        self.exact, self._few = False, dict[Any, Part]()
        each = sum(wide_type(parameter).itemsize * parameter.numel() for parameter in derivatives.parameters)
        kinds = len(wanted & {"g", "g2", "g2_sample", "Hg"}) if held is None else held
        # besides, a batch's own gradient, summed over its parts
        self.sums = 0 if derivatives.resources.offload else (kinds + 1) * each
        if self.limit is not None and (norm := _norm_over_batch(derivatives.model)):
            raise ValueError(
                f"max_memory= cuts batches, and {norm!r} takes its statistics over a whole one (mode='train', or none "
                "kept): leave one of them out"
            )

    def of(self, batch: Batch, size: int) -> list[Part]:
        """The batch's parts with their sizes."""
        if self.limit is None:
            return self._counting([(batch, size)])
        peak, _ = self.cost(batch, size)
        if peak.of(size) > self.limit - self.sums:
            self.measure()
            peak, _ = self.cost(batch, size)
        most = min(size, peak.samples(self.limit - self.sums))
        if not most:
            needed = (
                f"the sums of the derivatives take {readable(self.sums)}, and one sample {readable(peak.first)} more"
            )
            way_out = f"allow {readable(self.sums + peak.first)}, or keep the sums on the host with offload=True"
            raise ValueError(f"max_memory of {readable(self.limit)} is not enough: {needed}; {way_out}")
        if most < size:
            self._check_mean(batch, size, max(2, most))
        return self._counting(parts(batch, size, most, self.along))

    def _counting(self, cut: Iterable[Part]) -> list[Part]:
        """Without those that a loss has nothing of to take its mean over, which is nan then."""
        return [(part, count) for part, count in cut if self.derivatives.weight(part, count)]

    def cost(self, batch: Batch, size: int) -> tuple[Cost, Cost]:
        """Of a batch of this shape: the peak, and what the graph of its gradient holds."""
        key = self.shape(batch)
        if key not in self.costs:
            few = min(2, size)
            self._few[key] = first(batch, size, few, self.along), few
            self.costs[key] = self._cost(bounded, *self._few[key])
            if self.exact:
                self.costs[key] = self._cost(measured, *self._few[key])
        return self.costs[key]

    def shape(self, batch: Batch) -> Any:
        """What batches have in common that take as much a sample."""
        return shapes(batch, self.along)

    def measure(self) -> None:
        """In place of bounds, from now on."""
        if not self.exact:
            self.exact = True
            self.costs = {key: self._cost(measured, *few) for key, few in self._few.items()}

    def _cost(self, how: Callable[..., tuple[Cost, Cost]], batch: Batch, size: int) -> tuple[Cost, Cost]:
        with untouched(self.derivatives.model, mode=self.derivatives.mode), parts_that_run():
            return how(lambda count: self._work(first(batch, size, count, self.along), count), size)

    def _work(self, batch: Batch, size: int) -> Grads:
        if not self.second:
            return self.derivatives.gradient(self.derivatives.loss(batch, size))
        with twice_differentiable():
            grads = self.derivatives.gradient(self.derivatives.loss(batch, size), create_graph=True)
            self.derivatives.product(
                grads,
                [torch.zeros_like(p) if g is None else g.detach() for g, p in self._pairs(grads)],
                retain_graph=True,
            )
            return grads

    def _pairs(self, grads: Grads) -> Any:
        return zip(grads, self.derivatives.parameters, strict=True)

    def _check_mean(self, batch: Batch, size: int, count: int) -> None:
        """The same result from parts needs a loss that is what its weights say: tried on samples from all the batch."""
        for last in (False, True) if size > count else (False,):
            few = spread_out(batch, size, count, self.along, to_the_last=last)
            if (difference := difference_of_halves(self.derivatives, few, count)) is None:
                continue
            raise ValueError(
                "max_memory= cuts batches, which needs a loss that is a mean over samples or tokens, or a sum: that of "
                f"{count} samples is {difference[0]:.6g}, from its halves {difference[1]:.6g}; say how it reduces a "
                "batch with reduction=, or use smaller batches without max_memory="
            )


def _norm_over_batch(model: torch.nn.Module) -> str | None:
    """A norm that takes its statistics over the batch, as the model is now: in train mode, or with none kept."""
    return next(
        (
            name
            for name, module in model.named_modules()
            if isinstance(module, AnyBatchNorm) and (module.training or module.running_mean is None)
        ),
        None,
    )


def check_runs_alone(model: torch.nn.Module) -> None:
    """An error for a model whose samples cannot be run one by one."""
    if norm := _norm_over_batch(model):
        raise ValueError(
            f"g2_sample runs each sample alone, and {norm!r} takes its statistics over the whole batch: score in "
            "mode='eval' with running statistics, or use the gradients of batches (g2, 'fisher')"
        )


class Graphs:
    """The gradients of the last batches, with the graphs to differentiate them again.

    As many as fit beside the work on a batch.
    """

    def __init__(self, micro: MicroBatches) -> None:
        self.micro, self.worst, self.held, self.largest = micro, 0.0, 0.0, dict[Any, int]()
        self.kept: deque[tuple[Grads, int, Any, float]] = deque()

    @property
    def active(self) -> bool:
        """Whether the budget leaves room.

        Not without one, not where randomness would differ, not where graphs stay off the device.
        """
        resources = self.micro.derivatives.resources
        return (
            self.micro.second
            and resources.max_memory is not None
            and not resources.offload
            and self.micro.derivatives.mode == "eval"
        )

    def expect(self, batch: Batch, size: int) -> bool:
        """Make room for a batch; whether its graph may be kept."""
        peak, _ = self.micro.cost(batch, size)
        shape = self.micro.shape(batch)
        self.largest[shape] = max(size, self.largest.get(shape, 0))
        self.worst = max(self.worst, peak.of(size))
        self._drop()
        return self.room > 0

    def pass_by(self, size: int) -> None:
        """A batch that has nothing to take a mean over: a second sweep need not read it either."""
        self.kept.append(([None] * len(self.micro.derivatives.parameters), size, None, 0.0))

    def give_up(self) -> None:
        """A batch is not kept: those kept have to be the last ones, and none before it is any more."""
        self.kept.clear()
        self.held = 0.0

    def add(self, grads: Grads, batch: Batch, size: int) -> None:
        self.micro.cost(batch, size)
        shape = self.micro.shape(batch)
        self.kept.append((grads, size, shape, self.micro.derivatives.weight(batch, size)))
        self.held += self._bytes(shape, size)
        self._drop()

    def _bytes(self, shape: Any, size: int) -> float:
        return 0.0 if shape is None else self.micro.costs[shape][1].of(size)

    @property
    def room(self) -> float:
        return (self.micro.limit or 0) - self.micro.sums - self.worst

    def _drop(self) -> None:
        """By bounds where these do, else by what was measured."""
        if self.kept and self.held > self.room and not self.micro.exact:
            self.micro.measure()
            self.worst = max((self.micro.costs[shape][0].of(size) for shape, size in self.largest.items()), default=0)
            self.held = sum(self._bytes(shape, size) for _, size, shape, _ in self.kept)
        while self.kept and self.held > self.room:
            _, size, shape, _ = self.kept.popleft()
            self.held -= self._bytes(shape, size)
