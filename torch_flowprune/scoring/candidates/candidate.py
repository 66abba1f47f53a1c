"""What may go from a model: units that are ranked side by side, out as rows for the measures, back as masks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Protocol, TypeAlias

from torch import Tensor

from torch_flowprune.channels import Costs, UniformSizes
from torch_flowprune.inputs import HeldUnits, Target
from torch_flowprune.scoring.granularity import Blocks, Granularity

Alike: TypeAlias = Callable[[Collection[str]], UniformSizes]
"""From the groups that are pruned to which of them are of equal size in all models of the class."""


class Candidate(Protocol):
    """Units that are ranked side by side, and what of the model they are made of."""

    @property
    def name(self) -> str:
        """What scores and reports call it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape a report shows."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weights that compute the units, outputs first."""

    @property
    def read(self) -> tuple[str, ...]:
        """The parameters whose elements a measure reads."""

    @property
    def kind(self) -> Hashable:
        """What its units are made of, whatever their number: equal for those that do the same work in a model."""

    @property
    def structured(self) -> bool:
        """Whether units are parts of a layer's width: without any the layer is dead."""

    @property
    def coupled(self) -> bool:
        """Whether a unit is a channel with all that lives or dies with it, and what is left can be built smaller."""

    @property
    def multiple(self) -> int:
        """What the number of units that stay has to be a multiple of, for operators to take it."""

    @property
    def output_axis(self) -> int | None:
        """Of single weights, the axis that outputs lie along; else None."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """The parameters whose elements are read or masked."""

    @property
    def blocks(self) -> Blocks | None:
        """The n:m pattern that the units have to keep, if any."""

    @property
    def costs(self) -> Costs | None:
        """What the whole model costs as a function of the units that stay, where known; all candidates share it."""

    @property
    def shard(self) -> HeldUnits | None:
        """Which of the units are on this rank; None where all are."""

    @property
    def alike(self) -> Alike | None:
        """Which of these candidates are of equal size in all models of the class, where that is known.

        All candidates share it.
        """

    def __len__(self) -> int:
        """How many units, on all ranks together."""

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the units that are here hold of tensors given by parameter name: ``(unit, element)``."""

    def all_rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What all units hold; of shards, put together on every rank."""

    @property
    def moves(self) -> bool:
        """Whether reading rows sends parts between ranks: then every rank reads them, in one order, once."""

    def alive(self) -> Tensor | None:
        """Which of the units that are here are left; None: all."""

    def clear_removed(self, masks: dict[str, Tensor], keep: Tensor) -> None:
        """What units without a flag hold, cleared from masks by parameter name; a parameter without one gets one."""

    @property
    def weights(self) -> int:
        """How many weights the units own."""

    def kept_weights(self, kept_units: int) -> Tensor | int:
        """How many of them the model's masks keep, where they keep so many units; of shards, what counts here."""

    def staying(self, keep: Mapping[str, Mapping[int, Tensor]]) -> Tensor:
        """Which units stay where these positions do, by tensor and axis: (units,) bool.

        Raises:
            ValueError: where parts of a unit would stay.
        """

    def renewed(self, known: Mapping[str, Target]) -> Candidate:
        """The same with the masks that the model has now."""


Candidates: TypeAlias = "dict[str, Candidate]"


class Whole:
    """What most candidates answer alike: they have no outputs, no pattern and no equals, and all units are here."""

    @property
    def multiple(self) -> int:
        return 1

    @property
    def output_axis(self) -> int | None:
        return None

    @property
    def blocks(self) -> Blocks | None:
        return None

    @property
    def shard(self) -> HeldUnits | None:
        return None

    @property
    def alike(self) -> Alike | None:
        return None

    @property
    def moves(self) -> bool:
        return False

    def all_rows(self: Candidate, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.rows(tensors)


def kernel_of(parameter: Tensor) -> tuple[int, ...]:
    """What of a shape is no width: how many axes it has, whether each input has outputs of its own, the kernel."""
    return parameter.ndim, int(parameter.ndim > 1 and parameter.shape[1] == 1), *parameter.shape[2:]


def targets_of(candidates: Candidates) -> dict[str, Target]:
    """Every parameter that candidates read or mask, once, by name."""
    return {target.name: target for candidate in candidates.values() for target in candidate.targets}


def masks_of(candidates: Candidates, keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One mask a parameter from one flag a unit, of the candidates that have flags: what any removes is removed."""
    masks: dict[str, Tensor] = {}
    for name, keep in keeps.items():
        candidates[name].clear_removed(masks, keep)
    return masks


def label(granularity: Granularity) -> str:
    """What a granularity is called in scores and reports."""
    return granularity if isinstance(granularity, str) else repr(granularity)
