"""The units of single parameters as candidates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from torch_flowprune.channels import Costs
from torch_flowprune.inputs import Pair, Pattern, Target, no_collection, prunable, users_level
from torch_flowprune.masking import check_can_mask
from torch_flowprune.scoring.candidates.candidate import Candidate, Candidates, Whole, kernel_of, label
from torch_flowprune.scoring.granularity import Blocks, Granularity, Units, Weights, alive, parse_granularity


@dataclass(frozen=True, eq=False)
class ParameterUnits(Whole):
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

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        return len(self.units.rows(self.target.parameter.detach()))

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.units.rows(tensors[self.name])

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
        units = units_of(check_can_mask(target, target.name, shards=made is not None, factors=False))
        if isinstance(units, Blocks) and not units.fits(target.parameter.shape):
            left_out.append(target.name)
        elif target.parameter.numel() or isinstance(units, Weights):  # slices without a weight are no units
            candidates[target.name] = ParameterUnits(target, units) if made is None else made(target, units)
    if left_out:
        _report_left_out(left_out, granularity, required=parameters is not None or not candidates)
    return candidates


def _report_left_out(names: list[str], granularity: Granularity, *, required: bool) -> None:
    text = f"the input axis of {', '.join(names)} does not divide into whole blocks of {label(granularity)}"
    if required:
        raise ValueError(f"{text}: leave them out")
    warnings.warn(f"{text}: they stay dense", UserWarning, stacklevel=users_level())
