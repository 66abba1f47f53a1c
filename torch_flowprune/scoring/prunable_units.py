"""Which units of a model may be removed: the words that say so as one value, and the candidates they pick."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from torch import nn
from typing_extensions import TypedDict

from torch_flowprune.channels import Coupling, UniformSizes, couple, uniform_sizes
from torch_flowprune.gradients import FlowSource
from torch_flowprune.inputs import (
    Pair,
    Pattern,
    Ranks,
    holds_modules,
    parameters_and_factors,
    parameters_of,
    prunable,
    shards_of,
    untouched,
)
from torch_flowprune.scoring.candidates import (
    Alike,
    BranchUnit,
    Candidates,
    GroupUnits,
    ShardedBranch,
    ShardedGroup,
    ShardUnits,
    block_candidates,
    channel_candidates,
    label,
    parameter_candidates,
)
from torch_flowprune.scoring.granularity import SHRINKABLE, Granularity


class UnitOptions(TypedDict, total=False):
    """What a unit is and which parameters have them; :func:`~torch_flowprune.scores` has each."""

    granularity: Granularity
    parameters: Iterable[Pair] | None
    include: Pattern | Sequence[Pattern] | None
    exclude: Pattern | Sequence[Pattern] | None
    scored_by: str
    coupling: Coupling | None


@dataclass(frozen=True)
class PrunableUnits:
    """The words of :class:`UnitOptions` as one value.

    Raises:
        ValueError: where they do not go together.
    """

    granularity: Granularity = "weight"
    parameters: Iterable[Pair] | None = None
    include: Pattern | Sequence[Pattern] | None = None
    exclude: Pattern | Sequence[Pattern] | None = None
    scored_by: str = "producer"
    coupling: Coupling | None = None

    def __post_init__(self) -> None:
        if isinstance(self.parameters, Iterator):
            object.__setattr__(self, "parameters", list(self.parameters))  # read in every round
        units = label(self.granularity)
        if units != "channel" and self.scored_by != "producer":
            raise ValueError(f"scored_by={self.scored_by!r} is for granularity='channel', got granularity={units!r}")
        if not self.are_read and self.coupling is not None:
            raise ValueError(f"coupling= is for granularity='channel' and 'block', got granularity={units!r}")
        if not isinstance(self.coupling, Coupling | None):
            raise TypeError(f"coupling should be what fp.couple gives, or written by hand, got {self.coupling!r}")

    @property
    def are_read(self) -> bool:
        """Whether the units are read off the model's graph."""
        return self.granularity in SHRINKABLE

    def layers(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The parameters that these words pick, and their shapes; what there is to warn of, :meth:`of` warns of."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = parameters_and_factors(model) if self.are_read else None
            picked = prunable(model, self.parameters, self.include, self.exclude, known)
        return {target.name: tuple(target.parameter.shape) for target in picked}

    @property
    def names_modules(self) -> bool:
        """Whether some word is a module of the model itself, and says nothing of another model."""
        return self.parameters is not None or holds_modules(self.include) or holds_modules(self.exclude)

    def on(self, small: nn.Module, picked: Collection[str]) -> PrunableUnits:
        """The same of the model that took this one's place, in which the parameters picked have these names."""
        if not self.names_modules:
            return self
        known = parameters_of(small)
        pairs = [known[name].owners[0] for name in picked if name in known]
        return replace(self, parameters=pairs, include=None, exclude=None)

    def read(self, model: nn.Module, source: FlowSource) -> PrunableUnits:
        """The same with the coupling of the model, where the units are read off it and none was given."""
        if not self.are_read or self.coupling is not None:
            return self
        if source.example_inputs is None and isinstance(source.data, Iterator):
            raise ValueError(
                "channels and blocks are found with an example input, and taking one from this iterator would lose a "
                "batch: pass example_inputs= or coupling="
            )
        with untouched(model, source.data):
            return replace(self, coupling=couple(model, source.example(model)))

    def of(self, model: nn.Module, source: FlowSource, *, shards: bool = False) -> Candidates:
        """By name: the units of each parameter, or coupled channels, which an example input or a coupling shows.

        Whoever goes on with parts of a sharded model says so by ``shards``.
        """
        chosen = (self.parameters, self.include, self.exclude)
        spread = shards_of(model)
        if not self.are_read:
            ranks = Ranks.holding(spread) if spread and shards else None
            made = None if ranks is None else partial(ShardUnits, ranks=ranks)
            return parameter_candidates(model, self.granularity, *chosen, made=made)
        if spread:
            self._check_are_had_of_shards(together=shards)
        coupling = self.read(model, source).coupling
        assert coupling is not None
        if self.granularity == "block":
            branch = partial(ShardedBranch, ranks=Ranks.holding(spread)) if spread else BranchUnit
            return block_candidates(model, coupling, *chosen, branch)
        group = partial(ShardedGroup, ranks=Ranks.holding(spread)) if spread else GroupUnits
        alike = _alike_in_class(model, source, coupling)
        return channel_candidates(model, None, *chosen, self.scored_by, coupling, alike, group)

    def _check_are_had_of_shards(self, *, together: bool) -> None:
        """An error where units that are read off a graph cannot be those of a sharded model."""
        if not together:
            raise ValueError(
                f"granularity={self.granularity!r} is not supported on this sharded model: prune and shrink before "
                "the model is sharded, or use granularity='filter'"
            )
        if self.coupling is None:
            raise ValueError(
                f"granularity={self.granularity!r} on a sharded model needs coupling=: read it from the dense model, "
                "before sharding or on the meta device, and pass coupling=fp.couple(dense, example_inputs)"
            )


def _alike_in_class(model: nn.Module, source: FlowSource, coupling: Coupling) -> Alike:
    """What tells, when it is asked, which groups are of equal size in all models of the class."""

    @lru_cache(maxsize=1)
    def found(names: tuple[str, ...]) -> UniformSizes:
        if shards_of(model):
            raise ValueError(
                "uniform=True tries smaller models of the class, and this one is sharded: prune and shrink before the "
                "model is sharded, or leave uniform= out"
            )
        if source.example_inputs is None and (source.data is None or isinstance(source.data, Iterator)):
            raise ValueError(
                "uniform=True tries smaller sizes on an example input, and there is none: pass example_inputs="
            )
        with untouched(model, source.data):
            return uniform_sizes(model, coupling, source.example(model), names)

    return lambda names: found(tuple(names))
