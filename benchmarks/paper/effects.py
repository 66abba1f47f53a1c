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


@dataclass(frozen=True)
class Effect:
    """A difference between two measures, and which sign the claim expects."""

    claim: str
    what: str
    file: str  # the result: its experiment and name
    values: Callable[[list[Row]], list[float]]
    sign: int

    def line(self, found: Row) -> list[str]:
        values = self.values(rows_of(found))
        agree = sum(value * self.sign > 0 for value in values)
        return [self.claim, self.what, found["name"], spread(values), f"{agree} of {len(values)}"]


def between(one: str, other: str, value: Value, **where: Any) -> Callable[[list[Row]], list[float]]:
    """By seed, the value of one measure less that of the other."""
    return lambda rows: paired(rows, value, {"method": one, **where}, {"method": other, **where})


def _deviates(one: str, other: str, **where: Any) -> Callable[[list[Row]], list[float]]:
    return lambda rows: matched(deviations(rows, method=one, **where), deviations(rows, method=other, **where))


def _symmetry(epoch: int) -> Callable[[list[Row]], list[float]]:
    def ratios(rows: list[Row]) -> list[float]:
        train, evaluated = (
            {row["seed"]: math.log10(row["filters"]) for row in chosen(rows, epoch=epoch, mode=mode)}
            for mode in ("train", "eval")
        )
        return matched(train, evaluated)

    return ratios


def _cut(epoch: int) -> dict[str, Any]:
    return {"granularity": "filter", "sparsity": 0.1, "epoch": epoch}


def _convergence(name: str, epoch: int) -> Effect:
    text = f"magnitude − loss preservation, mean validation loss after 75 % were cut at epoch {epoch}"
    return Effect(
        "(i)", text, f"convergence {name}", between("magnitude", "loss_preservation", mean_loss, epoch=epoch), -1
    )


def _trained_on(name: str, epoch: int) -> Effect:
    text = f"preservation − increase (T = 200), mean validation loss after 75 % were cut at epoch {epoch}"
    return Effect(
        "O5",
        text,
        f"convergence {name}",
        between(PRESERVATION, "gradient_norm_increase T=200", mean_loss, epoch=epoch),
        -1,
    )


def _accuracies(name: str, claim: str, text: str, one: str, other: str, rounds: int) -> Effect:
    text = f"{text}, test accuracy in points, {rounds} round{'s' if rounds > 1 else ''}"
    return Effect(claim, text, f"protocol {name}", between(one, other, accuracy, rounds=rounds), 1)


def _trajectory(name: str, kind: str, other: str, epoch: int) -> Effect:
    text = f"loss preservation − {other}, deviation of ‖θ(t)‖² in {kind}, 10 % cut at epoch {epoch}"
    values = _deviates("loss_preservation", other, kind=kind, sparsity=0.1, epoch=epoch)
    return Effect("(ii)", text, f"trajectories {name}", values, -1)


def _modes(name: str, epoch: int) -> Effect:
    text = f"Σ\\|θᵀg\\| of filters, train mode over eval mode, power of ten, epoch {epoch}"
    return Effect("(ii)", text, f"trajectories {name}", _symmetry(epoch), -1)


def _increase(name: str, temperature: int, what: str, value: Value, epoch: int) -> Effect:
    text = f"increase (T = {temperature}) − preservation, {what}, 10 % cut at epoch {epoch}"
    measure = f"gradient_norm_increase T={temperature}"
    return Effect("(iii)", text, f"expansions {name}", between(measure, PRESERVATION, value, **_cut(epoch)), 1)


def _acceleration(name: str, epoch: int) -> Effect:
    text = f"preservation − increase (T = 1), relative change of d²‖θ‖²/dt², 10 % cut at epoch {epoch}"
    values = between(PRESERVATION, "gradient_norm_increase T=1", lambda r: relative(r, "acceleration"), **_cut(epoch))
    return Effect("O5", text, f"expansions {name}", values, -1)


_NETS = ("digits", "digits-vgg", "cifar10")
_PROTOCOLS = ("digits", "vgg13", "mobilenet", "resnet56")
_MOVING = ("cifar10-16", "digits")
_I = ("(i)", "magnitude − loss preservation", "magnitude", "loss_preservation")
_O5 = ("O5", "preservation − increase (T = 200)", "gradient_norm_preservation", "gradient_norm_increase")
_SIZES: tuple[tuple[str, Value], ...] = (("ΔL", loss_change), ("‖g‖², power of ten", norm_ratio))

EFFECTS = [
    *(_convergence(name, epoch) for name in ("digits", "cifar10") for epoch in (1, 5)),
    *(_accuracies(name, *_I, rounds) for name in _PROTOCOLS for rounds in (1, 5, 25)),
    *(
        _trajectory(name, kind, other, e)
        for name in _MOVING
        for kind in ("flow", "training")
        for other in ("magnitude", "random")
        for e in (0, 1, 5, 20)
    ),
    *(_modes(name, epoch) for name in _MOVING for epoch in (0, 20)),
    *(_increase(name, t, *size, epoch) for size in _SIZES for name in _NETS for t in (1, 200) for epoch in (1, 5, 20)),
    *(_acceleration(name, epoch) for name in _NETS for epoch in (1, 5, 20)),
    *(_trained_on(name, epoch) for name in ("digits", "cifar10") for epoch in (1, 5)),
    *(_accuracies(name, *_O5, rounds) for name in _PROTOCOLS for rounds in (1, 5, 25)),
]


def lines(results: dict[str, Row]) -> list[list[str]]:
    """Of every effect whose result is there."""
    made = [effect.line(results[effect.file]) for effect in EFFECTS if effect.file in results]
    return [line for line in made if line[3]]
