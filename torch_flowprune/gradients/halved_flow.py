"""One flow over all the data and two over their halves, which show how far it can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from torch_flowprune.gradients.differentiable import differentiable
from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.gradients.gradient_flow import Flow, derivatives_in, flow_over
from torch_flowprune.gradients.sharding import DataRanks, check_in_parts, in_shards, is_in_parts
from torch_flowprune.gradients.sweeping import HalvedSweeps, ProposedCut, products_over
from torch_flowprune.inputs import Batch, OneBatch, Ranks, as_batches, halves, sized, untouched, unwrapped

_IN_THE_SWEEPS = {"g", "g2", "g2_sample", "Hg"}


@dataclass(frozen=True)
class HalvedFlow:
    """What :func:`halved_flow` found.

    Attributes:
        whole: the flow over all the data.
        halves: those over its even and its odd batches, or of one batch its even and odd samples; none where there is
            one sample, or nothing of the data is read.
        expansions: of the loss and of ‖g‖² in θ less the cut; empty without one.
    """

    whole: Flow
    halves: tuple[Flow, ...]
    expansions: dict[str, Any]


def halved_flow(
    source: FlowSource, model: nn.Module, needs: Sequence[str], parameters: Sequence[str], cut: ProposedCut
) -> HalvedFlow:
    """The flow with g, Hg and what ``needs`` names, in two sweeps for all of it.

    What is neither g, Hg nor squares of g takes sweeps of its own. A cut's expansions are over what requires a gradient
    and what it masks.
    """
    if is_in_parts(unwrapped(model)):
        return _flows_in_parts(source, unwrapped(model), needs, parameters, cut)
    wanted, bare, ranks = derivatives_in(needs), unwrapped(model), Ranks.of(model)
    point = flow_over(source, model, [*({*needs} - wanted)], parameters)
    cut_over = {*differentiable(bare, cut.masks, {"g", "Hg"})}
    targets = differentiable(bare, [*parameters, *cut.masks], {"g", "Hg"})
    with untouched(bare, source.data, source.mode, source.functions) as rewind:
        for target in targets.values():
            target.parameter.requires_grad_(True)
        sweeps = HalvedSweeps(bare, targets, source, rewind, ranks)
        kinds, over = wanted & _IN_THE_SWEEPS, {*point.theta}
        portions, expansions = sweeps.fields(as_batches(source.data), kinds, over, cut, cut_over)
    source.warn_of_fewer(portions[0]["samples"], ranks)
    flows = [replace(point, **fields, counted=source.counting) for fields in portions]
    if others := wanted - _IN_THE_SWEEPS:
        sources = [source, *_halves_of(source, bare)]
        flows += [flows[0]] * (len(sources) - len(flows))
        more = [flow_over(one, model, [*others], parameters) for one in sources]
        flows = [_joined(flow, other, others) for flow, other in zip(flows, more, strict=True)]
    return HalvedFlow(flows[0], tuple(flows[1:]), expansions)


def _flows_in_parts(
    source: FlowSource, model: nn.Module, needs: Sequence[str], parameters: Sequence[str], cut: ProposedCut
) -> HalvedFlow:
    """Of a model that ranks hold in parts, sweep by sweep; halves are those of each rank's data."""
    ranks, kinds = DataRanks.of_shards(model, Ranks()), [*{*needs, "g", "Hg"}]
    whole = flow_over(source, model, kinds, parameters)
    own = _halves_of(source, model) if derivatives_in(needs) else []
    can_be_halved = not ranks.summed(torch.tensor(float(not own), device="cpu"))
    parts = tuple(flow_over(one, model, needs, parameters) for one in own) if can_be_halved else ()
    expansions = expansions_along(cut, source, model, Ranks()) if cut.removed else {}
    return HalvedFlow(whole, parts, expansions)


def expansions_along(cut: ProposedCut, source: FlowSource, model: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """The loss, ‖g‖², and their expansions in θ less the cut, in one sweep."""
    check_in_parts(model, source, {"Hg"}, ranks)
    with in_shards(model), untouched(model, source.data, source.mode, source.functions) as rewind:
        targets = differentiable(model, cut.masks, {"Hg"}, in_parts=True)
        for target in targets.values():
            target.parameter.requires_grad_(True)
        return products_over(model, targets, source, rewind, ranks).along(cut, as_batches(source.data))


def _joined(flow: Flow, other: Flow, kinds: set[str]) -> Flow:
    return replace(flow, **{kind: getattr(other, kind) for kind in kinds})


class _EverySecond:
    """Every second batch of what may be read of the data, as often as it is asked.

    A loader's generator shows, so that both halves see one shuffling of it.
    """

    def __init__(self, source: FlowSource, device: torch.device, start: int) -> None:
        self.source, self.device, self.start = source, device, start
        self.generator, self.sampler = getattr(source.data, "generator", None), getattr(source.data, "sampler", None)
        self.batch_sampler = getattr(source.data, "batch_sampler", None)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _ in islice(_batches_of(self.source, self.device), self.start, None, 2))


def _batches_of(source: FlowSource, device: torch.device) -> Iterator[tuple[Batch, int]]:
    return sized(as_batches(source.data), device, *source.counting_words)


def _halves_of(source: FlowSource, model: nn.Module) -> list[FlowSource]:
    """Two halves of the data; none where there is nothing to halve."""
    device = next(model.parameters()).device
    with untouched(model, source.data):
        head = list(islice(_batches_of(source, device), 2))
    if len(head) > 1:
        return [replace(source, data=_EverySecond(source, device, start), max_samples=None) for start in (0, 1)]
    return [
        replace(source, data=OneBatch(half), max_samples=None, batch_size=size)
        for half, size in halves(*head[0], source.batch_dim)
    ]
