"""By which labels of a model its masks are channels: heads may be fewer or narrower; a graph is labelled for one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from torch_flowprune.channels.coupling import coupling_of
from torch_flowprune.channels.group_masks import living_channels, living_channels_of, read_channels
from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.rules import RULES
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery, dead_labels, surgery_keeping, with_spans
from torch_flowprune.channels.slices import Group
from torch_flowprune.channels.tracing import Reading, relabelled


def both_readings(model: nn.Module, reading: Reading) -> Iterator[Reading]:
    """By the number of heads, then by their width."""
    yield reading
    yield relabelled(reading, model, RULES)


def best_surgery(
    model: nn.Module,
    readings: Iterable[Reading],
    coupling: Coupling | None,
    masks: Mapping[str, Tensor],
    staying: Collection[str] = (),
) -> tuple[Reading, Surgery]:
    """By the first reading that explains all of the masks, or that a given coupling is of; else where most goes.

    A group that nothing is left of stays whole where its parameters are staying.
    """
    found = list[tuple[Reading, Surgery]]()
    for reading in readings:
        surgery = _surgery_of(model, passing_over(coupling or coupling_of(reading), staying, masks), masks)
        found.append((reading, surgery))
        if _is_of(surgery, reading) if coupling else not surgery.left_of(masks):
            return reading, with_spans(surgery, reading)
    reading, surgery = max(found, key=lambda one: one[1].count())
    return reading, with_spans(surgery, reading)


def surgery_of_read(
    model: nn.Module,
    reading: Reading,
    coupling: Coupling | None,
    masks: Mapping[str, Tensor],
    staying: Collection[str] = (),
) -> Surgery | None:
    """Without what nothing reads besides, which has to be proved. None where that is no more, or would be all."""
    coupling = passing_over(coupling or coupling_of(reading), staying, masks)
    kept = living_channels(coupling, masks)
    read = read_channels(coupling, masks, kept, dict(model.named_parameters()))
    if all(torch.equal(kept[name], left) for name, left in read.items()):
        return None
    with suppress(ShrinkError):
        return with_spans(surgery_keeping(coupling, read, model), reading)
    return None


def passing_over(coupling: Coupling, staying: Collection[str], masks: Mapping[str, Tensor]) -> Coupling:
    """Without the emptied groups of parameters that are staying."""
    if not staying:
        return coupling
    kept = [one for one in coupling.groups if not _is_emptied(one, staying, masks)]
    return replace(coupling, groups=tuple(kept))


def _is_emptied(group: Group, staying: Collection[str], masks: Mapping[str, Tensor]) -> bool:
    there = any(part.parameter in staying for part in group.slices)
    return there and not bool(living_channels_of(group, masks).any())


def _surgery_of(model: nn.Module, coupling: Coupling, masks: Mapping[str, Tensor]) -> Surgery:
    coupling.check_fits({**dict(model.named_parameters()), **dict(model.named_buffers())})
    return surgery_keeping(coupling, living_channels(coupling, masks), model)


def _is_of(surgery: Surgery, reading: Reading) -> bool:
    """Whether by these labels nothing goes along with what goes."""
    dead = dead_labels(reading, surgery)
    blocks = ((b, surgery.keep.get(b.name, {}).get(b.axis)) for b in reading.axes.blocks)
    gone = ((dead[b.start : b.start + b.size], kept) for b, kept in blocks)
    return all(not bool(lost.any()) if kept is None else torch.equal(lost, ~kept) for lost, kept in gone)
