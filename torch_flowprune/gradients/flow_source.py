"""What a flow is taken over, and with what: the data, the loss, and how the model is run on them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from torch_flowprune.gradients.batches import Reduction, Resources, check_reduction, in_bytes
from torch_flowprune.inputs import (
    BatchDim,
    BatchSize,
    Closure,
    Loss,
    Objective,
    Ranks,
    check_batch_dim,
    check_batch_size,
    check_mode,
    example_for,
    users_level,
    whole_number,
)


class SweepOptions(TypedDict, total=False):
    """How a sweep runs the model, over how much of the data; :func:`~torch_flowprune.flow` describes each."""

    closure: Closure | None
    max_samples: int | None
    temperature: float
    mode: str
    progress: bool | None
    max_memory: int | str | None
    offload: bool
    autocast: torch.dtype | None
    batch_size: BatchSize | None
    batch_dim: BatchDim
    reduction: Reduction | None
    check: bool | None
    probes: int


class LossOptions(SweepOptions, total=False):
    """These, and the loss."""

    loss: Loss | None


class FlowOptions(LossOptions, total=False):
    """All that a call hands on to a flow, besides the data."""

    theta0: Mapping[str, Tensor] | None
    example_inputs: Any


@dataclass(frozen=True)
class FlowSource:
    """The words of :func:`~torch_flowprune.flow` as one value, checked when it is made.

    Raises:
        ValueError, TypeError: for a word out of range, before any data are read.
    """

    data: object = None
    loss: Loss | None = None
    closure: Closure | None = None
    theta0: Mapping[str, Tensor] | None = None
    max_samples: int | None = None
    temperature: float = 1.0
    mode: str = "eval"
    example_inputs: Any = None
    progress: bool | None = None
    max_memory: int | str | None = None
    offload: bool = False
    autocast: torch.dtype | None = None
    batch_size: BatchSize | None = None
    batch_dim: BatchDim = 0
    reduction: Reduction | None = None
    check: bool | None = None
    probes: int = 32
    under_masks: bool = False

    def __post_init__(self) -> None:
        check_mode(self.mode)
        _check_count(self.max_samples)
        object.__setattr__(self, "probes", whole_number(self.probes, "probes"))
        if not isinstance(self.theta0, Mapping | None):
            raise TypeError(f"theta0 should be tensors by parameter name, such as a state dict, got {self.theta0!r}")
        check_batch_size(self.batch_size)
        check_batch_dim(self.batch_dim)
        check_reduction(self.reduction)
        _ = self.objective, self.resources  # both check their words

    @property
    def functions(self) -> tuple[object, ...]:
        """The user's, which may run other models beside this one."""
        return self.loss, self.closure

    @property
    def counting_words(self) -> tuple[int | None, BatchSize | None, BatchDim]:
        """How many samples are read, and how they are told from each other."""
        return self.max_samples, self.batch_size, self.batch_dim

    def warn_of_fewer(self, samples: int, ranks: Ranks) -> None:
        """Say that the data had not as many samples as were asked for."""
        if self.max_samples is not None and ranks.alone and samples < self.max_samples:
            warnings.warn(
                f"max_samples={self.max_samples}, and the data has {samples}: all of them were read",
                UserWarning,
                stacklevel=users_level(),
            )

    @property
    def counting(self) -> str:
        """How samples are counted, in words."""
        if self.batch_size is not None:
            return "as batch_size= says"
        axis = "the first axis" if self.batch_dim == 0 else "batch_dim="
        return f"along {axis}, or in lists"

    def example(self, model: nn.Module) -> Any:
        """Inputs to show the model's shapes with: those given, or what the loss calls it with on the first batch."""
        return example_for(model, self.objective, self.data, self.example_inputs)

    @cached_property
    def objective(self) -> Objective:
        """The scalar that is differentiated."""
        return Objective(self.loss, self.closure, self.temperature)

    @cached_property
    def resources(self) -> Resources:
        """What the sweeps may take, where their sums are kept, and in which precision the model runs."""
        return Resources(in_bytes(self.max_memory), self.offload, self.autocast)


def _check_count(max_samples: int | None) -> None:
    known = max_samples is None or (hasattr(max_samples, "__index__") and not isinstance(max_samples, bool))
    if not known or (max_samples is not None and max_samples < 1):
        raise ValueError(
            f"max_samples should be a whole number of at least 1, or None for all the data, got {max_samples!r}"
        )
