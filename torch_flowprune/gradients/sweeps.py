"""The passes over the data that a flow takes: the one place that runs the model on them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torch_flowprune.gradients.batch_derivatives import Derivatives, Grads
from torch_flowprune.gradients.double_backward import twice_differentiable
from torch_flowprune.gradients.memory_budget import Resources
from torch_flowprune.gradients.microbatches import Graphs, MicroBatches
from torch_flowprune.inputs import Batch, Objective, Ranks, Restore, Target, samples, sized, wide, wide_type

SizedBatch: TypeAlias = tuple[Batch, int]
Sums: TypeAlias = dict[str, list[Tensor]]

_EMPTY = "the data is empty: at least one batch is needed (an exhausted iterator? pass a list or a DataLoader)"


class Sweeps:
    """g, g2, g2_sample and Hg as sample-weighted means over batches, in float32 or better."""

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        objective: Objective,
        mode: str,
        rewind: Restore,
        progress: bool | None,
        max_samples: int | None,
        ranks: Ranks,
        resources: Resources = Resources(),  # noqa: B008 - a value that cannot change
    ) -> None:
        self.mode, self.rewind, self.progress, self.max_samples, self.ranks = (
            mode,
            rewind,
            progress,
            _whole(max_samples),
            ranks,
        )
        self.names = list(targets)
        self.parameters = [target.parameter for target in targets.values()]
        if not self.parameters:
            raise ValueError(
                "no parameter of this model requires a gradient: unfreeze some, or name those to score in parameters="
            )
        if resources.offload and not ranks.alone:
            raise ValueError(
                "offload=True keeps the sums on the host, where ranks do not add them up: score in one process"
            )
        self.offload, self.seen = resources.offload, 0
        self.derivatives = Derivatives(model, self.parameters, objective, mode, resources)

    def run(self, data: Iterable[Batch], wanted: set[str]) -> dict[str, Any]:
        """The wanted fields of a flow, with ``loss`` and ``samples``."""
        micro = MicroBatches(self.derivatives, wanted)
        head, stream = self._stream(data)
        if not head:
            raise ValueError(_EMPTY)
        if "Hg" not in wanted:
            return self._first(chain(head, stream), wanted, _length(data), micro, None)
        if len(head) == 1 and self.ranks.alone and not self.offload and len(micro.of(*head[0])) == 1:
            return self._single(head[0], wanted)
        if isinstance(data, Iterator) and (len(head) > 1 or self.mode == "train"):
            raise ValueError(
                "H·g takes two sweeps over the data, and this iterator can be read only once: pass a list or a "
                "DataLoader"
            )
        graphs = Graphs(micro)
        found = self._first(chain(head, stream), wanted, _length(data), micro, graphs)
        self.rewind()
        again = iter(head) if isinstance(data, Iterator) else chain(*self._stream(data))
        return {**found, "Hg": self._second(again, found, _length(data), micro, graphs)}

    def along(self, v: Mapping[str, Tensor], masks: Mapping[str, Tensor], data: Iterable[Batch]) -> dict[str, Any]:
        """The loss, ‖g‖², and their expansions in θ − v, in one sweep: the fields of a ``Prediction``."""
        vector = [
            v[name].to(p.device) if name in v else torch.zeros_like(wide(p.detach()))
            for name, p in zip(self.names, self.parameters, strict=True)
        ]
        g, product, losses, sizes, slopes = self._zeros(), self._zeros(), [], [], []
        head, stream = self._stream(data)
        for batch, size in self._bar(chain(head, stream), _length(data), "prediction"):
            with twice_differentiable():
                loss = self.derivatives.loss(batch)
                grads = self.derivatives.gradient(loss, create_graph=True)
                _add(product, self.derivatives.product(grads, vector), size)
            detached = [None if grad is None else grad.detach() for grad in grads]
            _add(g, detached, size)
            slopes.append(_dot(vector, detached))
            losses.append(loss.detach())
            sizes.append(size)
        if not sizes:
            raise ValueError(_EMPTY)
        mean_loss = _mean_loss(losses, sizes)
        count, mean_loss = self._over_ranks([g, product], sum(sizes), mean_loss)
        g, product = _scale(g, 1 / count), _scale(product, 1 / count)
        lost = [
            torch.where(masks[n].to(one.device), 0, one - Hv)
            for n, one, Hv in zip(self.names, g, product, strict=True)
            if n in masks
        ]
        return {
            "loss": mean_loss,
            "first_order": -_dot(vector, g).item(),
            "curvature": _dot(vector, product).item() / 2,
            "standard_error": self._standard_error(torch.stack(slopes), sizes),
            "gradient_norm": _dot(g, g).item(),
            "gradient_norm_change": -2 * _dot(product, g).item(),
            "gradient_norm_curvature": _dot(product, product).item(),
            "gradient_norm_lost": _dot(lost, lost).item(),
            "samples": count,
        }

    def _standard_error(self, values: Tensor, sizes: list[int]) -> float:
        """Of the sample-weighted mean of a batch quantity, over the batches of all ranks; nan for one batch."""
        weight = torch.tensor(sizes, dtype=torch.float64, device=values.device)
        moments = torch.stack(
            [
                weight.new_tensor(len(sizes)),
                weight.sum(),
                (weight * values).sum(),
                *((weight**2 * values**i).sum() for i in range(3)),
            ]
        )
        self.ranks.sum([moments])
        batches, total, weighted, zeroth, first, second = moments.tolist()
        mean = weighted / total
        spread = max(second - 2 * mean * first + mean**2 * zeroth, 0.0)
        return float((spread * batches / (batches - 1)) ** 0.5 / total) if batches > 1 else float("nan")

    def _stream(self, data: Iterable[Batch]) -> tuple[list[SizedBatch], Iterator[SizedBatch]]:
        """The first two batches and the rest.

        Both sweeps read ahead alike: data and model may draw from one source of randomness.
        """
        stream = sized(data, self.parameters[0].device, self.max_samples)
        return list(islice(stream, 2)), stream

    def _first(
        self,
        batches: Iterable[SizedBatch],
        wanted: set[str],
        length: int | None,
        micro: MicroBatches,
        graphs: Graphs | None,
    ) -> dict[str, Any]:
        sums: Sums = {kind: self._zeros() for kind in ("g", "g2", "g2_sample") if kind in wanted}
        losses, sizes = [], []
        for batch, size in self._bar(batches, length, "gradient"):
            losses.append(self._gradient(sums, batch, size, micro, graphs))
            sizes.append(size)
        self.seen = sum(sizes)
        self.derivatives.warn_unreached(self.names, stacklevel=5)
        count, mean_loss = self._over_ranks(sums.values(), self.seen, _mean_loss(losses, sizes))
        return self._fields({kind: _scale(total, 1 / count) for kind, total in sums.items()}, mean_loss, count)

    def _gradient(self, sums: Sums, batch: Batch, size: int, micro: MicroBatches, graphs: Graphs | None) -> Tensor:
        """One batch's gradient into the sums, by its parts.

        Or by the whole, and its graph kept for the second sweep.
        """
        parts = micro.of(batch, size)
        keep = graphs is not None and graphs.active and len(parts) == 1 and graphs.expect(batch, size)
        # g goes through the operators that Hg will go through: kernels draw dropout in ways of their own
        with twice_differentiable() if keep or (micro.second and self.mode == "train") else nullcontext():
            if len(parts) > 1:
                loss, grads = self._of_parts(parts, size)
            else:
                loss = self.derivatives.loss(batch)
                grads = self.derivatives.gradient(loss, create_graph=keep)
        if keep and graphs is not None:
            graphs.add(grads, batch, size)
        self._accumulate(sums, _detached(grads), batch, size)
        return loss.detach()

    def _of_parts(self, parts: Sequence[SizedBatch], size: int) -> tuple[Tensor, Grads]:
        total, losses = self._zeros(), []
        for part, count in parts:
            loss = self.derivatives.loss(part)
            _add(total, self.derivatives.gradient(loss), count)
            losses.append(loss.detach() * count)
        return torch.stack(losses).sum() / size, list(_scale(total, 1 / size))

    def _second(
        self,
        batches: Iterator[SizedBatch],
        found: dict[str, Any],
        length: int | None,
        micro: MicroBatches,
        graphs: Graphs,
    ) -> dict[str, Tensor]:
        """H·g: each batch's gradient, differentiated along the mean gradient that the first sweep gave."""
        along, total, count = list(found["g"].values()), self._zeros(), sum(size for _, size, _ in graphs.kept)
        for batch, size in self._bar(
            _until(batches, self.seen - count if graphs.kept else sys.maxsize), length, "Hessian-gradient product"
        ):
            for part, samples_ in micro.of(batch, size):
                with twice_differentiable() as weight_gradients:
                    loss = self.derivatives.loss(part)
                    with weight_gradients.unread():
                        grads = self.derivatives.gradient(loss, create_graph=True)
                    _add(total, self.derivatives.product(grads, along), samples_)
            count += size
        while graphs.kept:
            grads, size, _ = graphs.kept.popleft()
            _add(total, self.derivatives.product(grads, along), size)
        count, _ = self._over_ranks([total], count)
        if count != found["samples"]:
            raise ValueError(
                f"the data gave {found['samples']} samples on the first sweep, {count} on the second: g and H need "
                "the same data"
            )
        return self._named(_scale(total, 1 / count))

    def _single(self, sized_batch: SizedBatch, wanted: set[str]) -> dict[str, Any]:
        """One batch needs no second sweep: the graph of its gradient is differentiated again."""
        batch, size = sized_batch
        with twice_differentiable():
            loss = self.derivatives.loss(batch)
            grads = self.derivatives.gradient(loss, create_graph=True)
            detached = _detached(grads)
            g = _add(self._zeros(), detached, 1)
            product = _add(self._zeros(), self.derivatives.product(grads, g), 1)
        self.derivatives.warn_unreached(self.names, stacklevel=5)
        sums: Sums = {kind: self._zeros() for kind in ("g2", "g2_sample") if kind in wanted}
        self._accumulate(sums, detached, batch, size)
        means: Sums = {"g": g, "Hg": product, **{kind: _scale(total, 1 / size) for kind, total in sums.items()}}
        return self._fields(means, _mean_loss([loss.detach()], [size]), size)

    def _accumulate(self, sums: Sums, grads: Grads, batch: Batch, size: int) -> None:
        if "g" in sums:
            _add(sums["g"], grads, size)
        if "g2" in sums:
            _add_squares(sums["g2"], grads, size)
        if "g2_sample" in sums:
            for sample in samples(batch, size):
                _add_squares(sums["g2_sample"], self.derivatives.gradient(self.derivatives.loss(sample)), 1)

    def _over_ranks(self, sums: Iterable[list[Tensor]], count: int, loss: float = 0.0) -> tuple[int, float]:
        """Sums, number of samples and mean loss of all ranks together."""
        for values in sums:
            self.ranks.sum(values)
        totals = torch.tensor([count, loss * count], dtype=torch.float64, device=self.parameters[0].device)
        self.ranks.sum([totals])
        samples, total = totals.tolist()
        return int(samples), total / samples

    def _fields(self, means: Sums, loss: float, samples: int) -> dict[str, Any]:
        return {**{kind: self._named(mean) for kind, mean in means.items()}, "loss": loss, "samples": samples}

    def _zeros(self) -> list[Tensor]:
        device = "cpu" if self.offload else None
        return [
            torch.zeros_like(value, dtype=wide_type(value), device=device)
            for value in map(Tensor.detach, self.parameters)
        ]

    def _named(self, values: Iterable[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, values, strict=True))

    def _bar(self, batches: Iterable[SizedBatch], total: int | None, name: str) -> Iterable[SizedBatch]:
        bar: Iterable[SizedBatch] = tqdm(
            batches,
            desc=name,
            total=total,
            unit="batch",
            leave=False,
            delay=0 if self.progress else 2,
            disable=self.progress is False,
        )
        return bar


def _dot(one: Sequence[Tensor], other: Sequence[Tensor | None]) -> Tensor:
    """Σ one·other over all parameters, in float64."""
    return torch.stack(
        [(a * b).sum(dtype=torch.float64).to(one[0].device) for a, b in zip(one, other, strict=True) if b is not None]
    ).sum()


def _detached(grads: Grads) -> Grads:
    return [None if grad is None else grad.detach() for grad in grads]


def _until(batches: Iterator[SizedBatch], left: int) -> Iterator[SizedBatch]:
    """Batches up to so many samples: those behind have their graphs kept."""
    while left > 0 and (found := next(batches, None)):
        yield found
        left -= found[1]


def _add_squares(total: list[Tensor], values: Grads, weight: int) -> None:
    if pairs := _pairs(total, values):
        into, squared = zip(*pairs, strict=True)
        torch._foreach_addcmul_(into, squared, squared, value=weight)


def _add(total: list[Tensor], values: Sequence[Tensor | None], weight: int) -> list[Tensor]:
    if pairs := _pairs(total, values):
        into, added = zip(*pairs, strict=True)
        torch._foreach_add_(into, added, alpha=weight)
    return total


def _pairs(total: list[Tensor], values: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    return [(into, wide(value)) for into, value in zip(total, values, strict=True) if value is not None]


def _scale(values: list[Tensor], factor: float) -> list[Tensor]:
    torch._foreach_mul_(values, factor)
    return values


def _mean_loss(losses: list[Tensor], sizes: list[int]) -> float:
    """The sample-weighted mean, read from the device once; an infinite or nan loss is an error that names its batch."""
    values: list[float] = torch.stack(losses).double().tolist()
    for index, value in enumerate(values):
        if not abs(value) < float("inf"):
            raise ValueError(
                f"the loss of batch {index} is {value}: scores would mean nothing (check the data, or try "
                "mode='train' on an untrained model)"
            )
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def _whole(max_samples: int | None) -> int | None:
    if max_samples is not None and (
        isinstance(max_samples, bool) or not hasattr(max_samples, "__index__") or max_samples < 1
    ):
        raise ValueError(
            f"max_samples should be a whole number of at least 1, or None for all the data, got {max_samples!r}"
        )
    return max_samples


def _length(data: object) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None
