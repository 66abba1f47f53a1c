"""Which units stay: the lowest of each pool go, as many as its plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_flowprune.inputs import no_collection
from torch_flowprune.scoring import (
    Candidate,
    Candidates,
    LayerScores,
    Scores,
    all_stored,
    lefts,
    ranks_of,
    totals,
)
from torch_flowprune.selection.plan import Plan, Pool, Pools
from torch_flowprune.selection.ranking import (
    Cut,
    lowest,
    lowest_in_blocks,
    lowest_of_each,
    tied_in_blocks,
    with_floors,
)
from torch_flowprune.selection.rules import comparable, rounded


@dataclass(frozen=True)
class Choice:
    """What stays.

    Attributes:
        keeps: one flag a unit, by candidate.
        kept: how many units.
        threshold: the highest score that went; None where nothing did, and where each block or output has its own.
        tied: how many units that stay tie with the last that went, of all, or of their block or output.
        why: what decided how many each layer keeps.
    """

    keeps: dict[str, Tensor]
    kept: dict[str, int]
    threshold: float | None
    tied: int
    why: dict[str, str]


@no_collection()
def choose(found: Candidates, scores: Scores, plan: Plan, round_: int) -> Choice:
    """The units that stay in a round of a plan."""
    if plan.blocks is not None:
        return _of_parts(found, scores, plan.why, lambda name, value: _cut_blocks(found[name], value))
    ranking = _Ranking(found, scores, plan)
    if plan.by_row:
        return ranking.by_row(plan.rounds[round_])
    return ranking.cut(ranking.spent(round_) if plan.spending is not None else plan.rounds[round_])


def counted(found: Candidates, keeps: Mapping[str, Tensor]) -> dict[str, int]:
    """How many units of each candidate flags keep."""
    return dict(zip(found, totals(found, [keeps[name] for name in found]), strict=True))


class _Ranking:
    """Candidates with their scores, ranked as a plan says."""

    def __init__(self, found: Candidates, scores: Scores, plan: Plan) -> None:
        self.found, self.plan = found, plan
        self.left = dict(zip(found, lefts(found), strict=True))
        self.alive = {name: candidate.alive() for name, candidate in found.items()}
        self.held = {name: candidate.shard for name, candidate in found.items()}
        self.scores, self.values = scores, self._to_rank(scores)

    def _to_rank(self, scores: Scores) -> Mapping[str, LayerScores]:
        """The scores as they are kept; stored where they are read more than once: by a bisection, or by layer first."""
        normalizer = self.plan.comparable
        if normalizer is not None:
            return all_stored(self.found, scores, self._comparable)
        return (
            all_stored(self.found, scores)
            if self.plan.spending is not None
            else {n: scores.stored(n) for n in self.found}
        )

    def _comparable(self, name: str, value: Tensor) -> Tensor:
        """A layer's scores made comparable; of shards, of the whole layer, put together for a moment."""
        normalizer, held, alive = self.plan.comparable, self.held[name], self.alive[name]
        assert normalizer is not None
        if held is None:
            return comparable(value, alive, normalizer)
        every = None if alive is None else held.gathered(alive)
        return held.part(comparable(held.gathered(value), every, normalizer)).clone()

    def spent(self, round_: int) -> Pools:
        """The fewest steps that bring every budget down to its target."""
        spending, left = self.plan.spending, self.left
        assert spending is not None
        most, steps = spending.steps(left), 0
        for one in spending.allowances:
            steps = one.budget.fewest(
                lambda k: self.cut(spending.split(k, left)).keeps, most, one.after(round_), from_=steps
            )
        return spending.split(steps, left)

    def cut(self, pools: Pools) -> Choice:
        """The lowest of each pool go; then every layer's width is rounded, if the plan says so."""
        cuts = self._cuts(pools)
        kept = {name: count for names, cut in cuts for name, count in zip(names, cut.kept, strict=True)}
        even = self._even(kept)
        if even is not kept:
            kept = even
            cuts = self._cuts([self._down_to(name, count) for name, count in kept.items()])
        keeps = {name: keep for names, cut in cuts for name, keep in zip(names, cut.keep, strict=True)}
        thresholds = [cut.threshold for _, cut in cuts if cut.threshold is not None]
        tied = sum(cut.tied for _, cut in cuts)
        return Choice(
            {name: keeps[name] for name in self.found},
            {name: kept[name] for name in self.found},
            max(thresholds, default=None),
            tied,
            self._why(kept),
        )

    def _even(self, kept: dict[str, int]) -> dict[str, int]:
        """The widths that a plan allows which are nearest to these."""
        plan = self.plan
        if plan.levels is not None:
            return plan.levels.levelled(kept, self.left, plan.bounds.least)
        return rounded(kept, self.left, plan.bounds.least, plan.multiples) if plan.multiples else kept

    def by_row(self, pools: Pools) -> Choice:
        """The lowest of every output go."""
        gone = {pool.names[0]: pool.gone for pool in pools}
        return _of_parts(
            self.found, self.scores, self.plan.why, lambda name, value: _cut_rows(self.found[name], value, gone[name])
        )

    def _down_to(self, name: str, count: int) -> Pool:
        return Pool((name,), self.plan.bounds.units[name] - count)

    def _cuts(self, pools: Pools) -> list[tuple[tuple[str, ...], Cut]]:
        """The lowest of each pool; layers that are a pool each, and stay above their floors, are cut together."""
        bounds = self.plan.bounds
        more: dict[tuple[str, ...], int] = {}
        for pool in pools:
            if len(pool.names) == 1 and pool.gone <= bounds.most(pool.names[0], self.left[pool.names[0]]):
                more[pool.names] = self._more(pool)
        names = [names[0] for names in more]
        each = lowest_of_each(
            [self.values[name] for name in names],
            list(more.values()),
            [self.alive[name] for name in names],
            [self.held[name] for name in names],
        )
        together = dict(zip(more, each, strict=True))
        return [(pool.names, together.get(pool.names) or self._lowest(pool)) for pool in pools]

    def _lowest(self, pool: Pool) -> Cut:
        values, alive = [self.values[name] for name in pool.names], [self.alive[name] for name in pool.names]
        floors, more = [self.plan.bounds.least[name] for name in pool.names], self._more(pool)
        held = [self.held[name] for name in pool.names]
        if any(floors):
            return with_floors(values, more, floors, alive, held)
        return lowest(values, more, alive, held)

    def _more(self, pool: Pool) -> int:
        """How many go besides those that are gone; none where rounded widths have taken more than that already."""
        return max(0, pool.gone - sum(self.plan.bounds.units[name] - self.left[name] for name in pool.names))

    def _why(self, kept: Mapping[str, int]) -> dict[str, str]:
        bounds = self.plan.bounds
        held = {
            name: f"held at {count} by {bounds.word[name]}"
            for name, count in kept.items()
            if bounds.word[name] and count == bounds.least[name] < self.left[name]
        }
        return {name: held.get(name, self.plan.why + self._rounding(name)) for name in self.found}

    def _rounding(self, name: str) -> str:
        multiple = self.plan.multiples.get(name, 1)
        text = f", a multiple of {multiple}" if multiple > 1 else ""
        return text if self.plan.levels is None else f"{text}, uniform"


def _of_parts(found: Candidates, scores: Scores, why: str, cut: Callable[[str, Tensor], tuple[Tensor, int]]) -> Choice:
    """A choice made in each block, or each output, by itself: what stays of each layer, and how many of it tie."""
    ties = []

    def kept(name: str, value: Tensor) -> Tensor:
        keep, tied = cut(name, value)
        held = found[name].shard
        ties.append(tied if held is None or held.counts else 0)
        return keep

    keeps = all_stored(found, scores, kept)
    (tied,) = ranks_of(found).add_up([sum(ties)])
    return Choice(keeps, counted(found, keeps), None, tied, dict.fromkeys(keeps, why))


def _cut_blocks(candidate: Candidate, scores: Tensor) -> tuple[Tensor, int]:
    blocks, left = candidate.blocks, candidate.alive()
    assert blocks is not None
    shaped, alive = scores.view(-1, blocks.m), None if left is None else left.view(-1, blocks.m)
    keep = lowest_in_blocks(shaped, blocks.m - blocks.n, alive)
    return keep.flatten(), tied_in_blocks(shaped, keep, alive)


def _cut_rows(candidate: Candidate, scores: Tensor, gone: int) -> tuple[Tensor, int]:
    """Scores of single weights with the outputs first, cut row by row, and back in the weights' order."""
    axis, left = candidate.output_axis, candidate.alive()
    assert axis is not None

    shape = candidate.shape if candidate.shard is None else candidate.shard.box.size

    def rows(values: Tensor) -> Tensor:
        return values.view(shape).movedim(axis, 0).flatten(1)

    shaped, alive = rows(scores), None if left is None else rows(left)
    keep = lowest_in_blocks(shaped, gone, alive)
    moved = torch.empty(shape, device="meta").movedim(axis, 0).shape
    return keep.view(moved).movedim(0, axis).reshape(-1), tied_in_blocks(shaped, keep, alive)
