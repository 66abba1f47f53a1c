"""A user's own figure of merit, taken of a model and data as a loss is: without a trace."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn

from torch_flowprune.gradients import DataRanks
from torch_flowprune.inputs import Ranks, answer, as_batches, parameters_of, sized, untouched


@runtime_checkable
class AccumulatingMetric(Protocol):
    """What torchmetrics' and torcheval's metrics are: fed batch by batch, read at the end."""

    def reset(self) -> Any: ...
    def update(self, *args: Any, **kwargs: Any) -> Any: ...
    def compute(self) -> Any: ...


Metric: TypeAlias = Callable[[nn.Module, Any], Any] | AccumulatingMetric
"""From a model in eval mode and the held-out data to a number; or a metric that is updated with (output, target)."""


def check_is_metric(metric: Metric | None) -> None:
    """An error before anything is computed.

    Raises:
        TypeError: for what is neither a function nor a metric, and for the class of a metric.
    """
    if isinstance(metric, type):
        raise TypeError(f"metric should be a metric, got the class {metric.__name__}: make one, {metric.__name__}(...)")
    if metric is not None and not callable(metric) and not isinstance(metric, AccumulatingMetric):
        raise TypeError(
            "metric should be a function of (model, data) that returns a number, or a metric of torchmetrics, got "
            f"{metric!r}"
        )


def measured_by(metric: Metric | None, model: nn.Module, data: object) -> float | None:
    """Its value; None where there is none. The model, and a metric's own state, are left as they were.

    Raises:
        TypeError: for a value that is no number.
    """
    if metric is None:
        return None
    with untouched(model, data, "eval", [metric]), torch.no_grad():
        value = _accumulated(metric, model, data) if isinstance(metric, AccumulatingMetric) else metric(model, data)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric should give a number, got {value!r}") from error


def _accumulated(metric: AccumulatingMetric, model: nn.Module, data: object) -> Any:
    device = next(iter(parameters_of(model).values())).parameter.device
    own: Any = deepcopy(metric)
    own.reset()
    if hasattr(own, "to"):
        own = own.to(device)
    for batch, size in DataRanks.of_shards(model, Ranks()).in_step(sized(as_batches(data), device)):
        found = answer(model, batch)
        if size:
            own.update(*found)
    return own.compute()
