"""How much goes from which layers, round by round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, isclose

import torch
from torch import Tensor, nn

from torch_flowprune.schedules import Schedule, fraction, steps, to_prune
from torch_flowprune.scoring import Cuts, Scores
from torch_flowprune.selection import numbers
from torch_flowprune.targets import parameters_of
from torch_flowprune.units import Blocks, alive


@dataclass(frozen=True)
class Pool:
    """Layers ranked together, and how many of their units are gone after each round."""

    names: tuple[str, ...]
    gone_after: tuple[int, ...]


def pools(cuts: Cuts, sparsity: float | None, amount: float | None, scope: str, rounds: int, schedule: str | Schedule) -> list[Pool]:
    """Pruning each layer to one sparsity is global pruning of one layer at a time."""
    if scope not in ("global", "layer"):
        raise ValueError(f"scope should be 'global' (one ranking over all layers) or 'layer' (each to the same sparsity), got {scope!r}")
    counts = {name: len(units.rows(target.parameter)) for name, (target, units) in cuts.items()}
    left = dict(zip(cuts, numbers(lefts(cuts)), strict=True))
    groups = [tuple(cuts)] if scope == "global" else [(name,) for name in cuts]
    if (blocks := next((units for _, units in cuts.values() if isinstance(units, Blocks)), None)) is not None:
        _check_pattern(blocks, sparsity, amount, rounds)
        return [Pool(group, (sum(counts[name] for name in group) * (blocks.m - blocks.n) // blocks.m,)) for group in groups]
    return [_pool(group, counts, left, sparsity, amount, rounds, schedule) for group in groups]


def _pool(
    names: tuple[str, ...], counts: dict[str, int], lefts: dict[str, int], sparsity: float | None, amount: float | None, rounds: int, schedule: str | Schedule
) -> Pool:
    total, left = sum(counts[name] for name in names), sum(lefts[name] for name in names)
    gone = total - left
    if (sparsity is None) == (amount is None):
        raise ValueError("give sparsity= (of all prunable units, after the call) or amount= (torch's: of what is left), one of the two")
    goal = gone + to_prune(amount, left) if sparsity is None else round(fraction(sparsity) * total)  # type: ignore[arg-type]
    if goal < gone:
        where = "the model" if len(names) > 1 else repr(names[0])
        raise ValueError(
            f"{where} is already at sparsity {gone / total:.4g}, and what is pruned stays pruned: sparsity={sparsity} is lower; "
            "give a higher one, or amount= for a share of what is left"
        )
    path = steps(schedule, rounds, gone / total if total else 0.0, goal / total if total else 0.0)
    return Pool(names, tuple(max(gone, round(step * total)) for step in path))


def _check_pattern(blocks: Blocks, sparsity: float | None, amount: float | None, rounds: int) -> None:
    """For n:m blocks the pattern says how much goes (more, where single weights went before); anything else asked for is a contradiction."""
    own = 1 - blocks.n / blocks.m
    if amount is not None or rounds != 1 or not (sparsity is None or isclose(fraction(sparsity), own)):
        raise ValueError(f"granularity '{blocks.n}:{blocks.m}' is sparsity {own:g} in one round: leave sparsity=, amount= and rounds= out")


def floors(cuts: Cuts, min_keep: float | None) -> dict[str, int] | None:
    """How many units each layer keeps at least."""
    if min_keep is None:
        return None
    if isinstance(min_keep, bool) or not isinstance(min_keep, (int, float)) or not min_keep >= 0 or (isinstance(min_keep, float) and min_keep > 1):
        raise ValueError(f"min_keep should be a number of units a layer keeps (int) or a fraction of the layer (float from 0 to 1), got {min_keep!r}")
    counts = {name: len(units.rows(target.parameter)) for name, (target, units) in cuts.items()}
    # 0.7 of 10 is 7.000000000000001 in floating point, and 7 all the same.
    return {name: min(min_keep, count) if isinstance(min_keep, int) else ceil(round(min_keep * count, 6)) for name, count in counts.items()}


def lefts(cuts: Cuts) -> list[Tensor | int]:
    """How many units of each parameter are left."""
    return [
        len(units.rows(target.parameter)) if target.mask is None else torch.count_nonzero(alive(units, target.mask)) for target, units in cuts.values()
    ]


def alive_units(cuts: Cuts, name: str) -> Tensor | None:
    target, units = cuts[name]
    return None if target.mask is None else alive(units, target.mask)


def check_rounds(rounds: int, given: Scores | None, data: object) -> None:
    if rounds > 1 and given is not None:
        raise ValueError(f"rounds={rounds} scores anew before each round, and scores= are fixed: leave one of the two out")
    if rounds > 1 and data is not None and isinstance(data, Iterator):
        raise ValueError(f"rounds={rounds} reads the data in every round, and this iterator can be read only once: pass a list or a DataLoader")


def current(model: nn.Module, cuts: Cuts) -> Cuts:
    """The same cuts with the masks that the model has now."""
    known = parameters_of(model)
    return {name: (known[name], units) for name, (_, units) in cuts.items()}
