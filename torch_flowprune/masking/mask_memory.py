"""Masks remembered once they are gone from their modules, for what goes on holding their zeros."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torch_flowprune.inputs import Target, parameters_of, unwrapped


class MaskMemory:
    """The latest mask of each parameter of a model, by name, whatever put it on and whatever became of it since.

    A mask that is made permanent stays. One that is taken off goes (the model was loaded with a state that has none),
    and so does that of a parameter which has another shape since (the model was shrunk).
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.model = unwrapped(model)
        self.latest = dict(masks)
        self.look()
        _memories.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskMemory, (self.model, self.latest)

    def look(self) -> dict[str, Target]:
        """Take in the masks that there are now; returns the model's parameters."""
        known = parameters_of(self.model)
        self._names = {id(target.parameter): name for name, target in known.items()}
        self._parameters = weakref.WeakValueDictionary({name: target.parameter for name, target in known.items()})
        now = {name: target.mask for name, target in known.items() if target.mask is not None}
        shapes = {name: target.parameter.shape for name, target in known.items()}
        fitting = {name: mask for name, mask in self.latest.items() if shapes.get(name) == mask.shape}
        self.latest = fitting | now
        return known

    def take(self, parameter: nn.Parameter, mask: Tensor | None) -> None:
        """Note the mask that a parameter, if it is of this model, is about to have as zeros; None: it is to have none.

        By identity: a look at the whole model for each of its parameters would be a look too many.
        """
        name = self._names.get(id(parameter))
        if name is None or self._parameters.get(name) is not parameter:
            return
        if mask is None:
            self.latest.pop(name, None)
        else:
            self.latest[name] = mask


_memories: weakref.WeakSet[MaskMemory] = weakref.WeakSet()


def remember(parameter: nn.Parameter, mask: Tensor | None) -> None:
    """Tell every memory of a mask that is made permanent, or (None) taken off."""
    for memory in list(_memories):
        memory.take(parameter, mask)
