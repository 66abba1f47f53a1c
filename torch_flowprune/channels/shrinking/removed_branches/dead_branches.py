"""The branches that masks leave nothing of, and the modules that go with them: tried, and proved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels.branches import Owned, RunningGraph, read_branches
from torch_flowprune.channels.groups import Branch, Coupling
from torch_flowprune.channels.shrinking.proof import Trial, tolerance_of
from torch_flowprune.channels.shrinking.removed_branches.cached_calls import cached_outputs
from torch_flowprune.channels.shrinking.removed_branches.numbered_modules import LayerNumbers, closed_up
from torch_flowprune.channels.shrinking.removed_branches.stand_in import StandInSpec, with_stand_ins
from torch_flowprune.channels.shrinking.removed_branches.standing_modules import STYLES, Vacancies
from torch_flowprune.channels.shrinking.surgery import Surgery
from torch_flowprune.channels.tracing import Reading
from torch_flowprune.inputs import copied_model, users_level


@dataclass(frozen=True)
class TakenOut:
    """What goes before channels do.

    Attributes:
        standings: module path -> what stands in its place.
        tensors: the names of the parameters and buffers that are no more, and their sizes.
        numbers: what modules that stay hold instead of their numbers.
        staying: the parameters of dead branches that cannot go.
    """

    standings: Mapping[str, StandInSpec] = field(default_factory=dict)
    tensors: Mapping[str, Sequence[int]] = field(default_factory=dict)
    numbers: LayerNumbers = field(default_factory=dict)
    staying: frozenset[str] = frozenset()

    def of(self, model: nn.Module) -> nn.Module:
        """The model without these, changed in place."""
        model = with_stand_ins(model, self.standings)
        for path, values in self.numbers.items():
            for name, value in values.items():
                setattr(model.get_submodule(path), name, value)
        return model

    def left_of(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of what is still there."""
        return {name: mask for name, mask in masks.items() if name not in self.tensors}

    def coupling(self, coupling: Coupling) -> Coupling:
        """Without what is no more; costs are not known of it."""
        return coupling if not self.tensors else _without_tensors(coupling, set(self.tensors))

    def surgery(self, surgery: Surgery) -> Surgery:
        """With nothing kept of the tensors that are no more."""
        nothing = {
            name: {axis: torch.zeros(size, dtype=torch.bool, device="cpu") for axis, size in enumerate(shape)}
            for name, shape in self.tensors.items()
        }
        return replace(surgery, keep={**surgery.keep, **nothing})


def _without_tensors(coupling: Coupling, gone: set[str]) -> Coupling:
    """The groups and branches of a coupling that go on without some tensors."""
    kept = [replace(one, slices=rest) for one in coupling.groups if (rest := _rest(one.slices, gone))]
    branches = tuple(branch for branch in coupling.branches if not gone.issuperset(branch.masked))
    return Coupling(tuple(kept), coupling.frozen, coupling.unknown, None, branches)


def _rest(slices: Sequence[Any], gone: set[str]) -> tuple[Any, ...]:
    rest = tuple(one for one in slices if one.parameter not in gone)
    return rest if any(one.role == "producer" for one in rest) else ()


def taken_out(
    model: nn.Module,
    reading: Reading,
    given: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    verify: bool = True,
) -> TakenOut:
    """What the masks leave no part of; nothing, where no branch is dead.

    Args:
        model: the dense model, with zeros where the masks are False, and without hooks that only look on.
        reading: of it.
        given: its masks; where there are none, a branch is dead all of whose parameters are zero.
        args, kwargs: what it is called with.
        verify: whether what is left is proved to compute the same.

    Warns:
        UserWarning: where the code around a branch does not take what stands in its place: then it stays, masked.
    """
    graph, known = RunningGraph(reading.traced["eval"]), read_branches(reading)
    if not known or not graph.traced.runs:
        return TakenOut()
    zero = _zero(model, given, known)
    dead = {name: one for name, (_, one) in known.items() if one.ends_with(graph, zero)}
    if not dead:
        return TakenOut()
    masks = {name: torch.zeros_like(one, dtype=torch.bool) for name, one in model.named_parameters() if name in zero}
    trial = Trial(model, masks, Surgery({}, {}), args, kwargs, tolerance_of(reading)) if verify else None
    return _first_that_passes(_Attempts(model, graph, zero, trial, kwargs), dead)


def _zero(model: nn.Module, given: Mapping[str, Tensor], known: Mapping[str, tuple[Branch, Owned]]) -> set[str]:
    """The parameters that are zero and stay so: masked ones; where no mask is, those of branches all of which is zero.

    Zeros alone may be where a branch begins to learn.
    """
    if given:
        return {name for name, mask in given.items() if not bool(mask.any())}
    zero = {name for name, one in model.named_parameters() if not bool(one.any())}
    return {name for branch, _ in known.values() if zero.issuperset(branch.masked) for name in branch.masked}


@dataclass(frozen=True, eq=False)
class _Attempts:
    model: nn.Module
    graph: RunningGraph
    zero: set[str]
    trial: Trial | None
    kwargs: Mapping[str, Any]

    def passing(self, dead: Mapping[str, Owned]) -> TakenOut | None:
        """These branches gone, in the first style that passes."""
        tried = list[dict[str, StandInSpec]]()
        for style in STYLES:
            standings = Vacancies(self.model, self.graph, list(dead.values()), self.zero, style).standings()
            if standings is None or standings in tried:
                continue
            tried.append(standings)
            for made in self._made(standings):
                if self._passes(made):
                    return made
        return None

    def _passes(self, made: TakenOut) -> bool:
        if self.trial is None:
            return True
        self.trial.surgery, self.trial.takes_out = made.surgery(Surgery({}, {})), True
        try:
            self.trial.check(made.of(copied_model(self.trial.model)), thorough=True)
            if self._cached is not None:
                given = self._cached_outputs(made.of(copied_model(self.trial.model)))
                self.trial.compare_tensors(self._cached, given or [])
        except Exception:  # noqa: BLE001 - whatever foreign code raises, it does not take what stands there
            return False
        return True

    @cached_property
    def _cached(self) -> list[Tensor] | None:
        """What the masked model gives as a text goes on."""
        assert self.trial is not None
        with suppress(Exception):  # whatever the model raises, there is nothing to compare with
            return self._cached_outputs(copied_model(self.trial.model))
        return None

    def _cached_outputs(self, model: nn.Module) -> list[Tensor] | None:
        assert self.trial is not None
        return cached_outputs(model.eval(), self.trial.args, self.trial.kwargs)

    def _made(self, standings: Mapping[str, StandInSpec]) -> list[TakenOut]:
        """With the numbers of a language model's layers closed up, where it has a cache; and as they are."""
        inside = tuple(f"{path}." for path in standings)
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        shapes = {name: tuple(one.shape) for name, one in tensors if name.startswith(inside)}
        numbers = closed_up(self.model, standings) if "use_cache" in self.kwargs else {}
        return [*([TakenOut(standings, shapes, numbers)] if numbers else []), TakenOut(standings, shapes)]


def _first_that_passes(attempts: _Attempts, dead: Mapping[str, Owned]) -> TakenOut:
    """All of the branches; else as many as can go together, from the first on."""
    if (found := attempts.passing(dead)) is not None:
        return found
    found, going = TakenOut(), dict[str, Owned]()
    for name, one in dead.items():
        if (more := attempts.passing({**going, name: one})) is not None:
            found, going = more, {**going, name: one}
    stay = [name for name in dead if name not in going]
    warnings.warn(
        f"nothing is left of {', '.join(stay[:5])}, and the model does not run, or computes something else, without: "
        "they stay, masked, and take as long as before; leave them out (exclude=). Causes are code that unpacks "
        "shapes, and the last attention of a model that counts its cache",
        UserWarning,
        stacklevel=users_level(),
    )
    return replace(found, staying=frozenset(parameter for name in stay for parameter in dead[name].parameters))
