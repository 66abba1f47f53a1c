"""Masks remembered once they are gone from their modules, for what goes on holding their zeros."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torch_flowprune.inputs import Target, mask_of, original, parameters_of, unwrapped
from torch_flowprune.torch_internals import version_of


@dataclass(frozen=True)
class _Seen:
    """A parameter and its mask, as the registries of its module had them."""

    module: nn.Module
    key: str
    parameter: weakref.ref[nn.Parameter] | None
    mask_key: str
    mask: Tensor | None
    version: int

    @classmethod
    def of(cls, target: Target) -> _Seen:
        module, name = target.owners[0]
        key = name if name in module._parameters else original(name)
        version = 0 if target.mask is None else version_of(target.mask)
        return cls(module, key, weakref.ref(target.parameter), mask_of(name), target.mask, version)

    @classmethod
    def nowhere(cls, module: nn.Module) -> _Seen:
        return cls(module, "", None, "", None, 0)

    def is_there(self) -> bool:
        parameter, mask = self.module._parameters.get(self.key), self.module._buffers.get(self.mask_key)
        same = parameter is not None and self.parameter is not None and self.parameter() is parameter
        return same and mask is self.mask and (mask is None or version_of(mask) == self.version)


class MaskMemory:
    """The latest mask of each parameter of a model, by name, whatever put it on and whatever became of it since.

    A mask that is made permanent stays. One that is taken off goes (the model was loaded with a state that has none),
    and so does that of a parameter which has another shape since (the model was shrunk).
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.model = unwrapped(model)
        self.latest = dict(masks)
        self._seen: list[_Seen] = []
        self.look()
        _memories.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskMemory, (self.model, self.latest)

    def follow(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Go on with a smaller model, whose masks are these."""
        self.model, self.latest = model, dict(masks)
        self.look()

    def look(self) -> dict[str, Target]:
        """Take in the masks that there are now; returns the model's parameters."""
        known = parameters_of(self.model)
        self._names = {id(target.parameter): name for name, target in known.items()}
        self._parameters = weakref.WeakValueDictionary({name: target.parameter for name, target in known.items()})
        now = {name: target.mask for name, target in known.items() if target.mask is not None}
        shapes = {name: target.parameter.shape for name, target in known.items()}
        fitting = {name: mask for name, mask in self.latest.items() if shapes.get(name) == mask.shape}
        self.latest = fitting | now
        self._seen = [_Seen.of(target) for target in known.values()]
        return known

    def is_up_to_date(self) -> bool:
        """Whether every parameter and mask is the one of the last look, without another walk over the model."""
        return all(one.is_there() for one in self._seen)

    def forget(self) -> None:
        """A mask was put on: the next question is answered with no."""
        self._seen = [_Seen.nowhere(self.model)]

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


def note_new_mask() -> None:
    """Tell every memory that a mask was put on something."""
    for memory in list(_memories):
        memory.forget()


def remember(parameter: nn.Parameter, mask: Tensor | None) -> None:
    """Tell every memory of a mask that is made permanent, or (None) taken off."""
    for memory in list(_memories):
        memory.take(parameter, mask)
