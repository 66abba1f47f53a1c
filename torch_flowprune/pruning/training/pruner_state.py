"""A saved pruner's state, held against the pruner that is to go on from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from torch_flowprune.channels import Costs, Coupling
from torch_flowprune.inputs import HeldUnits
from torch_flowprune.pruning.training.rounds import Rounds
from torch_flowprune.scoring import Origin

KEYS = (
    "method",
    "granularity",
    "asked",
    "round",
    "goals",
    "layers",
    "coupling",
    "tracked",
    "minibatches",
    "theta0",
    "generator",
)
"""What every state has."""


def check_words(state: Mapping[str, Any], method: str, granularity: str, asked: Rounds, *, random: bool) -> None:
    """An error where a state is of a pruner that was made with other words.

    Raises:
        ValueError: naming what differs.
    """
    if missing := [key for key in KEYS if key not in state]:
        raise ValueError(
            f"this is not the state of a Pruner of this version: it has no {', '.join(missing)}; to continue a "
            "run of an earlier version, make a new pruner for the rounds that are left"
        )
    if state["method"] != method:
        raise ValueError(f"this state is of a pruner by {state['method']}, and this one prunes by {method}")
    if state["granularity"] != granularity:
        raise ValueError(f"this state is of a pruner of {state['granularity']}s, and this one prunes {granularity}s")
    if state["asked"] != asked.to_dict():
        raise ValueError(f"this state is of a pruner with {state['asked']}, and this one has {asked.to_dict()}")
    if not 0 <= state["round"] <= asked.count:
        raise ValueError(f"the round of a state should be from 0 to {asked.count}, got {state['round']}")
    if state["generator"] is not None and not random:
        raise ValueError("this state is of a pruner with a generator: give this one a generator= to take its place")


def of_all_ranks(tracked: Mapping[str, Tensor], held: Mapping[str, HeldUnits]) -> dict[str, Tensor]:
    """Scores of units that lie on several ranks, put together: they go on with any number of ranks."""
    return {name: held[name].gathered(one) if name in held else one for name, one in tracked.items()}


def of_this_rank(tracked: Mapping[str, Tensor], held: Mapping[str, HeldUnits]) -> dict[str, Tensor]:
    """Those of the units that are here."""
    return {name: held[name].part(one).clone() if name in held else one for name, one in tracked.items()}


def _has_shrunk(origins: Mapping[str, Origin]) -> bool:
    """Whether the model is a smaller one than the run began with."""
    return any(origin.kept is not None for origin in origins.values())


def coupling_to_save(coupling: Coupling | None, origins: Mapping[str, Origin]) -> dict[str, Any] | None:
    """That of a smaller model, whose units are named as those that the run began with."""
    return coupling.to_dict() if coupling is not None and _has_shrunk(origins) else None


def costs_to_save(origins: Mapping[str, Origin]) -> dict[str, Any] | None:
    """What the model cost that the run began with, where that cannot be read off the model any more."""
    costs = next((origin.costs for origin in origins.values()), None)
    return costs.to_dict() if costs is not None and _has_shrunk(origins) else None


def saved_origins(state: Mapping[str, Any], known: Mapping[str, Origin], targets: Collection[str]) -> dict[str, Origin]:
    """The layers of a state, which are those known; ``targets`` are what this pruner's are shares or amounts of.

    Raises:
        ValueError: naming those that are not, or have another size now.
    """
    shrunk = any(layer["kept"] is not None for layer in state["layers"].values())
    costs = next((one.costs for one in known.values()), None)
    if shrunk:  # counted from the dense model, which is not there
        device, saved = costs and costs.device, state.get("costs")
        costs = None if saved is None else Costs.from_dict(saved)
        if unknown := [cost for cost in targets if costs is None or not costs.tells(cost)]:
            raise ValueError(
                f"this state is of a model that was shrunk, and does not hold what it cost: a target in {unknown[0]} "
                "cannot continue; make a new pruner of the smaller model"
            )
        costs = costs and replace(costs, device=device or costs.device)
    origins = {name: Origin.from_dict(layer, costs) for name, layer in state["layers"].items()}
    if known:
        _check_layers({name: one.now for name, one in origins.items()}, {name: one.now for name, one in known.items()})
    return origins


def _check_layers(then: Mapping[str, tuple[int, ...]], now: Mapping[str, tuple[int, ...]]) -> None:
    """A group of which a single channel is left is in no coupling that was read anew, for it cannot go."""
    then = {name: shape for name, shape in then.items() if shape != (1,) or name in now}
    if odd := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
        told = [f"{name} {then.get(name, 'not there')} and now {now.get(name, 'not there')}" for name in odd[:5]]
        raise ValueError(
            f"this state is of other layers: {', '.join(told)}; of a model that is shrunk, save the state after "
            "shrink(..., pruner=)"
        )
