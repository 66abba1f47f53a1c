"""What may go from a model: the units of each parameter, out as rows for the measures, back as masks for the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from torch_flowprune.channels import Costs, UniformSizes
from torch_flowprune.inputs import HeldUnits, Pair, Pattern, Target, no_collection, prunable, users_level
from torch_flowprune.masking import check_can_mask
from torch_flowprune.scoring.granularity import Blocks, Granularity, Units, Weights, alive, parse_granularity


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
    def alike(self) -> Callable[[Collection[str]], UniformSizes] | None:
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


@dataclass(frozen=True, eq=False)
class ParameterUnits:
    """The units of one parameter."""

    target: Target
    units: Units

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.target.parameter.shape)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        axis, shape = self.target.output_axis, self.shape
        return shape if len(shape) < 2 else (shape[axis], *shape[:axis], *shape[axis + 1 :])

    @property
    def read(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def kind(self) -> Hashable:
        return kernel_of(self.target.parameter)

    @property
    def structured(self) -> bool:
        return not isinstance(self.units, (Weights, Blocks))

    @property
    def coupled(self) -> bool:
        return False

    @property
    def output_axis(self) -> int | None:
        return self.target.output_axis if isinstance(self.units, Weights) and len(self.shape) > 1 else None

    @property
    def targets(self) -> tuple[Target, ...]:
        return (self.target,)

    @property
    def blocks(self) -> Blocks | None:
        return self.units if isinstance(self.units, Blocks) else None

    @property
    def costs(self) -> Costs | None:
        return None

    @property
    def alike(self) -> None:
        return None

    @property
    def shard(self) -> HeldUnits | None:
        return None

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        return len(self.units.rows(self.target.parameter.detach()))

    @property
    def moves(self) -> bool:
        return False

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.units.rows(tensors[self.name])

    def all_rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.rows(tensors)

    def alive(self) -> Tensor | None:
        return None if self.target.mask is None else alive(self.units, self.target.mask)

    def clear_removed(self, masks: dict[str, Tensor], keep: Tensor) -> None:
        masks[self.name] = self.units.mask(keep, self.target.parameter.shape)

    @property
    def weights(self) -> int:
        return self.target.parameter.numel()

    def kept_weights(self, kept_units: int) -> Tensor | int:
        if self.weights == len(self):  # a unit is one weight
            return kept_units
        return self.weights if self.target.mask is None else torch.count_nonzero(self.target.mask)

    def staying(self, keep: Mapping[str, Mapping[int, Tensor]]) -> Tensor:
        if isinstance(self.units, Blocks):
            raise ValueError("n:m blocks lie along an axis that shrink cuts, and do not stay blocks: shrink first")
        positions = torch.ones(self.shape, dtype=torch.bool)
        for axis, kept in keep.get(self.name, {}).items():
            positions.index_fill_(axis, (~kept).nonzero().flatten(), False)
        return alive(self.units, positions)

    def renewed(self, known: Mapping[str, Target]) -> ParameterUnits:
        return replace(self, target=known[self.name])


@no_collection()
def parameter_candidates(
    model: nn.Module,
    granularity: Granularity,
    parameters: Iterable[Pair] | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    *,
    made: Callable[[Target, Units], Candidate] | None = None,
) -> Candidates:
    """The parameters to prune and how each is cut into units, by name; all of them can carry a mask.

    ``made`` makes a candidate, where parameters may be shards.

    Parameters that n:m blocks do not fit are an error where ``parameters`` names them, and else left out with a
    warning.
    """
    units_of = parse_granularity(granularity)
    candidates: Candidates = {}
    left_out = []
    for target in prunable(model, parameters, include, exclude):
        units = units_of(check_can_mask(target, target.name, shards=made is not None))
        if isinstance(units, Blocks) and not units.fits(target.parameter.shape):
            left_out.append(target.name)
        else:
            candidates[target.name] = ParameterUnits(target, units) if made is None else made(target, units)
    if left_out:
        _report_left_out(left_out, granularity, required=parameters is not None or not candidates)
    return candidates


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


def living(values: Mapping[str, Tensor], candidates: Candidates) -> dict[str, Tensor]:
    """Of values one a unit, those of the units that are left: only they can still go."""
    flags = {name: candidate.alive() for name, candidate in candidates.items()}
    return {name: values[name] if alive is None else values[name][alive] for name, alive in flags.items()}


def label(granularity: Granularity) -> str:
    """What a granularity is called in scores and reports."""
    return granularity if isinstance(granularity, str) else repr(granularity)


def _report_left_out(names: list[str], granularity: Granularity, *, required: bool) -> None:
    text = f"the input axis of {', '.join(names)} does not divide into whole blocks of {label(granularity)}"
    if required:
        raise ValueError(f"{text}: leave them out")
    warnings.warn(f"{text}: they stay dense", UserWarning, stacklevel=users_level())
