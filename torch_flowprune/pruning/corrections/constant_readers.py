"""The layers that read removed channels, and what of it is a constant: seen in one forward of an opened copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels import MASKED, Coupling, Slice
from torch_flowprune.inputs import Target, call, is_factor, parameters_of


@dataclass
class Reader:
    """A layer that reads removed channels, and what is known of them."""

    module: nn.Module
    weight: Target
    bias: Target | None
    part: Slice
    units: Tensor  # of the group, those that are gone
    constants: Tensor | None = None  # one a place along the input's axis, 0 for what is none
    folded: Tensor | None = None  # flags: which of the units are constants
    shape: tuple[int, ...] = ()
    several: bool = False
    behind: nn.Module | None = None
    shift: Tensor | None = None
    reason: str = "the forward does not call it as a module"

    @property
    def axis(self) -> int:
        """Where channels lie in what it reads and gives."""
        return 1 if self.weight.parameter.dim() > 2 else -1


def readers_of(model: nn.Module, coupling: Coupling, gone: Mapping[str, Tensor]) -> list[Reader]:
    """Of the units that are gone, by the names of their groups."""
    known = parameters_of(model)
    biases = {owner: target for target in known.values() for owner in target.owners if len(target.owners) == 1}
    readers = []
    for name, units in gone.items():
        for part in coupling[name].slices:
            target = known[part.parameter] if part.role == "consumer" else None
            if target is not None and not _unread(target):
                module = target.owners[0][0]
                readers.append(Reader(module, target, biases.get((module, "bias")), part, units))
    return readers


def closed_readers(model: nn.Module, coupling: Coupling, gone: Mapping[str, Tensor]) -> dict[str, str]:
    """The parameters with columns of what is gone that are no :class:`Reader`'s, each with the reason."""
    known = parameters_of(model)
    consumers = {part.parameter for name in gone for part in coupling[name].slices if part.role == "consumer"}
    return {name: reason for name in known if name in consumers and (reason := _unread(known[name]))}


def _unread(target: Target) -> str:
    (module, attribute), *others = target.owners
    if is_factor(module, attribute):
        return "the layer computes its weight from this"
    if others:
        return "several layers have this weight"
    return "" if attribute == "weight" else f"a {type(module).__name__} reads it, beside others or in steps of its own"


def open_removed(model: nn.Module, coupling: Coupling, gone: Mapping[str, Tensor]) -> None:
    """Of what is gone, the weights that make channels are zero, and all else is as it was before.

    Columns that no reader has stay zero: what they pass on is not seen, and where a weight is computed from them its
    norm would be another.
    """
    closed = closed_readers(model, coupling, gone)
    known = parameters_of(model)
    with torch.no_grad():
        for name, units in gone.items():
            for part in coupling[name].slices:
                if part.role not in MASKED or (part.role == "consumer" and part.parameter in closed):
                    continue
                target, places = known[part.parameter], part.index[units].reshape(-1)
                if part.role == "producer" and target.parameter.dim() > 1:
                    target.parameter.index_fill_(part.axis, places.to(target.parameter.device), 0)
                if target.mask is not None:
                    target.mask.index_fill_(part.axis, places.to(target.mask.device), 1)


def observe(model: nn.Module, readers: list[Reader], example: Any) -> None:
    """One forward, which shows what each reader is given for the channels that are gone, and which norms follow."""
    given: list[tuple[Reader, Any]] = []
    handles = []
    for reader in readers:
        handles.append(reader.module.register_forward_pre_hook(_noting(reader)))
        handles.append(reader.module.register_forward_hook(lambda _, __, out, r=reader: given.append((r, out))))
    norms = [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]
    handles += [norm.register_forward_pre_hook(_following(given)) for norm in norms]
    try:
        call(model, example)
    finally:
        for handle in handles:
            handle.remove()


def _following(given: list[tuple[Reader, Any]]) -> Callable[[nn.Module, Any], None]:
    def note(norm: nn.Module, inputs: Any) -> None:
        for reader, out in given:
            if out is inputs[0]:
                reader.behind = norm

    return note


def _noting(reader: Reader) -> Callable[[nn.Module, Any], None]:
    def note(_: nn.Module, inputs: Any) -> None:
        x, part = inputs[0] if inputs else None, reader.part
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[reader.axis] != reader.weight.parameter.shape[part.axis]:
            reader.reason = "it reads channels in groups, or in a form of its own"
            return
        if x.numel() == x.shape[reader.axis]:
            reader.reason = "the example has one value for each channel: give two samples or more"
            return
        seen = x.movedim(reader.axis, 0).flatten(1)
        least, most = seen.aminmax(dim=1)
        steady = (most - least) <= 100 * torch.finfo(x.dtype).eps * seen.abs().max()
        places = part.index.to(x.device)
        folded = steady[places].all(1) & reader.units.to(x.device)
        steady_places = places[folded].reshape(-1)
        constants = torch.zeros_like(least).index_copy_(0, steady_places, least[steady_places])
        if reader.constants is not None and not torch.equal(constants, reader.constants):
            reader.several = True  # called again, it reads other values
        reader.constants, reader.folded, reader.shape = constants, folded & (not reader.several), tuple(x.shape)
        reader.reason = "" if reader.folded.any() else "what is removed is another value for each input"

    return note


def find_shift(reader: Reader, *, norms: bool) -> None:
    """What the constants make of the layer's output, where it is one value for a channel."""
    if reader.constants is None or reader.folded is None or not reader.folded.any():
        return
    nothing = reader.constants.new_zeros(reader.shape)
    along = [1] * len(reader.shape)
    along[reader.axis] = -1
    difference = reader.module(nothing + reader.constants.view(along)) - reader.module(nothing)
    each = difference.movedim(reader.axis, 0).flatten(1)
    least, most = each.aminmax(dim=1)
    if ((most - least) > 1000 * torch.finfo(each.dtype).eps * max(float(each.abs().max()), 1e-30)).any():
        reader.reason = "its padding reads zeros beside the constant"
    elif reader.bias is None and (reader.behind is None or not norms):
        reader.reason = "it has no bias of its own, and no batch norm right behind"
    else:
        reader.shift = each.mean(1)


def close_unfolded(readers: list[Reader]) -> None:
    """Columns of what is not folded are masked again."""
    for reader in readers:
        folded = reader.folded if reader.shift is not None and reader.folded is not None else None
        left = reader.units if folded is None else reader.units & ~folded.cpu()
        places, parameter = reader.part.index[left].reshape(-1), reader.weight.parameter
        parameter.index_fill_(reader.part.axis, places.to(parameter.device), 0)
