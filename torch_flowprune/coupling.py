"""Which channels live or die together: read off the graph of a model's operators.

A unit is removable when the model with the unit's slices set to zero computes exactly what the smaller model without
them computes, for every value of the parameters and every input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_flowprune.axes import Block
from torch_flowprune.groups import Coupling, Frozen, Group, Slice, alive, masks, rows
from torch_flowprune.masking import dense_copy
from torch_flowprune.reading import Reading, read
from torch_flowprune.rules import RULES, SPATIAL
from torch_flowprune.targets import parameters_of

__all__ = ["Coupling", "Frozen", "Group", "Slice", "alive", "couple", "masks", "rows"]


def couple(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Coupling:
    """The coupling of a model's channels, read off the operators of one forward. The model is left as it was.

    Args:
        model: any module. Where its forward depends on values, ``torch.export`` has to be able to read it.
        example_inputs: what it is called with: a tensor, a tuple of arguments or a dict of them; a batch of two samples or more.
        kwargs: keyword arguments of the model's forward, besides.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> couple(net, torch.randn(2, 3)).groups[0].size
    4
    """
    return coupling_of(reading_of(model, example_inputs, kwargs))


def reading_of(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Reading:
    """Of a pruned model that of the model without masks: what is coupled does not change with what is masked."""
    pruned = any(target.mask is not None for target in parameters_of(model).values())
    dense = dense_copy(model)[0] if pruned else model
    return read(dense, *arguments_of(dense, example_inputs, kwargs), RULES)


def arguments_of(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as users have them (a tensor, a tuple of arguments, a tokenizer's dict) as a call, on the model's device.

    Raises:
        TypeError: for none.
    """
    if example_inputs is None:
        raise TypeError("example_inputs should be what the model is called with: a tensor, a tuple of arguments or a dict of them; got None")
    named = isinstance(example_inputs, Mapping)
    several = isinstance(example_inputs, (tuple, list))
    args = () if named else tuple(example_inputs) if several else (example_inputs,)
    device = next((parameter.device for parameter in model.parameters()), None)
    place = partial(tree_map_only, Tensor, lambda tensor: tensor.to(device))
    return place(args), place({**(example_inputs if named else {}), **(kwargs or {})})


def coupling_of(reading: Reading) -> Coupling:
    """The classes of labels that are free, as groups of units that touch the same axes equally often.

    Parts that an axis is split into are groups of their own, so that one unit left of each group leaves no tensor
    empty.
    """
    owners = owners_of_free_classes(reading)
    segments = segments_of_classes(reading)
    alike: dict[tuple[tuple[tuple[int, int], ...], frozenset[int]], list[int]] = {}
    for root, places in owners.items():
        key = tuple((b, len(p)) for b, p in places.items()), segments.get(root, frozenset())
        alike.setdefault(key, []).append(root)
    groups, refused = [], dict[int, str]()
    for (signature, _), roots in alike.items():
        slices = tuple(
            Slice(
                block.name,
                block.axis,
                torch.tensor([owners[r][b] for r in roots]),
                role_of(reading, block),
                reading.reads_zero.get((block.name, block.axis), False),
            )
            for b, _ in signature
            for block in [reading.axes.blocks[b]]
        )
        reason = reason_against(slices)
        if reason:
            refused.update(dict.fromkeys(roots, reason))
        else:
            groups.append(Group("", slices))
    groups.sort(key=lambda g: order_of(reading, g))
    return Coupling(named(groups), frozen_of(reading, refused), dict(reading.unknown))


def owners_of_free_classes(reading: Reading) -> dict[int, dict[int, list[int]]]:
    """Class -> number of a named dimension -> positions on it, for classes of labels that nothing freezes."""
    owners: dict[int, dict[int, list[int]]] = {}
    for i, b in enumerate(reading.axes.blocks):
        labels = torch.arange(b.start, b.start + b.size)
        free = (~reading.solution.frozen(labels)).nonzero().flatten()
        for position, root in zip(free.tolist(), reading.solution.root[labels[free]].tolist(), strict=True):
            owners.setdefault(root, {}).setdefault(i, []).append(position)
    return owners


def segments_of_classes(reading: Reading) -> dict[int, frozenset[int]]:
    """Class -> the parts of split axes it is found in; parts with the same classes count as one."""
    parts = {frozenset(reading.solution.root[labels].tolist()) for labels in reading.segments}
    found: dict[int, set[int]] = {}
    for i, part in enumerate(parts):
        for root in part:
            found.setdefault(root, set()).add(i)
    return {root: frozenset(numbers) for root, numbers in found.items()}


def reason_against(slices: Sequence[Slice]) -> str:
    if not any(s.role == "producer" for s in slices):
        return "no layer produces it"
    if len(slices[0].index) < 2:
        return "is all one unit: nothing would be left"
    return ""


def role_of(reading: Reading, block: Block) -> str:
    return "buffer" if block.kind == "buffer" else reading.roles.get((block.name, block.axis), "affine")


def order_of(reading: Reading, group: Group) -> tuple[int, int]:
    order = {(b.name, b.axis): i for i, b in enumerate(reading.axes.blocks)}
    return min((order[s.parameter, s.axis], int(s.index.min())) for s in group.slices if s.role == "producer")


def named(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Named after the first producer; a second group of the same producer gets a number."""
    names: list[str] = []
    for g in groups:
        first = next(s.parameter for s in g.slices if s.role == "producer")
        seen = sum(n == first or n.startswith(first + "#") for n in names)
        names.append(f"{first}#{seen + 1}" if seen else first)
    return tuple(Group(n, g.slices) for n, g in zip(names, groups, strict=True))


def frozen_of(reading: Reading, refused: Mapping[int, str]) -> tuple[Frozen, ...]:
    """One entry per axis and reason. The space a kernel covers is no channel and not listed."""
    found = []
    for b in reading.axes.blocks:
        counts: dict[str, int] = {}
        for root in reading.solution.root[b.start : b.start + b.size].tolist():
            reason = reading.solution.reasons.get(root) or refused.get(root)
            if reason is not None and not reason.startswith(SPATIAL + " "):
                counts[reason] = counts.get(reason, 0) + 1
        found += [Frozen(b.name, b.axis, n, role_of(reading, b), reason) for reason, n in counts.items()]
    return (*found, *(Frozen(n, 0, 0, "unused", "is not used by the model's forward") for n in reading.unused))
