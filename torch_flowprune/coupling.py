"""Which channels live or die together.

`couple` reads a model's graph and gives a `Coupling`: groups of parameter slices, one unit per channel, that have to
be kept or removed together, and a list of what can not be removed, with the reason. It is a plain value: print it,
draw it, store it as JSON, or write one by hand.

A unit is removable when the model with the unit's slices set to zero computes exactly what the smaller model without
them computes, for every value of the parameters and every input.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_flowprune.axes import Block
from torch_flowprune.graph import Reading, read
from torch_flowprune.masking import dense_copy
from torch_flowprune.rules import RULES, SPATIAL
from torch_flowprune.targets import parameters_of

__all__ = ["Coupling", "Frozen", "Group", "Slice", "alive", "couple", "masks", "rows"]

MASKED = ("producer", "affine", "consumer")


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one parameter or buffer that belongs to the units of a group.

    index: (units, positions) long, the positions along `axis` of each unit (a channel flattened over space has many).
    role: `producer` computes the unit, `affine` scales or shifts it or is added to it, `consumer` reads it, `buffer`
    goes along (running statistics, position tables).
    reads_zero: for consumers, True where the unit is exactly zero when it is read and its producers are masked: the
    consumer's columns then need no mask.
    """

    parameter: str
    axis: int
    index: Tensor
    role: str
    reads_zero: bool = False

    def __post_init__(self) -> None:
        if self.role not in (*MASKED, "buffer"):
            raise ValueError(f"role of {self.parameter!r} must be producer, affine, consumer or buffer, not {self.role!r}")
        index = torch.as_tensor(self.index, dtype=torch.long)
        object.__setattr__(self, "index", index[:, None] if index.ndim == 1 else index)

    def of(self, tensor: Tensor) -> Tensor:
        """(units, elements): what the slice holds of its parameter."""
        picked = tensor.index_select(self.axis, self.index.reshape(-1).to(tensor.device))
        return picked.movedim(self.axis, 0).reshape(len(self.index), -1)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are of one kind: each owns the same slices of the same parameters.

    Attributes:
        name: that of the first parameter which produces the units.
        slices: what every unit owns a part of.
    """

    name: str
    slices: tuple[Slice, ...]

    @property
    def size(self) -> int:
        """How many units the group has."""
        return len(self.slices[0].index)


@dataclass(frozen=True)
class Frozen:
    """Positions of one axis of a parameter that can not be removed, and why."""

    parameter: str
    axis: int
    positions: int
    role: str
    reason: str


@dataclass(frozen=True, eq=False)
class Coupling:
    """What may be removed of a model, and what not: a plain value, to print, to draw, to store, or to write by hand.

    Attributes:
        groups: the removable units.
        frozen: what is not removable, with the reason.
        unknown: operators without a rule, and how many of them the graph has.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...] = ()
    unknown: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are {', '.join(g.name for g in self.groups) or 'none'}")

    def share(self) -> float:
        """Removable output channels of linear layers and convolutions / all of them."""
        free = sum(s.index.numel() for g in self.groups for s in g.slices if s.role == "producer")
        held = sum(f.positions for f in self.frozen if f.role == "producer")
        return free / (free + held) if free + held else 0.0

    def __str__(self) -> str:
        lines = []
        for g in self.groups:
            lines.append(f"{g.name}: {g.size} units")
            lines += [f"    {s.role:9}{s.parameter} axis {s.axis}{each(s)}" for s in g.slices]
        lines += ["not removable:"] if self.frozen else []
        lines += [f"    {f.parameter} axis {f.axis}, {f.positions} positions: {f.reason}" for f in self.frozen]
        lines += [f"operators without a rule: {', '.join(f'{k} ({n})' for k, n in self.unknown.items())}"] if self.unknown else []
        return "\n".join(lines)

    def to_dot(self) -> str:
        """The groups as a Graphviz graph: a box per group, producers left, consumers right."""
        lines = ["digraph coupling {", "  rankdir=LR; node [shape=box, fontsize=10];"]
        for i, g in enumerate(self.groups):
            lines.append(f'  g{i} [label="{g.name}\\n{g.size} units", shape=ellipse];')
            for j, s in enumerate(g.slices):
                lines.append(f'  g{i}s{j} [label="{s.parameter}\\naxis {s.axis}{each(s)}"];')
                ends = (f"g{i}", f"g{i}s{j}") if s.role == "consumer" else (f"g{i}s{j}", f"g{i}")
                lines.append(f'  {ends[0]} -> {ends[1]} [label="{s.role}"];')
        return "\n".join([*lines, "}"])

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        groups = [{"name": g.name, "slices": [{**vars(s), "index": s.index.tolist()} for s in g.slices]} for g in self.groups]
        return {"groups": groups, "frozen": [vars(f) for f in self.frozen], "unknown": dict(self.unknown)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Coupling:
        groups = tuple(Group(g["name"], tuple(Slice(**s) for s in g["slices"])) for g in data["groups"])
        return cls(groups, tuple(Frozen(**f) for f in data.get("frozen", ())), dict(data.get("unknown", {})))


def each(s: Slice) -> str:
    return f", {s.index.shape[1]} positions each" if s.index.shape[1] > 1 else ""


# -- reading a model ------------------------------------------


def couple(model: nn.Module, example_inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Coupling:
    """The coupling of a model's channels, read from the graph that ``torch.export`` gives of it. The model is left as it was.

    Args:
        model: any module that ``torch.export`` reads.
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


# -- rows and masks ------------------------------------------


def rows(tensors: Mapping[str, Tensor], group: Group, roles: Collection[str] = ("producer",)) -> Tensor:
    """(units, elements): what the group's slices of the given roles hold, side by side along the last axis."""
    return torch.cat([s.of(tensors[s.parameter]) for s in group.slices if s.role in roles], dim=-1)


def masks(coupling: Coupling, keep: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """keep: group name -> (units,) bool. Gives parameter name -> bool mask, for the parameters that lose something.

    All of a removed unit's parameters are masked, the consumers' columns too: whatever an activation or a norm makes
    of a channel of zeros (a sigmoid's 0.5, a running mean's shift) is then multiplied by zero, in eval and in train
    mode. Where two activations are multiplied with each other (attention), `couple` has proved that one of them is
    zero, or frozen both.
    """
    out: dict[str, Tensor] = {}
    for name, kept in keep.items():
        for s in coupling[name].slices:
            gone = s.index[~kept.cpu()].reshape(-1)
            if s.role in MASKED and len(gone):
                tensor = tensors[s.parameter]
                mask = out.setdefault(s.parameter, torch.ones_like(tensor, dtype=torch.bool))
                mask.index_fill_(s.axis, gone.to(mask.device), False)
    return out


def alive(coupling: Coupling, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Group name -> (units,) bool: False where the masks leave nothing of a unit, so that it can be removed.

    All of its producers and all that is added to it or scales it has to be masked, and its consumers' columns, except
    where they read exact zeros.
    """
    out = {}
    for group in coupling.groups:
        kept = torch.zeros(group.size, dtype=torch.bool)
        for s in group.slices:
            if s.role == "buffer" or (s.role == "consumer" and s.reads_zero):
                continue
            mask = masks.get(s.parameter)
            kept |= s.of(mask.cpu()).any(-1) if mask is not None else True
        out[group.name] = kept
    return out
