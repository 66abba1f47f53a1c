"""Which channels live or die together: read off the graph of a model's operators.

A unit is removable when the model with the unit's slices set to zero computes exactly what the smaller model without
them computes, for every value of the parameters and every input.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.channels.branches import read_branches
from torch_flowprune.channels.counting import costs_of
from torch_flowprune.channels.groups import Coupling, Frozen
from torch_flowprune.channels.rules import RULES, SPATIAL
from torch_flowprune.channels.slices import Group, Slice
from torch_flowprune.channels.tracing import Block, Reading, read, relabelled, without_onlookers
from torch_flowprune.inputs import (
    arguments,
    check_keywords,
    on_host,
    parameters_of,
    shards_of,
    unwrapped,
    without_cache,
)
from torch_flowprune.masking import dense_copy
from torch_flowprune.torch_internals import tree_map_only


def couple(
    model: nn.Module,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    narrow_heads: bool = False,
    **unknown: Never,
) -> Coupling:
    """The coupling of a model's channels, read from the operators of a forward pass. The model is left as it was.

    Args:
        model: any module. If its forward depends on values, ``torch.export`` must be able to read it.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of them; a batch of two
            samples or more.
        kwargs: further keyword arguments of the model's forward.
        narrow_heads: where a dimension is a product, such as heads times head width, reduce the inner factor: narrower
            heads instead of fewer heads.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        The groups of coupled channels, the residual branches, and what cannot be removed, with the reason.

    Raises:
        UnrecordableError: a ``RuntimeError``, if the model does not run on the example or its code cannot be read.
        TypeError: for what is no model, or no example.
        ValueError: for a sharded model.

    See Also:
        :func:`~torch_flowprune.global_prune`: prunes coupled channels: ``granularity="channel"``.
        :func:`~torch_flowprune.shrink`: removes them.

    >>> import torch, torch_flowprune as fp
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> fp.couple(net, torch.randn(2, 3)).groups[0].size
    4
    """
    check_keywords(couple, unknown)
    check_whole(model)
    dense = _without_masks(model)
    reading = reading_of(dense, example_inputs, kwargs)
    reading = relabelled(reading, dense, RULES) if narrow_heads else reading
    coupling = coupling_of(reading)
    every = {group.name: torch.ones(group.size, dtype=torch.bool) for group in coupling.groups}
    every |= {branch.name: torch.ones(1, dtype=torch.bool) for branch in coupling.branches}
    return replace(coupling, costs=costs_of(reading, coupling, dense, every))


def check_whole(model: nn.Module) -> None:
    """An error for a sharded model, whose graph has what ranks send each other in it.

    Raises:
        ValueError: with the way out.
    """
    if shards_of(model):
        raise ValueError(
            "this model is sharded, and channels are found in the graph of a dense one: call fp.couple before sharding "
            "or on the meta device, and fp.shrink on one rank, with the full state dict, before you shard its result"
        )


def reading_of(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Reading:
    """Of a pruned model that of the model without masks: what is coupled does not change with what is masked."""
    dense = _without_masks(model)
    args, keywords = arguments_of(dense, example_inputs, kwargs)
    return read(without_onlookers(dense, args, keywords), args, keywords, RULES)


def _without_masks(model: nn.Module) -> nn.Module:
    """The model inside of wrappers where nothing is pruned, else a copy: names are those that masks have."""
    model = unwrapped(model)
    pruned = any(target.mask is not None for target in parameters_of(model).values())
    return dense_copy(model)[0] if pruned else model


def arguments_of(
    model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as users have them (a tensor, a tuple, a tokenizer's dict) as a call, on the model's device.

    A language model is called without its cache, unless that is asked for: nothing that it hands out there is a result.

    Raises:
        TypeError: for none.
    """
    if example_inputs is None:
        raise TypeError(
            "example_inputs should be what the model is called with: a tensor, a tuple of arguments or a dict of "
            "them; got None"
        )
    args, keywords = arguments(model, example_inputs, kwargs)
    device = next((parameter.device for parameter in model.parameters()), None)
    place = partial(tree_map_only, Tensor, lambda tensor: tensor.to(device))
    return place(args), place({**without_cache(model, args), **keywords})


@on_host()
def coupling_of(reading: Reading) -> Coupling:
    """The classes of labels that are free, as groups of units that touch the same axes equally often.

    Parts that an axis is split into are groups of their own, so that one unit left of each group leaves no tensor
    empty.
    """
    classes = _free_classes(reading)
    groups, refused = [], dict[int, str]()
    for members, slices in classes.alike(reading):
        reason = _reason_against(slices)
        if reason:
            refused.update(dict.fromkeys(classes.roots[members].tolist(), reason))
        else:
            groups.append(Group("", slices, _multiple_of(reading, classes.roots[members])))
    order = {(block.name, block.axis): i for i, block in enumerate(reading.axes.blocks)}
    groups.sort(
        key=lambda group: min(
            (order[s.parameter, s.axis], int(s.index.min())) for s in group.slices if s.role == "producer"
        )
    )
    branches = tuple(branch for branch, _ in read_branches(reading).values())
    return Coupling(_with_names(groups), _frozen_of(reading, refused), dict(reading.unknown), branches=branches)


@dataclass(frozen=True, eq=False)
class _Classes:
    """The classes of labels that nothing freezes, and their places: entries, ordered by block and by position on it.

    Attributes:
        roots: (classes,) the root of each, in the order in which the blocks show them.
        kind: (classes,) a number, the same for those in the same blocks, equally often, and in the same segments.
        block, position, member: (entries,) a position of a block, and the class that it is in.
    """

    roots: Tensor
    kind: Tensor
    block: Tensor
    position: Tensor
    member: Tensor

    def alike(self, reading: Reading) -> Iterator[tuple[Tensor, tuple[Slice, ...]]]:
        """The classes of each kind, and the slices that they own as units."""
        blocks, n = reading.axes.blocks, len(self.roots)
        place = self.kind[self.member] * len(blocks) + self.block
        order = (place * n + self.member).argsort(stable=True)
        places, sizes = place[order].unique_consecutive(return_counts=True)
        parts = zip(places.tolist(), self.position[order].split(sizes.tolist()), strict=True)
        units = self.kind.bincount().tolist()
        members, known = self.kind.argsort(stable=True).split(units), dict[tuple[int, bytes], Tensor]()

        def index(positions: Tensor, count: int) -> Tensor:
            """One tensor for all slices at the same places: of concatenations there are as many as layers squared."""
            key = count, positions.numpy().tobytes()
            if key not in known:
                known[key] = positions.view(count, -1).clone()
            return known[key]

        for kind, places_of_kind in groupby(parts, key=lambda part: part[0] // len(blocks)):
            owned = [(blocks[at % len(blocks)], index(positions, units[kind])) for at, positions in places_of_kind]
            yield members[kind], tuple(_slice_of(reading, block, where) for block, where in owned)


def _free_classes(reading: Reading) -> _Classes:
    root = reading.solution.root
    block, position, label = reading.axes.places()
    free = ~reading.solution.frozen(label)
    block, position, label = block[free], position[free], label[free]
    member, roots = _numbered(root[label])
    kind = torch.zeros(len(roots), dtype=torch.long)
    parts = member.split(block.bincount().tolist())
    for part in {tuple(part.tolist()): part for part in parts}.values():  # a weight, its bias and its norm say the same
        kind = _told_apart(kind, *part.unique(return_counts=True))
    number = torch.full_like(root, -1)
    number[roots] = torch.arange(len(roots))
    for labels in reading.segments:
        inside = number[root[labels]].unique()
        kind = _told_apart(kind, inside[inside >= 0], torch.tensor(1))
    return _Classes(roots, _numbered(kind)[0], block, position, member)


def _numbered(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each value's number, in order of first appearance; and the values by number."""
    distinct, number = values.unique(return_inverse=True)
    first = torch.full_like(distinct, len(values)).scatter_reduce_(0, number, torch.arange(len(values)), "amin")
    order = first.argsort()
    return order.argsort()[number], distinct[order]


def _told_apart(kind: Tensor, touched: Tensor, times: Tensor) -> Tensor:
    """Kinds of classes, when some are touched that many times by something that the others are not."""
    if not len(touched):
        return kind
    pairs = kind[touched] * (int(times.max()) + 1) + times
    kind[touched] = int(kind.max()) + 1 + pairs.unique(return_inverse=True)[1]
    return kind


def _slice_of(reading: Reading, block: Block, index: Tensor) -> Slice:
    return Slice(
        block.name, block.axis, index, _role_of(reading, block), reading.reads_zero.get((block.name, block.axis), False)
    )


def _reason_against(slices: Sequence[Slice]) -> str:
    if not any(s.role == "producer" for s in slices):
        return "no layer produces it"
    if len(slices[0].index) < 2:
        return "is all one unit: nothing would be left"
    return ""


def _multiple_of(reading: Reading, roots: Tensor) -> int:
    """What the number of these classes has to be a multiple of, so that every axis is one that kernels take."""
    counts = {1}
    for labels, multiple in reading.aligned:
        inside = torch.isin(reading.solution.root[labels], roots)
        if positions := int(inside.sum()) // len(roots):  # of each class
            counts.add(multiple // math.gcd(multiple, positions))
    return math.lcm(*counts)


def _role_of(reading: Reading, block: Block) -> str:
    return "buffer" if block.kind == "buffer" else reading.roles.get((block.name, block.axis), "affine")


def _with_names(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Named after the first producer; a second group of the same producer gets a number."""
    names: list[str] = []
    for g in groups:
        first = next(s.parameter for s in g.slices if s.role == "producer")
        seen = sum(n == first or n.startswith(first + "#") for n in names)
        names.append(f"{first}#{seen + 1}" if seen else first)
    return tuple(replace(g, name=n) for n, g in zip(names, groups, strict=True))


def _frozen_of(reading: Reading, refused: Mapping[int, str]) -> tuple[Frozen, ...]:
    """One entry per axis and reason. The space a kernel covers is no channel and not listed."""
    reasons = {**refused, **reading.solution.reasons}
    texts = dict.fromkeys(reason for reason in reasons.values() if not reason.startswith(f"{SPATIAL} "))
    number = {text: i for i, text in enumerate(texts)}
    coded = torch.full_like(reading.solution.root, -1)
    coded[torch.tensor(list(reasons))] = torch.tensor([number.get(reason, -1) for reason in reasons.values()])
    coded, listed = coded[reading.solution.root], list(texts)
    frozen = []
    for b in reading.axes.blocks:
        counts = Counter(coded[b.start : b.start + b.size].tolist())
        frozen += [
            Frozen(b.name, b.axis, n, _role_of(reading, b), listed[code]) for code, n in counts.items() if code >= 0
        ]
    return (*frozen, *(Frozen(n, 0, 0, "unused", "is not used by the model's forward") for n in reading.unused))
