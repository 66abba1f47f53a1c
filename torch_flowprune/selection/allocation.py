"""How much goes from which layers, round by round, and the choice of what stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import ceil, isclose

import torch
from torch import Tensor

from torch_flowprune.scoring import Blocks, Candidate, Candidates, LayerScores, Scores, lefts
from torch_flowprune.selection.budget import Budget, living_units
from torch_flowprune.selection.lowest_k import Cut, lowest, lowest_in_blocks, with_floors
from torch_flowprune.selection.sampled_bracket import numbers
from torch_flowprune.selection.schedules import Schedule, fraction, steps, to_prune


@dataclass(frozen=True)
class Pool:
    """Layers ranked together, and how much is gone after each round: of their units, or of a budget."""

    names: tuple[str, ...]
    gone_after: tuple[int, ...]
    budget: Budget | None = None


def pools(
    found: Candidates,
    sparsity: float | None,
    amount: float | None,
    scope: str,
    rounds: int,
    schedule: str | Schedule,
    cost: str = "units",
    least: Mapping[str, int] | None = None,
) -> list[Pool]:
    """Pruning each layer to one sparsity is global pruning of one layer at a time."""
    if scope not in ("global", "layer"):
        raise ValueError(
            "scope should be 'global' (one ranking over all layers) or 'layer' (each to the same sparsity), got "
            f"{scope!r}"
        )
    if (budget := Budget.of(found, cost, least)) is not None:
        if scope != "global":
            raise ValueError(
                f"cost={cost!r} is of the whole model, which scope={scope!r} has no part in: leave scope= out"
            )
        return [_within(budget, found, sparsity, amount, rounds, schedule)]
    counts = {name: len(candidate) for name, candidate in found.items()}
    left = dict(zip(found, numbers(lefts(found)), strict=True))
    groups = [tuple(found)] if scope == "global" else [(name,) for name in found]
    if (blocks := _blocks(found)) is not None:
        _check_pattern(blocks, sparsity, amount, rounds)
        return [
            Pool(group, (sum(counts[name] for name in group) * (blocks.m - blocks.n) // blocks.m,)) for group in groups
        ]
    return [_pool(group, counts, left, sparsity, amount, rounds, schedule) for group in groups]


def gone_share(found: Candidates, cost: str = "units") -> float:
    """The share that is gone already, of what ``cost`` counts."""
    if (budget := Budget.of(found, cost)) is not None:
        return 1 - budget.left(living_units(found)) / budget.total
    total = sum(map(len, found.values()))
    return 1 - sum(numbers(lefts(found))) / total if total else 0.0


def _within(
    budget: Budget,
    found: Candidates,
    sparsity: float | None,
    amount: float | None,
    rounds: int,
    schedule: str | Schedule,
) -> Pool:
    """All layers, down to a share of what the model costs: never above it, so goals are rounded up."""
    units, total = living_units(found), budget.total
    gone = total - budget.left(units)
    goal = _goal(total, total - gone, sparsity, amount, lambda share: ceil(Fraction(str(share)) * total))
    if goal < gone and budget.is_overdrawn(units, total - goal):
        raise ValueError(
            _too_low(f"the model is already at sparsity {gone / total:.4g} of its {budget.cost}", sparsity)
        )
    budget.check_reachable(units, total - goal)
    return Pool(tuple(found), _path(total, gone, max(goal, gone), rounds, schedule), budget)


def _goal(total: int, left: int, sparsity: float | None, amount: float | None, counted: Callable[[float], int]) -> int:
    """How much is to be gone after the call."""
    if (sparsity is None) == (amount is None):
        raise ValueError(
            "give sparsity= (of all prunable units, after the call) or amount= (torch's: of what is left), one of "
            "the two"
        )
    return counted(fraction(sparsity)) if sparsity is not None else total - left + to_prune(amount, left)  # type: ignore[arg-type]


def _path(total: int, gone: int, goal: int, rounds: int, schedule: str | Schedule) -> tuple[int, ...]:
    shares = steps(schedule, rounds, gone / total if total else 0.0, goal / total if total else 0.0)
    return (*(max(gone, round(share * total)) for share in shares[:-1]), goal)


def _too_low(already: str, sparsity: float | None) -> str:
    return (
        f"{already}, and what is pruned stays pruned: sparsity={sparsity} is lower; give a higher one, or amount= "
        "for a share of what is left"
    )


def _blocks(found: Candidates) -> Blocks | None:
    """The n:m pattern, where there is one.

    Of all or of none, for units of another kind are ranked and blocks are not.
    """
    patterns = [candidate.blocks for candidate in found.values()]
    if None in patterns and any(patterns):
        raise ValueError(
            "granularity= gives n:m blocks for some parameters and other units for the rest: prune them in two "
            "calls, with include="
        )
    return next(iter(patterns), None)


def _pool(
    names: tuple[str, ...],
    counts: dict[str, int],
    lefts: dict[str, int],
    sparsity: float | None,
    amount: float | None,
    rounds: int,
    schedule: str | Schedule,
) -> Pool:
    total, left = sum(counts[name] for name in names), sum(lefts[name] for name in names)
    gone = total - left
    goal = _goal(total, left, sparsity, amount, lambda share: round(share * total))
    if goal < gone:
        where = "the model" if len(names) > 1 else repr(names[0])
        raise ValueError(_too_low(f"{where} is already at sparsity {gone / total:.4g}", sparsity))
    return Pool(names, _path(total, gone, goal, rounds, schedule))


def _check_pattern(blocks: Blocks, sparsity: float | None, amount: float | None, rounds: int) -> None:
    """For n:m blocks the pattern says how much goes (more, where single weights went before).

    Anything else asked for is a contradiction.
    """
    own = 1 - blocks.n / blocks.m
    if amount is not None or rounds != 1 or not (sparsity is None or isclose(fraction(sparsity), own)):
        raise ValueError(
            f"granularity '{blocks.n}:{blocks.m}' is sparsity {own:g} in one round: leave sparsity=, amount= and "
            "rounds= out"
        )


def floors(found: Candidates, min_keep: float | None, cost: str = "units") -> dict[str, int] | None:
    """How many units each layer keeps at least: with a cost one, for ``shrink`` to leave something of each layer."""
    if cost != "units":
        return {
            name: max(1, least) for name, least in (floors(found, 0 if min_keep is None else min_keep) or {}).items()
        }
    if min_keep is None:
        return None
    if (
        isinstance(min_keep, bool)
        or not isinstance(min_keep, (int, float))
        or not min_keep >= 0
        or (isinstance(min_keep, float) and min_keep > 1)
    ):
        raise ValueError(
            "min_keep should be a number of units a layer keeps (int) or a fraction of the layer (float from 0 to "
            f"1), got {min_keep!r}"
        )
    if _blocks(found) is not None:
        raise ValueError(f"min_keep={min_keep} has no part in n:m blocks, which keep n of every m: leave it out")
    counts = {name: len(candidate) for name, candidate in found.items()}
    # 0.7 of 10 is 7.000000000000001 in floating point, and 7 all the same.
    return {
        name: min(min_keep, count) if isinstance(min_keep, int) else ceil(round(min_keep * count, 6))
        for name, count in counts.items()
    }


def check_rounds(rounds: int, given: Scores | None, data: object) -> None:
    """Several rounds score anew, which fixed scores and a one-shot iterator do not allow."""
    if rounds > 1 and given is not None:
        raise ValueError(
            f"rounds={rounds} scores anew before each round, and scores= are fixed: leave one of the two out"
        )
    if rounds > 1 and data is not None and isinstance(data, Iterator):
        raise ValueError(
            f"rounds={rounds} reads the data in every round, and this iterator can be read only once: pass a list or "
            "a DataLoader"
        )


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
            [scores.values_[name] for name in pool.names],
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
