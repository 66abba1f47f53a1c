"""The layers of a prune: how many units each has, has left, and may lose; and the pools that rules make of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property

from torch_flowprune.scoring import Candidates, lefts
from torch_flowprune.selection.goal import Goal
from torch_flowprune.selection.plan import Pool, Pools, Split
from torch_flowprune.selection.rules import (
    SHARE_RULES,
    Bounds,
    LayerUnits,
    Levels,
    ShareRule,
    counted_exactly,
    narrowest,
)


class Layers:
    """What may go, by name, as it is before the first round."""

    def __init__(
        self, found: Candidates, bounds: Bounds, multiples: Mapping[str, int], levels: Levels | None = None
    ) -> None:
        self.found, self.bounds, self.units, self.multiples = found, bounds, bounds.units, multiples
        self.levels = levels
        self.left = dict(zip(found, lefts(found), strict=True))
        self.total = sum(self.units.values())

    @property
    def are_rounded(self) -> bool:
        """Whether any of them cannot keep any number of units."""
        return any(multiple > 1 for multiple in self.multiples.values())

    @cached_property
    def least(self) -> dict[str, int]:
        """How many units each layer keeps at least, in whole multiples."""
        least = self.bounds.least
        return {name: narrowest(least[name], left, self.multiples[name]) for name, left in self.left.items()}

    @cached_property
    def shapes(self) -> list[LayerUnits]:
        """What rules see."""
        return [LayerUnits(name, candidate.weight_shape, len(candidate)) for name, candidate in self.found.items()]

    def removable(self, left: Mapping[str, int]) -> int:
        """How many units may still go."""
        return sum(max(0, count - self.bounds.least[name]) for name, count in left.items())

    def one_pool(self, steps: int, left: Mapping[str, int]) -> Pools:
        """All layers in one ranking, a unit a step."""
        return [Pool(tuple(self.units), self.total - sum(left.values()) + steps)]

    def at(self, rule: ShareRule) -> Split:
        """Every layer by itself, at the sparsity of ``steps`` units in all."""

        def split(steps: int, left: Mapping[str, int]) -> Pools:
            shares = self._shares(rule, steps / self.total if self.total else 0.0)
            return [
                Pool((name,), min(max(round(shares[name]), self.units[name] - count), self.bounds.most(name, count)))
                for name, count in left.items()
            ]

        return split

    def ranked(self, goal: Goal) -> tuple[Pools, ...]:
        """One ranking over all layers."""
        return tuple([Pool(tuple(self.units), gone)] for gone in self._path(goal))

    @cached_property
    def kinds(self) -> list[tuple[str, ...]]:
        """The layers of each kind."""
        found: dict[object, list[str]] = {}
        for name, candidate in self.found.items():
            found.setdefault(candidate.kind, []).append(name)
        return [tuple(names) for names in found.values()]

    def by_kind(self, goal: Goal) -> tuple[Pools, ...]:
        """One ranking a kind of layer; all kinds to the same sparsity, and exactly so many in all."""
        sizes = [sum(self.units[name] for name in names) for names in self.kinds]
        most = [sum(self.bounds.most(name, self.left[name]) for name in names) for names in self.kinds]
        gone = [sum(self.units[name] - self.left[name] for name in names) for names in self.kinds]
        rounds = []
        for total in self._path(goal):
            gone = counted_exactly([total * size / max(self.total, 1) for size in sizes], total, gone, most)
            rounds.append([Pool(names, count) for names, count in zip(self.kinds, gone, strict=True)])
        return tuple(rounds)

    def kinds_at(self, steps: int, left: Mapping[str, int]) -> Pools:
        """Every kind at the sparsity of ``steps`` units in all, as far as its bounds go."""
        pools = []
        for names in self.kinds:
            size, gone = sum(self.units[one] for one in names), sum(self.units[one] - left[one] for one in names)
            wanted = round(steps * size / max(self.total, 1))
            pools.append(Pool(names, min(max(wanted, gone), sum(self.bounds.most(one, left[one]) for one in names))))
        return pools

    def each(self, goals: Mapping[str, Goal]) -> tuple[Pools, ...]:
        """Every layer to a goal of its own: global pruning, one layer at a time."""
        paths = {name: self._path(goal, name) for name, goal in goals.items()}
        return tuple(
            [Pool((name,), path[round_]) for name, path in paths.items()]
            for round_ in range(len(next(iter(paths.values()))))
        )

    def given(self, sparsities: Mapping[str, float], goal: Goal) -> tuple[Pools, ...]:
        """Some layers to sparsities of their own; the others make up for the rest, or stay where no total is given.

        All of them get there together: after a round each has come as much of its way as the total has.
        """
        rest = tuple(name for name in self.units if name not in sparsities)
        pools = [*((name,) for name in sparsities), *([rest] if rest else [])]
        start = [sum(self.units[name] - self.left[name] for name in names) for names in pools]
        end = self._ends(sparsities, rest, goal)
        gone, last = sum(start), sum(end)
        wanted = last if goal.is_open else min(max(gone, self._wanted(goal)), last)
        rounds = [start]
        for total in goal.path(self.total, gone, wanted):
            way = (total - gone) / (last - gone) if last > gone else 1.0
            shares = [first + (final - first) * way for first, final in zip(start, end, strict=True)]
            rounds.append(counted_exactly(shares, total, rounds[-1], end))
        return tuple([Pool(*pool) for pool in zip(pools, counts, strict=True)] for counts in rounds[1:])

    def _ends(self, sparsities: Mapping[str, float], rest: tuple[str, ...], goal: Goal) -> list[int]:
        """How many are gone in the end of each layer that a mapping names, and of all others together."""
        goals = {name: replace(goal, sparsity=share, amount=None, rounds=1) for name, share in sparsities.items()}
        named = [self._path(one, name)[-1] for name, one in goals.items()]
        left = {name: self.left[name] for name in rest}
        gone, taken = sum(self.units[name] - left[name] for name in rest), sum(named)
        total = taken + gone if goal.is_open else goal.end(self.total, self._wanted(goal))
        if not rest:
            if abs(total - taken) > self._slack(sparsities):
                raise ValueError(
                    f"allocation= gives every layer its sparsity, {taken / self.total:.4g} in all: leave sparsity= "
                    "and amount= out"
                )
            return named
        if gone - (total - taken) > self._slack(rest):
            raise ValueError(
                f"allocation= takes {taken:,} units from the layers it names, and {total:,} should be pruned in total, "
                f"{gone:,} of them elsewhere already: raise sparsity=, or lower what it names"
            )
        others = max(gone, total - taken)
        self.bounds.check_total(others, left)
        return [*named, others]

    def ruled(self, rule: ShareRule, goal: Goal) -> tuple[Pools, ...]:
        """Every layer its share by a rule, and exactly so many in all."""
        gone = {name: self.units[name] - count for name, count in self.left.items()}
        rounds = []
        for total in self._path(goal):
            shares = self._shares(rule, total / self.total if self.total else 0.0)
            most = [self.bounds.most(name, count) for name, count in self.left.items()]
            counts = counted_exactly([shares[name] for name in gone], total, list(gone.values()), most)
            gone = dict(zip(gone, counts, strict=True))
            rounds.append([Pool((name,), count) for name, count in gone.items()])
        return tuple(rounds)

    def by_row(self, goal: Goal) -> tuple[Pools, ...]:
        """Every output of every layer the same: a pool says how many of one output's weights are gone."""
        if goal.sparsity is None:
            raise ValueError("allocation='row' takes sparsity=, the fraction of each output's weights that are pruned")
        if split := [
            name for name, one in self.found.items() if one.shard is not None and one.shard.cut - {one.output_axis}
        ]:
            raise ValueError(
                f"allocation='row' ranks the weights of each output, and those of {', '.join(split[:5])} lie on "
                "several ranks: take allocation='layer', or shard these by their outputs"
            )
        lengths = {one.name: one.units // one.shape[0] for one in self.shapes}
        paths = {name: goal.path(length, 0, goal.gone(length, length)) for name, length in lengths.items()}
        return tuple([Pool((name,), path[round_]) for name, path in paths.items()] for round_ in range(goal.rounds))

    def _shares(self, rule: ShareRule, sparsity: float) -> dict[str, float]:
        given = rule(self.shapes, sparsity)
        if missing := [name for name in self.units if name not in given]:
            raise ValueError(f"the allocation gave no sparsity for {', '.join(missing[:5])}: it takes all layers")
        if odd := [name for name in self.units if not -1e-9 <= given[name] <= 1 + 1e-9]:
            raise ValueError(f"the allocation gave {given[odd[0]]!r} for {odd[0]!r}: expected a sparsity from 0 to 1")
        return {name: given[name] * self.units[name] for name in self.units}

    def _slack(self, names: Collection[str]) -> int:
        """How many units more than were asked for may be gone, as widths were rounded down."""
        if self.levels is not None:
            return sum(max(self.multiples[name], self.levels.step(name)) for name in names)
        return sum(self.multiples[name] - 1 for name in names)

    def _wanted(self, goal: Goal) -> int:
        return goal.gone(self.total, sum(self.left.values()))

    def _path(self, goal: Goal, name: str | None = None) -> tuple[int, ...]:
        """Of one layer, or of all of them together."""
        left = self.left if name is None else {name: self.left[name]}
        total = sum(self.units[one] for one in left)
        gone = total - sum(left.values())
        wanted = goal.gone(total, total - gone)
        if gone - wanted > self._slack(left):
            where = "the model" if name is None else repr(name)
            raise goal.too_low(f"{where} is already at sparsity {gone / total:.4g}")
        wanted = max(wanted, gone)
        if name is not None and self.bounds.word[name] == "one unit a layer":
            wanted = min(wanted, self.bounds.most(name, left[name]))  # equal fractions, but nothing is emptied
        self.bounds.check_total(wanted, left)
        return goal.path(total, gone, wanted)


def check_rule_of_blocks(rule: object, normalize: str | None) -> None:
    """An error for what compares the units of one layer: a block is one unit."""
    if normalize not in (None, "default"):
        raise ValueError(
            f"normalize={normalize!r} compares the units of a layer, and a block is one unit: leave it out"
        )
    if rule in ("layer", "lamp", *SHARE_RULES):
        raise ValueError(
            f"allocation={rule!r} compares the units of a layer, and a block is one unit: leave it out, or take "
            "allocation='isomorphic', the same fraction of each kind of block"
        )
