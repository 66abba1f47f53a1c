"""A user's own figure of merit, taken of a model and data as a loss is: without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from torch_flowprune.inputs import untouched

Metric: TypeAlias = Callable[[nn.Module, Any], Any]
"""From a model in eval mode and the held-out data to a number."""


def check_is_callable(metric: Metric | None) -> None:
    """An error before anything is computed.

    Raises:
        TypeError: for what is no function.
    """
    if metric is not None and not callable(metric):
        raise TypeError(f"metric should be a function of (model, data) that returns a number, got {metric!r}")


def measured_by(metric: Metric | None, model: nn.Module, data: object) -> float | None:
    """Its value; None where there is none. The model is left as it was.

    Raises:
        TypeError: for a value that is no number.
    """
    if metric is None:
        return None
    with untouched(model, data, "eval"), torch.no_grad():
        value = metric(model, data)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric should give a number, got {value!r}") from error
