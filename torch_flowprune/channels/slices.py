"""Slices of parameters that units own, and the groups of units that own a part of the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

MASKED = ("producer", "affine", "consumer")
ROLES = (*MASKED, "direction", "buffer")


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one parameter or buffer that belongs to the units of a group.

    Attributes:
        parameter: the name of the parameter or buffer.
        axis: the axis along which it is cut.
        index: a long tensor (units, positions): the positions along ``axis`` of each unit (a channel that is flattened
            over space has many).
        role: ``producer`` computes the unit, ``affine`` scales or shifts it or is added to it, ``consumer`` reads it,
            ``buffer`` holds its statistics or tables (running statistics, position tables), ``direction`` is multiplied
            by the length that produces it (weight norm). All but the last two are masked.
        reads_zero: for consumers, True if the unit is exactly zero where it is read when its producers are masked; the
            consumer's columns then need no mask.

    Raises:
        ValueError: for another role, or an index of another shape or with a negative position.

    See Also:
        :class:`~torch_flowprune.Group`: the slices that belong to the same units.

    >>> import torch, torch_flowprune as fp
    >>> rows = fp.Slice("0.weight", axis=0, index=torch.arange(4), role="producer")
    >>> rows.of(torch.zeros(4, 3)).shape  # four units, of three weights each
    torch.Size([4, 3])
    """

    parameter: str
    axis: int
    index: Tensor
    role: str
    reads_zero: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role of {self.parameter!r} must be one of {', '.join(ROLES)}, not {self.role!r}")
        index = torch.as_tensor(self.index, dtype=torch.long, device=getattr(self.index, "device", "cpu"))
        if index.ndim not in (1, 2) or not index.numel() or int(index.min()) < 0:
            raise ValueError(
                f"index of {self.parameter!r} should hold the positions of each unit, (units,) or (units, "
                "positions), from 0 on; "
                f"got shape {tuple(index.shape)}{f' with {int(index.min())} in it' if index.numel() else ''}"
            )
        object.__setattr__(self, "index", index[:, None] if index.ndim == 1 else index)

    def check_fits(self, tensors: Mapping[str, Tensor], group: str) -> None:
        """Raise an error if the slice does not fit these tensors.

        Raises:
            ValueError: for an unknown name, axis or position; it names the group.
        """
        if self.parameter not in tensors:
            near = get_close_matches(self.parameter, tensors, n=1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ValueError(
                f"group {group!r} has a slice of {self.parameter!r}, and the model has no such {self._kind}{hint}"
            )
        shape = tuple(tensors[self.parameter].shape)
        if not 0 <= self.axis < len(shape):
            raise ValueError(
                f"group {group!r} has a slice along axis {self.axis} of {self.parameter!r}, whose shape is {shape}"
            )
        if int(self.index.max()) >= shape[self.axis]:
            raise ValueError(
                f"group {group!r} has position {int(self.index.max())} on axis {self.axis} of {self.parameter!r}, "
                f"which has {shape[self.axis]}"
            )

    @property
    def _kind(self) -> str:
        return "buffer" if self.role == "buffer" else "parameter"

    def of(self, tensor: Tensor) -> Tensor:
        """(units, elements): the slice of its parameter; a view if the slice is all of it, in order."""
        places = self.index.reshape(-1)
        if len(places) == tensor.shape[self.axis] and torch.equal(
            places, torch.arange(len(places), device=places.device)
        ):
            return tensor.movedim(self.axis, 0).reshape(len(self.index), -1)
        picked = tensor.index_select(self.axis, places.to(tensor.device))
        return picked.movedim(self.axis, 0).reshape(len(self.index), -1)


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind: each owns a part of the same slices.

    Attributes:
        name: the name of the first parameter that produces the units.
        slices: the slices, of which every unit owns a part.
        multiple: operators take a number of units that is a multiple of this one.

    Raises:
        ValueError: without slices, or if they have different numbers of units.

    See Also:
        :class:`~torch_flowprune.Coupling`: all groups of a model.

    >>> import torch, torch_flowprune as fp
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> group = fp.couple(net, torch.randn(2, 3)).groups[0]
    >>> group.name, group.size, [part.parameter for part in group.slices]
    ('0.weight', 4, ['0.weight', '0.bias', '2.weight'])
    """

    name: str
    slices: tuple[Slice, ...]
    multiple: int = 1

    def __post_init__(self) -> None:
        if not self.slices:
            raise ValueError(f"group {self.name!r} has no slices: a unit is what they hold of the parameters")
        for part in self.slices:
            if len(part.index) != self.size:
                raise ValueError(
                    f"group {self.name!r} has {self.size} units in {self.slices[0].parameter!r} and {len(part.index)} "
                    f"in {part.parameter!r}: "
                    "expected a row of index for each unit in every slice"
                )

    @property
    def size(self) -> int:
        """How many units the group has."""
        return len(self.slices[0].index)
