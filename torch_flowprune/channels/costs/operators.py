"""What a model runs, and what it holds meanwhile, with every size a function of the units that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.channels.costs.extents import Extent
from torch_flowprune.torch_internals import tree_map


@dataclass(frozen=True)
class Laid:
    """A tensor without content: its shape, its precision, and its dimensions from the outermost in memory inwards."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    def make(self, device: torch.device) -> Tensor:
        """One like it, of zeros where it holds whole numbers, which then are indices of anything."""
        strides = {dim: prod(self.shape[inner] for inner in self.order[i + 1 :]) for i, dim in enumerate(self.order)}
        made = torch.empty_strided(
            self.shape, [strides[dim] for dim in range(len(self.shape))], dtype=self.dtype, device=device
        )
        # no denormals, which take ten times as long
        return made.uniform_(0.5, 1.5) if self.dtype.is_floating_point else made.zero_()

    def is_like(self, other: Any) -> bool:
        return isinstance(other, Tensor) and (*other.shape, other.dtype) == (*self.shape, self.dtype)

    def __str__(self) -> str:
        order = "" if self.order == tuple(sorted(self.order)) else "@" + "".join(map(str, self.order))
        return f"{str(self.dtype).removeprefix('torch.')}[{'x'.join(map(str, self.shape))}]{order}"


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor that an operator reads."""

    extents: tuple[Extent, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    def at(self, sizes: Mapping[Extent, int]) -> Laid:
        return Laid(tuple(sizes[extent] for extent in self.extents), self.dtype, self.order)

    def bytes(self, sizes: Mapping[Extent, int]) -> int:
        return self.dtype.itemsize * prod(sizes[extent] for extent in self.extents)


@dataclass(frozen=True)
class Call:
    """An operator on tensors of known sizes: ``target`` names it as ``torch.ops`` does."""

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __str__(self) -> str:
        named = [f"{name}={_text(value)}" for name, value in self.kwargs.items()]
        return f"{self.target}({', '.join([*map(_text, self.args), *named])})"

    def ready(self, device: torch.device) -> Callable[[Any], Any]:
        """A function that runs it: on what it is handed, where that is like an operand, and on tensors made here."""
        operator: Any = torch.ops
        for part in self.target.split("."):
            operator = getattr(operator, part)
        slots: list[_Slot] = []
        args, kwargs = _with_slots(list(self.args), slots), _with_slots(dict(self.kwargs), slots)

        def run(handed: Any) -> Any:
            taken = next((slot for slot in slots if slot.operand.is_like(handed)), None)
            for slot in slots:
                slot.fill(handed if slot is taken else None, device)
            made = operator(*args, **kwargs)
            if taken is not None:
                taken.inside[taken.key] = None  # so that its memory is free for what comes next, as in the model
            return made

        return run


@dataclass(eq=False)
class _Slot:
    """Where an operand stands in a call's arguments: what fills it is timed with the call, so it does little."""

    inside: Any
    key: Any
    operand: Laid
    own: Tensor | None = None

    def fill(self, handed: Tensor | None, device: torch.device) -> None:
        if handed is None and self.own is None:
            self.own = self.operand.make(device)
        self.inside[self.key] = self.own if handed is None else handed


def _with_slots(given: Any, slots: list[_Slot]) -> Any:
    """Arguments whose operands can be filled in; where they stand is noted."""
    for key, one in list(given.items()) if isinstance(given, dict) else list(enumerate(given)):
        if isinstance(one, Laid):
            slots.append(_Slot(given, key, one))
        elif isinstance(one, (list, tuple)):
            given[key] = _with_slots(list(one), slots)
    return given


def _text(value: Any) -> str:
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True, eq=False)
class Operator:
    """One step of a forward.

    Attributes:
        name: the module in whose forward it stands, or its own.
        target, args, kwargs: the call, with an ``Operand`` in slot of each tensor and an ``Extent`` in slot of each
            number that follows the units.
        within: dimensions of one position, without which it does not run.
    """

    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    within: tuple[Extent, ...] = ()

    def runs(self, sizes: Mapping[Extent, int]) -> bool:
        """Whether its branch is there."""
        return all(sizes[extent] for extent in self.within)

    def at(self, sizes: Mapping[Extent, int]) -> Call:
        """With these sizes."""

        def known(one: Any) -> Any:
            return one.at(sizes) if isinstance(one, Operand) else sizes[one] if isinstance(one, Extent) else one

        return Call(self.target, *tree_map(known, (self.args, self.kwargs)))

    def to_dict(self, numbers: dict[Extent, int]) -> dict[str, Any]:
        """As plain values."""
        kwargs = {name: _plain(value, numbers) for name, value in self.kwargs.items()}
        args, within = _plain(self.args, numbers), _plain(self.within, numbers)
        return {"name": self.name, "target": self.target, "args": args, "kwargs": kwargs, "within": within}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], extents: Sequence[Extent]) -> Operator:
        kwargs = {name: _from_plain(value, extents) for name, value in data["kwargs"].items()}
        args, within = _from_plain(data["args"], extents), _from_plain(data.get("within", ()), extents)
        return cls(data["name"], data["target"], tuple(args), kwargs, tuple(within))

    def extents(self) -> Iterator[Extent]:
        yield from _extents_in((self.args, self.kwargs, self.within))


def _extents_in(value: Any) -> Iterator[Extent]:
    if isinstance(value, Operand):
        yield from value.extents
    elif isinstance(value, Extent):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _extents_in(item)


def _plain(value: Any, numbers: dict[Extent, int]) -> Any:
    """Arguments of an operator as plain values: extents by their numbers, which are given to those that are new."""
    if isinstance(value, Extent):
        return {"extent": numbers.setdefault(value, len(numbers))}
    if isinstance(value, Operand):
        extents = [numbers.setdefault(extent, len(numbers)) for extent in value.extents]
        return {"operand": extents, "dtype": _word(value.dtype), "order": list(value.order)}
    if isinstance(value, (list, tuple)):
        return [_plain(one, numbers) for one in value]  # a graph's lists and tuples are classes of its own
    if isinstance(value, torch.device):
        return {"device": str(value)}
    return {"torch": _word(value)} if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) else value


def _from_plain(value: Any, extents: Sequence[Extent]) -> Any:
    """What :func:`_plain` was given."""
    if isinstance(value, (list, tuple)):
        return [_from_plain(one, extents) for one in value]
    if not isinstance(value, Mapping):
        return value
    if "operand" in value:
        dtype = getattr(torch, value["dtype"])
        return Operand(tuple(extents[number] for number in value["operand"]), dtype, tuple(value["order"]))
    if "extent" in value:
        return extents[value["extent"]]
    return torch.device(value["device"]) if "device" in value else getattr(torch, value["torch"])


def _word(value: object) -> str:
    return str(value).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Holding:
    """A tensor in memory from the step that makes it to the step before which it is let go; -1: from the start.

    Without a position of all that it is ``within`` it is not there at all.
    """

    operand: Operand
    made: int
    freed: int
    within: tuple[Extent, ...] = ()

    def bytes(self, sizes: Mapping[Extent, int]) -> int:
        return self.operand.bytes(sizes) if all(sizes[extent] for extent in self.within) else 0

    def to_dict(self, numbers: dict[Extent, int]) -> dict[str, Any]:
        """As plain values."""
        within = _plain(self.within, numbers)
        return {"operand": _plain(self.operand, numbers), "made": self.made, "freed": self.freed, "within": within}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], extents: Sequence[Extent]) -> Holding:
        within = tuple(_from_plain(data.get("within", ()), extents))
        return cls(_from_plain(data["operand"], extents), data["made"], data["freed"], within)


def most_held(holdings: Iterable[Holding], sizes: Mapping[Extent, int]) -> int:
    """The most bytes that are held at a time."""
    change: dict[int, int] = {}
    for holding in holdings:
        size = holding.bytes(sizes)
        change[holding.made] = change.get(holding.made, 0) + size
        change[holding.freed] = change.get(holding.freed, 0) - size
    held = most = 0
    for step in sorted(change):
        held += change[step]
        most = max(most, held)
    return most
