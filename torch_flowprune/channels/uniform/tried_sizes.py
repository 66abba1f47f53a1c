"""Which sizes of a model may become smaller so that its class can still be built with them: each is tried.

Of the layers of repeated blocks that is told by where they stand. Where a model carries what it was built from, its
shapes are looked for among those that the class has, and one prune is carried out on a copy: the smaller model has to
be what the class makes of other numbers, and compute the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from torch_flowprune.channels.construction import Constructor, Shapes, constructor_of, fitted_numbers_of, shapes_of
from torch_flowprune.channels.group_masks import channel_masks
from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.shrinking import ShrinkError, is_as_built, shrink
from torch_flowprune.channels.slices import Group
from torch_flowprune.channels.tracing import canonical_names
from torch_flowprune.channels.uniform.dials import Dial, UniformSizes, dial_of, shapes_after, tied_groups
from torch_flowprune.masking import dense_copy

Tied = tuple[Group, ...]
_TRIED_SHARE = 0.75
"""Of the units that stay in a trial: what is an equal share by accident is none at this one."""


def uniform_sizes(model: nn.Module, coupling: Coupling, example: Any, names: Collection[str]) -> UniformSizes:
    """What of these groups may become smaller, so that the model stays one that its class makes.

    Args:
        model: left as it was; copied, where it carries what it was built from.
        coupling: of the model.
        example: what the model is called with.
        names: the groups that may be pruned.
    """
    dense = dense_copy(model)[0]
    ties = tied_groups(dense, coupling)
    left_out = {one.name for tied in ties if any(g.name not in names for g in tied) for one in tied}
    held = dict.fromkeys(left_out & set(names), "stays as wide as layers that are not pruned")
    free = [tied for tied in ties if tied[0].name not in left_out]
    constructor = _constructor_of(dense)
    if constructor is None:
        return UniformSizes(tuple(dial_of(tied) for tied in free), held, lambda kept: True)
    tried = _TriedSizes(dense, coupling, example, constructor)
    dials = tried.dials(free)
    turned = {name for dial in dials for name in dial.sizes}
    reason = f"no other {constructor.kind.__name__} has this narrower and computes the same"
    held |= {group.name: reason for tied in free for group in tied if group.name not in turned}
    return UniformSizes(tuple(dials), held, tried.fits)


def _constructor_of(dense: nn.Module) -> Constructor | None:
    """What builds this very model; of a model that was shrunk and goes on with the config it had, its numbers."""
    constructor = constructor_of(dense)
    if constructor is None or constructor.shapes({}) == shapes_of(dense):
        return constructor
    numbers = next(fitted_numbers_of(constructor).fits(shapes_of(dense)), None)
    return None if numbers is None else Constructor(constructor.kind, constructor.with_numbers(numbers))


class _TriedSizes:
    def __init__(self, dense: nn.Module, coupling: Coupling, example: Any, constructor: Constructor) -> None:
        self.dense, self.coupling, self.example = dense, coupling, example
        self.constructor, self.fitted = constructor, fitted_numbers_of(constructor)

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """Every name of a tensor by its first."""
        found: dict[str, list[str]] = {}
        for name, first in canonical_names(self.dense).items():
            found.setdefault(first, []).append(name)
        return found

    def shapes(self, kept: Mapping[str, int]) -> Shapes:
        return shapes_after(self.fitted.dense, self.aliases, self.coupling, kept)

    def fits(self, kept: Mapping[str, int]) -> bool:
        return next(self.fitted.fits(self.shapes(kept)), None) is not None

    def dials(self, ties: Collection[Tied]) -> list[Dial]:
        """Those of which the class has narrower ones that compute the same."""
        found: list[Dial] = []
        waiting = [tied for tied in ties if not found.extend(one := self._alone(tied)) and not one]  # type: ignore[func-returns-value]
        while waiting:
            joint = next(self._together(waiting.pop(0), ties, found), None)
            if joint is not None:
                found.append(joint)
                waiting = [tied for tied in waiting if tied[0].name not in joint.sizes]
        return self._computing(found)

    def _computing(self, dials: list[Dial]) -> list[Dial]:
        """All of them; or those that can be turned beside each other."""
        if not dials or self._computes(dials):
            return dials
        found: list[Dial] = []
        for dial in dials:
            if self._computes([*found, dial]):
                found.append(dial)
        return found

    def _alone(self, tied: Tied) -> list[Dial]:
        """With the smallest step that the class takes."""
        size = tied[0].size
        for units in (n for n in range(1, size // 2 + 1) if size % n == 0):
            if self.fits({group.name: size - units for group in tied}):
                return [dial_of(tied, {tied[0].name: units})]
        return []

    def _together(self, tied: Tied, ties: Collection[Tied], found: Collection[Dial]) -> Iterator[Dial]:
        """With all else that follows one number, in equal shares."""
        turned = {name for dial in found for name in dial.sizes}
        axes = self._axes(tied)
        for name in self.fitted.values:
            following = self.fitted.following(name)
            if following & axes:
                joined = [t for t in ties if t is tied or self._axes(t) & following]
                dial = dial_of([group for one in joined for group in one])
                able = len(joined) > 1 and dial.steps > 1 and not turned & dial.sizes.keys()
                if able and self.fits(dial.kept(dial.steps - 1)):
                    yield dial

    def _axes(self, tied: Tied) -> set[tuple[str, int]]:
        return {
            (name, one.axis)
            for group in tied
            for one in group.slices
            for name in self.aliases.get(one.parameter, (one.parameter,))
        }

    def _computes(self, dials: Collection[Dial]) -> bool:
        """Whether the model without some units of these is what its class makes of other numbers."""
        staying = {name: n for dial in dials for name, n in dial.kept(_tried_step(dial)).items()}
        keep = {name: torch.arange(self.coupling[name].size) < n for name, n in staying.items()}
        tensors = {**dict(self.dense.named_parameters()), **dict(self.dense.named_buffers())}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                small = shrink(self.dense, self.example, masks=channel_masks(self.coupling, keep, tensors))
            except ShrinkError:
                return False
        return is_as_built(small)


def _tried_step(dial: Dial) -> int:
    return min(max(round(dial.steps * _TRIED_SHARE), 1), dial.steps - 1)
