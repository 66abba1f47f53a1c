"""Units counted as they were before ``shrink`` removed some: what is gone from the tensors is not alive."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.channels import Costs, Surgery, UniformSizes
from torch_flowprune.inputs import Target
from torch_flowprune.scoring.candidates.candidate import Candidate, Candidates, Whole
from torch_flowprune.scoring.granularity import Blocks


@dataclass(frozen=True, eq=False)
class Origin:
    """What a candidate was when counting began, as plain values.

    Attributes:
        units: how many units it had.
        shape, weight_shape, weights: as the candidate had them.
        now: the shape that its tensors have since.
        kept: which of the units these still have, (units,) bool; None: all.
        costs: of the model as it was.
    """

    units: int
    shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    weights: int
    now: tuple[int, ...]
    kept: Tensor | None = None
    costs: Costs | None = None

    @classmethod
    def of(cls, one: Candidate) -> Origin:
        return cls(len(one), one.shape, one.weight_shape, one.weights, one.shape, costs=one.costs)

    def after(self, one: Candidate, surgery: Surgery) -> Origin:
        """Once the candidate, which this is the origin of, has been cut.

        Raises:
            ValueError: where parts of its units would stay.
        """
        staying = one.staying(surgery.keep)
        kept = torch.ones(self.units, dtype=torch.bool) if self.kept is None else self.kept.clone()
        kept[kept.clone()] = staying.cpu()
        flat = one.shape == (len(one),)  # a group of channels is as long as it has units
        now = (int(staying.sum()),) if flat else surgery.shape(one.name, one.shape)
        return replace(self, kept=None if bool(kept.all()) else kept, now=now)

    def to_dict(self) -> dict[str, Any]:
        """Without the costs, which are the model's."""
        words = ("units", "shape", "weight_shape", "weights", "now", "kept")
        return {word: list(value) if isinstance(value := getattr(self, word), tuple) else value for word in words}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], costs: Costs | None) -> Origin:
        words: dict[str, Any] = {word: tuple(v) if isinstance(v, list) else v for word, v in data.items()}
        return cls(**words, costs=costs)


def changes(found: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, ...]]) -> list[str]:
    """How the shapes of a model's layers differ from what they are known to be, a text for each."""
    added = [f"{name} was added" for name in found if name not in known]
    gone = [f"{name} is gone" for name in known if name not in found]
    shapes = [(name, shape, known[name]) for name, shape in found.items() if name in known]
    return [*added, *gone, *(f"{name} has shape {now} instead of {then}" for name, now, then in shapes if now != then)]


def counted_from(origins: Mapping[str, Origin], found: Candidates) -> Candidates:
    """The candidates of a model, counted as they were."""
    same = all((one.shape, one.weights) == (origins[name].shape, origins[name].weights) for name, one in found.items())
    if same and len(found) == len(origins):
        return found
    return {
        name: Survivors(found[name], origin) if name in found else Gone(name, origin)
        for name, origin in origins.items()
    }


@dataclass(frozen=True, eq=False)
class Survivors(Whole):
    """What is left of a candidate, under the numbers that its units began with."""

    left: Candidate
    origin: Origin

    @property
    def name(self) -> str:
        return self.left.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.origin.shape

    @property
    def read(self) -> tuple[str, ...]:
        return self.left.read

    @property
    def kind(self) -> Hashable:
        return self.left.kind

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.origin.weight_shape

    @property
    def structured(self) -> bool:
        return self.left.structured

    @property
    def coupled(self) -> bool:
        return self.left.coupled

    @property
    def multiple(self) -> int:
        return self.left.multiple

    @property
    def output_axis(self) -> int | None:
        return self.left.output_axis

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.left.targets

    @property
    def blocks(self) -> Blocks | None:
        return self.left.blocks

    @property
    def costs(self) -> Costs | None:
        return self.origin.costs

    @property
    def alike(self) -> Callable[[Collection[str]], UniformSizes] | None:
        return self.left.alike

    @property
    def weights(self) -> int:
        return self.origin.weights

    def __len__(self) -> int:
        return self.origin.units

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Of a unit that is gone, those of another: a score that nobody reads, and finite."""
        rows = self.left.rows(tensors)
        return rows.index_select(0, (self._kept(rows.device).cumsum(0) - 1).clamp(min=0))

    def alive(self) -> Tensor | None:
        alive, kept = self.left.alive(), self._kept(self.targets[0].parameter.device).clone()
        if alive is not None:
            kept[kept.clone()] = alive
        return kept

    def clear_removed(self, masks: dict[str, Tensor], keep: Tensor) -> None:
        self.left.clear_removed(masks, keep[self._kept(keep.device)])

    def kept_weights(self, kept_units: int) -> Tensor | int:
        return self.left.kept_weights(kept_units)

    def staying(self, keep: Mapping[str, Mapping[int, Tensor]]) -> Tensor:
        return self.left.staying(keep)

    def renewed(self, known: Mapping[str, Target]) -> Survivors:
        return replace(self, left=self.left.renewed(known))

    def _kept(self, device: torch.device) -> Tensor:
        kept = self.origin.kept
        return torch.ones(len(self), dtype=torch.bool, device=device) if kept is None else kept.to(device)


@dataclass(frozen=True, eq=False)
class Gone(Whole):
    """A candidate that is no more: units that are gone, and count as such."""

    name: str
    origin: Origin
    read: tuple[str, ...] = ()
    kind: Hashable = None
    structured: bool = False
    coupled: bool = True
    targets: tuple[Target, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.origin.shape

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.origin.weight_shape

    @property
    def costs(self) -> Costs | None:
        return self.origin.costs

    @property
    def weights(self) -> int:
        return self.origin.weights

    def __len__(self) -> int:
        return self.origin.units

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002 - there is nothing to read
        return torch.zeros(len(self), 1, device="cpu")

    def alive(self) -> Tensor | None:
        return torch.zeros(len(self), dtype=torch.bool, device="cpu")

    def clear_removed(self, masks: dict[str, Tensor], keep: Tensor) -> None:
        """Nothing is left to be masked."""

    def kept_weights(self, kept_units: int) -> Tensor | int:  # noqa: ARG002
        return 0

    def staying(self, keep: Mapping[str, Mapping[int, Tensor]]) -> Tensor:  # noqa: ARG002
        return torch.zeros(0, dtype=torch.bool)

    def renewed(self, known: Mapping[str, Target]) -> Gone:  # noqa: ARG002
        return self
