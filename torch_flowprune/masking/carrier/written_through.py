"""The masked weight as its module hands it out: what is written to it is written to the parameter under the mask.

A plain product would take such writes (``weight.data.mul_``, ``nn.init``, an adapter that is merged) and be forgotten
with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.inputs import masked
from torch_flowprune.masking.carrier.replacement import fit_for_mask
from torch_flowprune.torch_internals import NO_TORCH_FUNCTION, version_of

# In place, and not of the values: of the graph, the memory, or the shape, which the product has for itself.
_NOT_OF_VALUES = (
    "as_strided_",
    "detach_",
    "rename_",
    "requires_grad_",
    "resize_",
    "resize_as_",
    "retain_grad_",
    "set_",
    "share_memory_",
    "sparse_resize_",
    "sparse_resize_and_clear_",
    "squeeze_",
    "swapaxes_",
    "swapdims_",
    "t_",
    "transpose_",
    "unsqueeze_",
)
_OPERATORS = (
    "add",
    "and",
    "floordiv",
    "lshift",
    "mod",
    "mul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
)
_WRITES = [name for name in dir(Tensor) if name.endswith("_") and name[0] != "_" and name not in _NOT_OF_VALUES]
_WRITES += [f"__i{name}__" for name in _OPERATORS if hasattr(Tensor, f"__i{name}__")] + ["__setitem__"]
_PARTS = (
    "__getitem__",
    "chunk",
    "detach",
    "diagonal",
    "expand",
    "flatten",
    "movedim",
    "moveaxis",
    "narrow",
    "permute",
    "reshape",
    "reshape_as",
    "select",
    "split",
    "squeeze",
    "swapaxes",
    "swapdims",
    "t",
    "tensor_split",
    "transpose",
    "unbind",
    "unflatten",
    "unfold",
    "unsqueeze",
    "view",
    "view_as",
)


class MaskedWeight(Tensor):
    """A tensor like any other, but for writes; and what is computed from it is a plain one."""

    __torch_function__ = NO_TORCH_FUNCTION
    _source: tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]
    _versions: list[int] | None = None  # its own and its parameter's, when they last agreed; one list for all parts

    @property
    def data(self) -> Tensor:
        """As any tensor's: the same values, out of sight of autograd."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, MaskedWeight) and value._source[0] is self._source[0]:
            return  # what `weight.data += 1` assigns: it is written already
        parameter, mask, part_of = self._source
        plain = value.as_subclass(Tensor) if isinstance(value, MaskedWeight) else value
        plain = fit_for_mask(plain.detach(), part_of(mask), "this weight")
        with torch.no_grad():
            if part_of is _whole:  # of another dtype or device too, as a dense weight's
                parameter.data, mask.data = plain, mask.to(plain.device)
                Tensor.data.__set__(self, masked(plain, mask))  # type: ignore[attr-defined]
            else:
                self._target().copy_(plain)
                _refresh(self)

    def __del__(self) -> None:
        """Functions that write (``out=``, ``torch.relu_``) are no methods: what they wrote is seen by the count."""
        if self._versions is not None and version_of(self) != self._versions[0]:
            _hand_on(self)

    def _target(self) -> Tensor:
        """The part of the parameter that this is of."""
        parameter, _, part_of = self._source
        part = part_of(parameter)
        if part.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
            raise RuntimeError(
                "this part of a pruned weight cannot be written to, because its parameter has another memory layout: "
                "write to weight_orig"
            )
        return part

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.as_subclass(Tensor).__deepcopy__(memo)
        return copied


def written_through(value: Tensor, parameter: Tensor, mask: Tensor) -> Tensor:
    """A masked weight, made just now, that hands writes on to its parameter; what is of another kind is as it is.

    The object itself changes its class: a view of it would be one more step of every graph.
    """
    if type(value) is not Tensor:
        value.handed_out_of = parameter  # type: ignore[attr-defined]
    else:
        value.__class__ = MaskedWeight
        value._source = parameter, mask, _whole  # type: ignore[attr-defined]
        try:
            value._versions = [version_of(value), version_of(parameter)]  # type: ignore[attr-defined]
        except RuntimeError:  # made in inference mode: such count no writes
            return value
    return value


def is_handed_out(value: object, parameter: Tensor | None) -> bool:
    """Whether this is the whole masked weight of a parameter, as its module hands it out."""
    if isinstance(value, MaskedWeight):
        return value._source[0] is parameter and value._source[2] is _whole
    return parameter is not None and getattr(value, "handed_out_of", None) is parameter


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _refresh(weight: MaskedWeight) -> None:
    parameter, mask, part = weight._source
    with torch.no_grad():
        Tensor.copy_(weight, masked(part(parameter), part(mask)))
    if weight._versions is not None:
        weight._versions[:] = version_of(weight), version_of(parameter)


def _hand_on(weight: MaskedWeight) -> None:
    """What a function has written, to the parameter: where the mask keeps it, and unless that is newer."""
    parameter, mask, part = weight._source
    if weight._versions is None or version_of(parameter) != weight._versions[1]:
        with suppress(UserWarning):  # where warnings are errors: none may leave a finalizer
            warnings.warn(
                "a function has written to a pruned weight (out=, torch.relu_) that was read before its parameter "
                "changed: its values are lost; write to weight_orig",
                UserWarning,
                stacklevel=3,
            )
        return
    with torch.no_grad():
        weight._target().copy_(torch.where(part(mask), weight, part(parameter)))
    weight._versions[:] = version_of(weight), version_of(parameter)


_NAMES = ("__name__", "__qualname__")  # not torch's docstrings: their examples would run as this package's


def _writing(name: str) -> Callable[..., Any]:
    """A method that writes: as it is of a dense parameter, with torch's error where that is a leaf under autograd."""

    @wraps(getattr(Tensor, name), assigned=_NAMES)
    def write(self: MaskedWeight, *args: Any, **kwargs: Any) -> MaskedWeight:
        if self._versions is not None and version_of(self) != self._versions[0]:
            _hand_on(self)
        getattr(self._target(), name)(*args, **kwargs)
        _refresh(self)
        return self

    return write


def _reading_a_part(name: str) -> Callable[..., Any]:
    """A method that gives views: writes to those are writes to the same part of the parameter."""
    method = getattr(Tensor, name)

    @wraps(method, assigned=_NAMES)
    def read(self: MaskedWeight, *args: Any, **kwargs: Any) -> Any:
        found, part_of = method(self, *args, **kwargs), self._source[2]

        def part(tensor: Tensor) -> Any:
            return method(part_of(tensor), *args, **kwargs)

        if isinstance(found, Tensor):
            return _as_part(self, found, part)
        return type(found)(_as_part(self, one, partial(_item, part, i)) for i, one in enumerate(found))

    return read


def _item(parts: Callable[[Tensor], Any], i: int, tensor: Tensor) -> Tensor:
    item: Tensor = getitem(parts(tensor), i)
    return item


def _as_part(weight: MaskedWeight, found: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    if found.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return found  # a copy, as an index by numbers gives
    view = found.as_subclass(MaskedWeight)
    view._source, view._versions = (*weight._source[:2], part), weight._versions
    return view


for _name in _WRITES:
    setattr(MaskedWeight, _name, _writing(_name))
for _name in _PARTS:
    setattr(MaskedWeight, _name, _reading_a_part(_name))
for _name, _view in {
    "T": lambda weight: weight.permute(*reversed(range(weight.dim()))),
    "mT": lambda weight: weight.transpose(-2, -1),
}.items():
    setattr(MaskedWeight, _name, property(_view))
