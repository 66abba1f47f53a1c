"""Groups of units and the model's tensors: what units hold, as rows; those that stay, as masks; those left by masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.slices import MASKED, Group
from torch_flowprune.inputs import alike, box_of, flags, local


def rows(tensors: Mapping[str, Tensor], group: Group, roles: Collection[str] = ("producer",)) -> Tensor:
    """(units, elements): what the group's slices of the given roles hold, side by side along the last axis."""
    parts = [s.of(tensors[s.parameter]) for s in group.slices if s.role in roles]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def channel_masks(coupling: Coupling, keep: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """keep: group name -> (units,) flags. Gives parameter name -> bool mask, for the parameters that lose something.

    All of a removed unit's parameters are masked, the consumers' columns too: whatever an activation or a norm makes
    of a channel of zeros (a sigmoid's 0.5, a running mean's shift) is then multiplied by zero, in eval and in train
    mode. Where two activations are multiplied with each other (attention), ``couple`` has proved that one of them is
    zero, or frozen both.
    """
    coupling.check_fits(tensors, MASKED)
    out: dict[str, Tensor] = {}
    for name, kept in keep.items():
        if kept.shape != (coupling[name].size,):
            raise ValueError(
                f"keep[{name!r}] has shape {tuple(kept.shape)}: expected one flag for each of the group's "
                f"{coupling[name].size} units"
            )
        clear_removed(out, coupling[name], kept, tensors)
    return out


def clear_removed(masks: dict[str, Tensor], group: Group, kept: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Clear the removed units of one group from masks by parameter name; a parameter that loses its first gets one.

    Of shards the parts that are here.
    """
    removed = ~flags(kept).cpu()
    for s in group.slices:
        gone = s.index[removed].reshape(-1)
        if s.role in MASKED and len(gone):
            if s.parameter not in masks:
                own = tensors[s.parameter]
                masks[s.parameter] = alike(torch.ones_like(local(own), dtype=torch.bool), own)
            mask, box = local(masks[s.parameter]), box_of(masks[s.parameter])
            here = gone - box.begin[s.axis]
            here = here[(here >= 0) & (here < box.size[s.axis])]
            mask.index_fill_(s.axis, here.to(mask.device), False)


def living_channels(coupling: Coupling, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Group name -> (units,) bool: False where the masks leave nothing of a unit, so that it can be removed.

    All of its producers and all that is added to it or scales it has to be masked, and its consumers' columns, except
    where they read exact zeros.
    """
    return {group.name: living_channels_of(group, masks) for group in coupling.groups}


def kept_units(coupling: Coupling, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`living_channels`, and of branches: name -> (1,) bool."""
    branches = {one.name: torch.tensor([one.is_alive(masks)], device="cpu") for one in coupling.branches}
    return {**living_channels(coupling, masks), **branches}


def living_channels_of(group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """:func:`living_channels` of one group."""
    kept = torch.zeros(group.size, dtype=torch.bool, device="cpu")
    for s in group.slices:
        if s.role not in MASKED or (s.role == "consumer" and s.reads_zero):
            continue
        mask = masks.get(s.parameter)
        kept |= s.of(mask.cpu()).any(-1) if mask is not None else True
    return kept


def read_channels(
    coupling: Coupling, masks: Mapping[str, Tensor], kept: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Of the living channels those that something reads: not where the masks leave nothing of any consumer.

    What makes such a channel goes with it, and what is then read by nothing more. Where two activations are multiplied
    with each other one may still be read otherwise: the result is to be proved.
    """
    found, left = dict(kept), dict(masks)
    waiting = list(coupling.groups)
    while waiting:
        group = waiting.pop()
        consumers = [part for part in group.slices if part.role == "consumer"]
        if not consumers or not all(part.parameter in left for part in consumers):
            continue
        read = torch.stack([part.of(left[part.parameter].cpu()).any(-1) for part in consumers]).any(0)
        if bool((found[group.name] & ~read).any()):
            found[group.name] = found[group.name] & read
            for name in {part.parameter for part in group.slices} & left.keys():
                left[name] = left[name].clone()
            clear_removed(left, group, found[group.name], tensors)
            waiting = list(coupling.groups)
    return found
