"""By which labels of a model its masks are channels: heads may be fewer or narrower; a graph is labelled for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels.coupling import coupling_of, reading_of
from torch_flowprune.channels.group_masks import living_channels, read_channels
from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.rules import RULES
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery, dead_labels, kept_positions, with_spans
from torch_flowprune.channels.tracing import Reading, relabelled


def readings_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Reading]:
    """By the number of heads, then by their width."""
    reading = reading_of(model, args, kwargs)
    yield reading
    yield relabelled(reading, model, RULES)


def best_surgery(
    model: nn.Module, readings: Iterable[Reading], coupling: Coupling | None, masks: Mapping[str, Tensor]
) -> tuple[Reading, Surgery]:
    """By the first reading that explains all of the masks, or that a given coupling is of; else where most goes."""
    found = list[tuple[Reading, Surgery]]()
    for reading in readings:
        surgery = _surgery_of(model, coupling or coupling_of(reading), masks)
        found.append((reading, surgery))
        if _is_of(surgery, reading) if coupling else not surgery.left_of(masks):
            return reading, with_spans(surgery, reading)
    reading, surgery = max(found, key=lambda one: one[1].count())
    return reading, with_spans(surgery, reading)


def surgery_of_read(
    model: nn.Module, reading: Reading, coupling: Coupling | None, masks: Mapping[str, Tensor]
) -> Surgery | None:
    """Without what nothing reads besides, which has to be proved. None where that is no more, or would be all."""
    coupling = coupling or coupling_of(reading)
    kept = living_channels(coupling, masks)
    read = read_channels(coupling, masks, kept, dict(model.named_parameters()))
    if all(torch.equal(kept[name], left) for name, left in read.items()):
        return None
    with suppress(ShrinkError):
        return with_spans(Surgery(kept_positions(coupling, read, model), {}), reading)
    return None


def _surgery_of(model: nn.Module, coupling: Coupling, masks: Mapping[str, Tensor]) -> Surgery:
    coupling.check_fits({**dict(model.named_parameters()), **dict(model.named_buffers())})
    return Surgery(kept_positions(coupling, living_channels(coupling, masks), model), {})


def _is_of(surgery: Surgery, reading: Reading) -> bool:
    """Whether by these labels nothing goes along with what goes."""
    dead = dead_labels(reading, surgery)
    blocks = ((b, surgery.keep.get(b.name, {}).get(b.axis)) for b in reading.axes.blocks)
    gone = ((dead[b.start : b.start + b.size], kept) for b, kept in blocks)
    return all(not bool(lost.any()) if kept is None else torch.equal(lost, ~kept) for lost, kept in gone)
