"""Verdicts on the claims, by one rule for all of them.

The unit is a network: one architecture on one data set from one seed. A comparison made at several ages, or with
several numbers of rounds, is one network's mean over these. A claim expects a sign:

- *holds*: so many networks have it that chance would give as clear a majority, either way, in at most one case of
  twenty (the two-sided sign test);
- *holds weakly*: three in four have it;
- *the opposite holds*, *the opposite, weakly*: likewise of the other sign;
- *not seen*: anything else.

So three networks can at most hold weakly. Beside it stands, of each architecture, the mean over seeds of the paired
difference, with its 95 % interval by Student's t.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from benchmarks.paper.effects import EFFECTS, BySeed, Effect
from benchmarks.paper.rows import Row, rows_of

SURE = 0.05
MOST = 0.75
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""The 97.5 % points of Student's t, by degrees of freedom."""


@dataclass(frozen=True)
class Verdict:
    """What the networks say of one comparison."""

    claim: str
    asked: str
    sign: int
    networks: dict[str, BySeed]  # by result, each seed's mean over ages

    @property
    def differences(self) -> list[float]:
        return [value for by_seed in self.networks.values() for value in by_seed.values()]

    @property
    def agreeing(self) -> int:
        return sum(value * self.sign > 0 for value in self.differences)

    @property
    def word(self) -> str:
        return word(self.agreeing, len(self.differences))

    def line(self) -> list[str]:
        count = len(self.differences)
        spans = ", ".join(f"{name.split()[1]} {interval([*one.values()])}" for name, one in self.networks.items())
        chance = f"{sign_test(self.agreeing, count):.2g}"
        return [self.claim, self.asked, f"{self.agreeing} of {count}", chance, spans, f"**{self.word}**"]


def word(agreeing: int, count: int) -> str:
    """The rule."""
    if 2 * agreeing < count:
        return {"holds": "the opposite holds", "holds weakly": "the opposite, weakly"}.get(
            word(count - agreeing, count), "not seen"
        )
    if sign_test(agreeing, count) <= SURE:
        return "holds"
    return "holds weakly" if agreeing >= MOST * count else "not seen"


def sign_test(agreeing: int, count: int) -> float:
    """How often coins give a majority as large, on either side."""
    larger = max(agreeing, count - agreeing)
    tail = sum(math.comb(count, k) for k in range(larger, count + 1)) / 2**count
    return min(1.0, 2 * tail)


def interval(values: list[float]) -> str:
    """Mean and 95 % interval; of a single value, itself."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2g}"
    half = _T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.2g} [{mean - half:.2g}, {mean + half:.2g}]"


def verdicts(results: dict[str, Row]) -> list[Verdict]:
    """One for each comparison whose results are there, in the order of the effects."""
    asked: dict[tuple[str, str], list[Effect]] = {}
    for effect in EFFECTS:
        if effect.file in results:
            asked.setdefault((effect.claim, effect.asked), []).append(effect)
    made = [
        Verdict(claim, text, effects[0].sign, _networks(effects, results)) for (claim, text), effects in asked.items()
    ]
    return [one for one in made if one.differences]


def _networks(effects: list[Effect], results: dict[str, Row]) -> dict[str, BySeed]:
    found: dict[str, dict[int, list[float]]] = {}
    for effect in effects:
        for seed, value in effect.values(rows_of(results[effect.file])).items():
            found.setdefault(effect.file, {}).setdefault(seed, []).append(value)
    return {file: {seed: statistics.mean(v) for seed, v in by_seed.items()} for file, by_seed in found.items()}
