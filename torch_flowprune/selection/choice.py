"""Which units stay: the lowest of each pool go, as many as its goal says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torch_flowprune.scoring import Candidate, Candidates, LayerScores, Scores, lefts
from torch_flowprune.selection.allocation import Pool
from torch_flowprune.selection.lowest_k import Cut, lowest, lowest_in_blocks, with_floors
from torch_flowprune.selection.sampled_bracket import numbers


@dataclass(frozen=True)
class Choice:
    """What stays: one flag a unit by candidate, and how many; the highest score that went.

    How many units that stay tie with it.
    """

    keeps: dict[str, Tensor]
    kept: dict[str, int]
    threshold: float | None
    tied: int


def choose(
    found: Candidates, scores: Scores, plan: Sequence[Pool], round_: int, least: dict[str, int] | None
) -> Choice:
    """The lowest of each pool go, as many as the plan says for this round."""
    keeps: dict[str, Tensor] = {}
    kept: dict[str, int] = {}
    made: list[Cut] = []
    for pool in plan:
        members = {name: found[name] for name in pool.names}
        if found[pool.names[0]].blocks is not None:
            keeps |= {name: _keep_in_blocks(candidate, scores[name]) for name, candidate in members.items()}
            kept |= counted({name: keeps[name] for name in members})
            continue
        values, alive = (
            [scores.stored(name) for name in pool.names],
            [candidate.alive() for candidate in members.values()],
        )
        cut = partial(_cut, values, alive, None if least is None else [least[name] for name in pool.names])
        made.append(cut(_how_many(pool, round_, members, cut, least)))
        keeps |= dict(zip(pool.names, made[-1].keep, strict=True))
        kept |= dict(zip(pool.names, made[-1].kept, strict=True))
    return Choice(
        keeps,
        kept,
        max((cut.threshold for cut in made if cut.threshold is not None), default=None),
        sum(cut.tied for cut in made),
    )


def counted(keeps: dict[str, Tensor]) -> dict[str, int]:
    """How many units each tensor of flags keeps."""
    return dict(zip(keeps, numbers(list(map(torch.count_nonzero, keeps.values()))), strict=True))


def _cut(values: Sequence[LayerScores], alive: Sequence[Tensor | None], least: Sequence[int] | None, k: int) -> Cut:
    return lowest(values, k, alive) if least is None else with_floors(values, k, least, alive)


def _how_many(
    pool: Pool, round_: int, members: Candidates, cut: Callable[[int], Cut], least: Mapping[str, int] | None
) -> int:
    """Units that go in this round."""
    left = numbers(lefts(members))
    if pool.budget is None:
        return pool.gone_after[round_] - sum(map(len, members.values())) + sum(left)
    most = sum(max(0, count - (least or {}).get(name, 0)) for name, count in zip(members, left, strict=True))
    return pool.budget.fewest(
        lambda k: dict(zip(members, cut(k).keep, strict=True)), most, pool.budget.total - pool.gone_after[round_]
    )


def _keep_in_blocks(candidate: Candidate, scores: Tensor) -> Tensor:
    blocks, left = candidate.blocks, candidate.alive()
    assert blocks is not None
    shaped = None if left is None else left.view(-1, blocks.m)
    return lowest_in_blocks(scores.view(-1, blocks.m), blocks.m - blocks.n, shaped).flatten()
