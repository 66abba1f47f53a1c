"""Batch-norm statistics of a pruned model, taken anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.gradients import DataRanks
from torch_flowprune.inputs import Objective, Ranks, as_batches, check_keywords, first_axis, sized, untouched, unwrapped

Model = TypeVar("Model", bound=nn.Module)


def recalibrate(model: Model, data: object = None, *, max_samples: int | None = None, **unknown: Never) -> Model:
    """Recompute every batch norm's running statistics over ``data``: those of the dense model no longer fit.

    Mean and variance become the sample-weighted means over the batches. Norms without running statistics are left
    unchanged, and so is everything else (other modules stay in eval mode; gradients and random states are kept).

    Args:
        model: any module, pruned or not; changed in place, and returned. With ``DistributedDataParallel`` or a sharded
            model, make the same call on every rank, each with its own part of the data.
        data: an iterable of batches, or one batch, as :func:`~torch_flowprune.flow` takes them; targets are not read.
        max_samples: read exactly this many samples.
        unknown: no other keyword is accepted; the error names the one meant.

    Raises:
        ValueError: if the model has no such norm, or if the data is empty; the model is as it was.

    See Also:
        :func:`~torch_flowprune.fold_constants`: adds constants of removed channels to biases.
        :func:`~torch_flowprune.reconstruct`: refits the kept weights, layer by layer.

    >>> import torch, torch_flowprune as fp
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    >>> fp.recalibrate(model, (torch.ones(2, 3, 5, 5), torch.zeros(2)))[1].num_batches_tracked
    tensor(1)
    """
    check_keywords(recalibrate, unknown)
    ranks, inner = Ranks.of(model), unwrapped(model)
    norms = [module for module in inner.modules() if _keeps_statistics(module)]
    if not norms:
        raise ValueError("this model has no batch norm with running statistics: there is nothing to recompute")
    with untouched(inner, data):
        _forward_all(inner, norms, data, max_samples, DataRanks.of_shards(inner, ranks))
        taken = [{name: buffer.clone() for name, buffer in _statistics(norm)} for norm in norms]
    for norm, statistics in zip(norms, taken, strict=True):
        for name, buffer in _statistics(norm):
            buffer.copy_(statistics[name])
    return model


def _forward_all(model: nn.Module, norms: list[nn.Module], data: object, max_samples: int | None, ranks: Ranks) -> None:
    momenta = [norm.momentum for norm in norms]
    seen = batches = 0
    device = next(model.parameters()).device
    try:
        for norm in norms:
            norm.train()
            norm.reset_running_stats()  # type: ignore[operator]  # a batch norm has it
        with torch.no_grad():
            for batch, size in ranks.in_step(sized(as_batches(data), device, max_samples, first_axis)):
                seen, batches = seen + size, batches + bool(size)
                for norm in norms:
                    norm.momentum = size / seen  # type: ignore[assignment]
                Objective().forward(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not seen:
        raise ValueError("the data is empty: at least one batch is needed (an exhausted iterator? pass a DataLoader)")
    if not ranks.alone:
        _average(norms, seen, batches, ranks)


def _average(norms: list[nn.Module], seen: int, batches: int, ranks: Ranks) -> None:
    """Statistics of all ranks' batches in place of each rank's own, weighted by samples."""
    ranks.sum([totals := torch.tensor([seen, batches], dtype=torch.float64, device=_device_of(norms))])
    for name, buffer in (pair for norm in norms for pair in _statistics(norm)):
        if name == "num_batches_tracked":
            buffer.fill_(int(totals[1]))
        else:
            ranks.sum([total := buffer.double() * seen])
            buffer.copy_(total / totals[0])


def _device_of(norms: list[nn.Module]) -> torch.device:
    return next(buffer.device for _, buffer in _statistics(norms[0]))


def _keeps_statistics(module: nn.Module) -> bool:
    return hasattr(module, "reset_running_stats") and getattr(module, "running_mean", None) is not None


def _statistics(norm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if isinstance(buffer := getattr(norm, name, None), Tensor):
            yield name, buffer
