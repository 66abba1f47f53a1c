"""The size of each claim's effect, as one number a seed: what the verdicts of ``docs/results/paper.md`` rest on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.paper.rows import (
    Row,
    Value,
    accuracy,
    chosen,
    deviations,
    loss_change,
    matched,
    mean_loss,
    norm_ratio,
    paired,
    relative,
    rows_of,
    spread,
)

PRESERVATION = "gradient_norm_preservation T=1"
SHORT_OF = {PRESERVATION: "preservation"}


BySeed = dict[int, float]


@dataclass(frozen=True)
class Effect:
    """A difference between two measures on one network, and which sign the claim expects."""

    claim: str
    asked: str  # the same on other networks and at other times
    when: str
    file: str  # the result: its experiment and name
    values: Callable[[list[Row]], BySeed]
    sign: int

    def line(self, found: Row) -> list[str]:
        values = list(self.values(rows_of(found)).values())
        agree = sum(value * self.sign > 0 for value in values)
        return [self.claim, f"{self.asked}{self.when}", found["name"], spread(values), f"{agree} of {len(values)}"]


def between(one: str, other: str, value: Value, **where: Any) -> Callable[[list[Row]], BySeed]:
    """By seed, the value of one measure less that of the other."""
    return lambda rows: paired(rows, value, {"method": one, **where}, {"method": other, **where})


def _deviates(one: str, other: str, **where: Any) -> Callable[[list[Row]], BySeed]:
    return lambda rows: matched(deviations(rows, method=one, **where), deviations(rows, method=other, **where))


def _symmetry(epoch: int) -> Callable[[list[Row]], BySeed]:
    def ratios(rows: list[Row]) -> BySeed:
        train, evaluated = (
            {row["seed"]: math.log10(row["filters"]) for row in chosen(rows, epoch=epoch, mode=mode)}
            for mode in ("train", "eval")
        )
        return matched(train, evaluated)

    return ratios


def _cut(epoch: int) -> dict[str, Any]:
    return {"granularity": "filter", "sparsity": 0.1, "epoch": epoch}


def _trained_on(name: str, claim: str, text: str, one: str, other: str, epoch: int) -> Effect:
    asked = f"{text}, mean validation loss after 75 % were cut"
    values = between(one, other, mean_loss, epoch=epoch)
    return Effect(claim, asked, f" at epoch {epoch}", f"convergence {name}", values, -1)


def _accuracies(name: str, claim: str, text: str, one: str, other: str, rounds: int) -> Effect:
    when = f", {rounds} round{'s' if rounds > 1 else ''}"
    values = between(one, other, accuracy, rounds=rounds)
    return Effect(claim, f"{text}, test accuracy in points", when, f"protocol {name}", values, 1)


def _trajectory(name: str, kind: str, other: str, epoch: int) -> Effect:
    asked = f"loss preservation − {other}, deviation of ‖θ(t)‖² in {kind}, 10 % cut"
    values = _deviates("loss_preservation", other, kind=kind, sparsity=0.1, epoch=epoch)
    return Effect("(ii)", asked, f" at epoch {epoch}", f"trajectories {name}", values, -1)


def _rate(name: str, other: str, epoch: int) -> Effect:
    asked = f"loss preservation − {other}, relative change of d‖θ‖²/dt, 10 % cut"
    values = between("loss_preservation", other, lambda row: relative(row, "rate"), **_cut(epoch))
    return Effect("(ii)", asked, f" at epoch {epoch}", f"expansions {name}", values, -1)


def _modes(name: str, epoch: int) -> Effect:
    asked = "Σ\\|θᵀg\\| of filters, train mode over eval mode, power of ten"
    return Effect("(ii)", asked, f", epoch {epoch}", f"trajectories {name}", _symmetry(epoch), -1)


def _increase(name: str, temperature: int, other: str, what: str, value: Value, epoch: int) -> Effect:
    asked = f"increase (T = {temperature}) − {SHORT_OF.get(other, other)}, {what}, 10 % cut"
    values = between(f"gradient_norm_increase T={temperature}", other, value, **_cut(epoch))
    return Effect("(iii)", asked, f" at epoch {epoch}", f"expansions {name}", values, 1)


def _acceleration(name: str, epoch: int) -> Effect:
    asked = "preservation − increase (T = 1), relative change of d²‖θ‖²/dt², 10 % cut"
    values = between(PRESERVATION, "gradient_norm_increase T=1", lambda r: relative(r, "acceleration"), **_cut(epoch))
    return Effect("O5", asked, f" at epoch {epoch}", f"expansions {name}", values, -1)


_NETS = ("digits", "digits-vgg", "cifar10")
_PROTOCOLS = ("digits", "vgg13", "mobilenet", "resnet56")
_MOVING = ("cifar10-16", "digits")
_TRAINED = ("digits", "cifar10")
_AGES = (1, 5, 20)
_OTHERS = ("magnitude", "random", "fisher")
_I = ("(i)", "magnitude − loss preservation", "magnitude", "loss_preservation")
_O5 = ("O5", "preservation − increase (T = 200)", "gradient_norm_preservation", "gradient_norm_increase")
_O5_AT = (*_O5[:2], PRESERVATION, "gradient_norm_increase T=200")
_SIZES: tuple[tuple[str, Value], ...] = (("ΔL", loss_change), ("‖g‖², power of ten", norm_ratio))

EFFECTS = [
    *(_trained_on(name, *_I, epoch) for name in _TRAINED for epoch in (1, 5)),
    *(_accuracies(name, *_I, rounds) for name in _PROTOCOLS for rounds in (1, 5, 25)),
    *(_rate(name, other, epoch) for other in _OTHERS for name in _NETS for epoch in (0, *_AGES)),
    *(
        _trajectory(name, kind, other, epoch)
        for name in _MOVING
        for kind in ("flow", "training")
        for other in _OTHERS
        for epoch in (0, *_AGES)
    ),
    *(_modes(name, epoch) for name in _MOVING for epoch in (0, 20)),
    *(
        _increase(name, temperature, PRESERVATION, *size, epoch)
        for size in _SIZES
        for name in _NETS
        for temperature in (1, 200)
        for epoch in _AGES
    ),
    *(
        _increase(name, temperature, "random", "ΔL", loss_change, epoch)
        for name in _NETS
        for temperature in (1, 200)
        for epoch in _AGES
    ),
    *(_acceleration(name, epoch) for name in _NETS for epoch in _AGES),
    *(_trained_on(name, *_O5_AT, epoch) for name in _TRAINED for epoch in (1, 5)),
    *(_accuracies(name, *_O5, rounds) for name in _PROTOCOLS for rounds in (1, 5, 25)),
]


def lines(results: dict[str, Row]) -> list[list[str]]:
    """Of every effect whose result is there."""
    made = [effect.line(results[effect.file]) for effect in EFFECTS if effect.file in results]
    return [line for line in made if line[3]]
