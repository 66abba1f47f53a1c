"""The passes over the data that a flow takes: the one place that runs the model on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torch_flowprune.data import Batch, Objective, samples, sized
from torch_flowprune.ranks import Ranks
from torch_flowprune.targets import Target, wide
from torch_flowprune.twice import check_twice, twice_differentiable
from torch_flowprune.untouched import Restore, settle

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
    ) -> None:
        self.model, self.objective, self.mode, self.rewind, self.progress = model, objective, mode, rewind, progress
        self.max_samples, self.ranks = _whole(max_samples), ranks
        self.names = list(targets)
        self.parameters = [target.parameter for target in targets.values()]
        if not self.parameters:
            raise ValueError("no parameter of this model requires a gradient: unfreeze some, or name those to score in parameters=")
        self.reached = [False] * len(self.names)

    def run(self, data: Iterable[Batch], wanted: set[str]) -> dict[str, Any]:
        """The wanted fields of a flow, with ``loss`` and ``samples``."""
        head, stream = self._stream(data)
        if not head:
            raise ValueError(_EMPTY)
        if "Hg" not in wanted:
            return self._first(chain(head, stream), wanted, _length(data))
        if len(head) == 1 and self.ranks.alone:
            return self._single(head[0], wanted)
        if isinstance(data, Iterator):
            raise ValueError("H·g takes two sweeps over the data, and this iterator can be read only once: pass a list or a DataLoader")
        found = self._first(chain(head, stream), wanted, _length(data))
        self.rewind()
        return {**found, "Hg": self._second(chain(*self._stream(data)), found, _length(data))}

    def along(self, v: Mapping[str, Tensor], data: Iterable[Batch]) -> dict[str, Any]:
        """The loss, ‖g‖², and their expansions in θ − v, in one sweep: the fields of a ``Prediction``."""
        vector = [
            v[name].to(p.device) if name in v else torch.zeros_like(wide(p.detach())) for name, p in zip(self.names, self.parameters, strict=True)
        ]
        g, product, losses, sizes, slopes = self._zeros(), self._zeros(), [], [], []
        head, stream = self._stream(data)
        for batch, size in self._bar(chain(head, stream), _length(data), "prediction"):
            with twice_differentiable():
                loss = self._loss(batch)
                grads = self._grads(loss, create_graph=True)
                _add(product, self._product(grads, vector), size)
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
        return {
            "loss": mean_loss,
            "first_order": -_dot(vector, g).item(),
            "curvature": _dot(vector, product).item() / 2,
            "standard_error": self._standard_error(torch.stack(slopes), sizes),
            "gradient_norm": _dot(g, g).item(),
            "gradient_norm_change": -2 * _dot(product, g).item(),
            "samples": count,
        }

    def _standard_error(self, values: Tensor, sizes: list[int]) -> float:
        """Of the sample-weighted mean of a batch quantity, over the batches of all ranks; nan for one batch."""
        weight = torch.tensor(sizes, dtype=torch.float64, device=values.device)
        moments = torch.stack(
            [weight.new_tensor(len(sizes)), weight.sum(), (weight * values).sum(), *((weight**2 * values**i).sum() for i in range(3))]
        )
        self.ranks.sum([moments])
        batches, total, weighted, zeroth, first, second = moments.tolist()
        mean = weighted / total
        spread = max(second - 2 * mean * first + mean**2 * zeroth, 0.0)
        return float((spread * batches / (batches - 1)) ** 0.5 / total) if batches > 1 else float("nan")

    def _stream(self, data: Iterable[Batch]) -> tuple[list[SizedBatch], Iterator[SizedBatch]]:
        """The first two batches and the rest. Both sweeps read ahead alike: data and model may draw from one source of randomness."""
        stream = sized(data, self.parameters[0].device, self.max_samples)
        return list(islice(stream, 2)), stream

    def _first(self, batches: Iterable[SizedBatch], wanted: set[str], length: int | None) -> dict[str, Any]:
        sums: Sums = {kind: self._zeros() for kind in ("g", "g2", "g2_sample") if kind in wanted}
        losses, sizes = [], []
        # g goes through the operators that Hg will go through: kernels draw dropout in ways of their own
        operators = twice_differentiable if "Hg" in wanted and self.mode == "train" else nullcontext
        for batch, size in self._bar(batches, length, "gradient"):
            with operators():
                loss = self._loss(batch)
                self._accumulate(sums, self._grads(loss), batch, size)
            losses.append(loss.detach())
            sizes.append(size)
        self._warn_unreached()
        count, mean_loss = self._over_ranks(sums.values(), sum(sizes), _mean_loss(losses, sizes))
        return self._fields({kind: _scale(total, 1 / count) for kind, total in sums.items()}, mean_loss, count)

    def _second(self, batches: Iterable[SizedBatch], found: dict[str, Any], length: int | None) -> dict[str, Tensor]:
        """H·g: each batch's gradient, differentiated along the mean gradient that the first sweep gave."""
        along, total, count = list(found["g"].values()), self._zeros(), 0
        for batch, size in self._bar(batches, length, "Hessian-gradient product"):
            with twice_differentiable(values=False):
                _add(total, self._product(self._grads(self._loss(batch), create_graph=True), along), size)
            count += size
        count, _ = self._over_ranks([total], count)
        if count != found["samples"]:
            raise ValueError(f"the data gave {found['samples']} samples on the first sweep, {count} on the second: g and H need the same data")
        return self._named(_scale(total, 1 / count))

    def _single(self, sized_batch: SizedBatch, wanted: set[str]) -> dict[str, Any]:
        """One batch needs no second sweep: the graph of its gradient is differentiated again."""
        batch, size = sized_batch
        with twice_differentiable():
            loss = self._loss(batch)
            grads = self._grads(loss, create_graph=True)
            detached = [None if grad is None else grad.detach() for grad in grads]
            g = _add(self._zeros(), detached, 1)
            product = _add(self._zeros(), self._product(grads, g), 1)
        self._warn_unreached()
        sums: Sums = {kind: self._zeros() for kind in ("g2", "g2_sample") if kind in wanted}
        self._accumulate(sums, detached, batch, size)
        means: Sums = {"g": g, "Hg": product, **{kind: _scale(total, 1 / size) for kind, total in sums.items()}}
        return self._fields(means, _mean_loss([loss.detach()], [size]), size)

    def _accumulate(self, sums: Sums, grads: Sequence[Tensor | None], batch: Batch, size: int) -> None:
        if "g" in sums:
            _add(sums["g"], grads, size)
        if "g2" in sums:
            _add(sums["g2"], _squares(grads), size)
        if "g2_sample" in sums:
            for sample in samples(batch, size):
                _add(sums["g2_sample"], _squares(self._grads(self._loss(sample))), 1)

    def _loss(self, batch: Batch) -> Tensor:
        settle(self.model, self.mode)
        return self.objective(self.model, batch)

    def _grads(self, loss: Tensor, create_graph: bool = False) -> list[Tensor | None]:
        grads = torch.autograd.grad(loss, self.parameters, create_graph=create_graph, allow_unused=True)
        self.reached = [seen or grad is not None for seen, grad in zip(self.reached, grads, strict=True)]
        return list(grads)

    def _product(self, grads: list[Tensor | None], along: list[Tensor]) -> list[Tensor | None]:
        """(∂g/∂θ)ᵀ v, which is H·v since H is symmetric."""
        pairs = [(grad, v.to(grad.dtype)) for grad, v in zip(grads, along, strict=True) if grad is not None and grad.requires_grad]
        if not pairs:
            return [None] * len(grads)
        outputs, vectors = zip(*pairs, strict=True)
        try:
            check_twice(outputs)
            return list(torch.autograd.grad(outputs, self.parameters, vectors, allow_unused=True))
        except RuntimeError as error:
            if not any(text in str(error) for text in ("derivative for", "double backward", "once_differentiable")):
                raise
            way_out = "H·g needs second derivatives, and an operator of this model has none: use a measure that reads only g"
            raise RuntimeError(f"{way_out} (torch says: {error})") from error

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
        return [torch.zeros_like(wide(parameter.detach())) for parameter in self.parameters]

    def _named(self, values: Iterable[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, values, strict=True))

    def _bar(self, batches: Iterable[SizedBatch], total: int | None, name: str) -> Iterable[SizedBatch]:
        bar: Iterable[SizedBatch] = tqdm(
            batches, desc=name, total=total, unit="batch", leave=False, delay=0 if self.progress else 2, disable=self.progress is False
        )
        return bar

    def _warn_unreached(self) -> None:
        names = [name for name, seen in zip(self.names, self.reached, strict=True) if not seen]
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            warnings.warn(f"the loss does not reach {listed}: their gradient counts as 0", UserWarning, stacklevel=5)


def _dot(one: Sequence[Tensor], other: Sequence[Tensor | None]) -> Tensor:
    """Σ one·other over all parameters, in float64."""
    return torch.stack([(a * b).sum(dtype=torch.float64).to(one[0].device) for a, b in zip(one, other, strict=True) if b is not None]).sum()


def _squares(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if grad is None else wide(grad).square() for grad in grads]


def _add(total: list[Tensor], values: Sequence[Tensor | None], weight: int) -> list[Tensor]:
    pairs = [(into, wide(value)) for into, value in zip(total, values, strict=True) if value is not None]
    if pairs:
        into, values = zip(*pairs, strict=True)
        torch._foreach_add_(into, values, alpha=weight)
    return total


def _scale(values: list[Tensor], factor: float) -> list[Tensor]:
    torch._foreach_mul_(values, factor)
    return values


def _mean_loss(losses: list[Tensor], sizes: list[int]) -> float:
    """The sample-weighted mean, read from the device once; an infinite or nan loss is an error that names its batch."""
    values: list[float] = torch.stack(losses).double().tolist()
    for index, value in enumerate(values):
        if not abs(value) < float("inf"):
            raise ValueError(
                f"the loss of batch {index} is {value}: scores would mean nothing (check the data, or try mode='train' on an untrained model)"
            )
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def _whole(max_samples: int | None) -> int | None:
    if max_samples is not None and (isinstance(max_samples, bool) or not hasattr(max_samples, "__index__") or max_samples < 1):
        raise ValueError(f"max_samples should be a whole number of at least 1, or None for all the data, got {max_samples!r}")
    return max_samples


def _length(data: object) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None
