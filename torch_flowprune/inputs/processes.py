"""Several processes, one set of masks. One machine is a process group of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_flowprune.inputs.shards import Box, is_sharded, local


class Ranks:
    """The processes that hold copies or parts of one model: sums over all, and values they all take from the first.

    Those of a mesh with several axes are reached along one axis after the other.
    """

    def __init__(self, *groups: Any, mesh: Any = None) -> None:
        self.groups = tuple(group for group in groups if group is not None)
        self._mesh = mesh

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those of the ``DistributedDataParallel`` wrapper; else this process alone."""
        return cls(model.process_group) if isinstance(model, DistributedDataParallel) else cls()

    @classmethod
    def holding(cls, parameters: Iterable[Tensor]) -> Ranks:
        """Those that hold these parameters, where some are shards; else this process alone.

        Raises:
            ValueError: for shards on several meshes, none of which has the ranks of all.
        """
        meshes: list[Any] = list(dict.fromkeys(one.device_mesh for one in parameters if is_sharded(one)))  # type: ignore[attr-defined]
        if not meshes:
            return cls()
        widest = max(meshes, key=lambda mesh: mesh.size())
        everyone = set(_members(widest))
        if odd := [mesh for mesh in meshes if not everyone.issuperset(_members(mesh))]:
            raise ValueError(
                f"the model's shards lie on {widest} and on {odd[0]}, and no mesh has the ranks of both: use one "
                "mesh (init_device_mesh with mesh_dim_names, and its submeshes by name)"
            )
        if len(everyone) == torch.distributed.get_world_size():
            return cls(torch.distributed.group.WORLD, mesh=widest)
        return cls(*(widest.get_group(axis) for axis in range(widest.ndim)), mesh=widest)

    @property
    def group(self) -> Any:
        """The group, where there is one."""
        return self.groups[0] if self.groups else None

    @property
    def alone(self) -> bool:
        """Whether there is only this process."""
        return all(torch.distributed.get_world_size(group) == 1 for group in self.groups)

    @property
    def are_first(self) -> bool:
        """Whether this process is the first of them."""
        return all(torch.distributed.get_rank(group) == 0 for group in self.groups)

    def counts(self, value: Tensor, placements: Sequence[Any] | None = None) -> bool:
        """Whether of the equal parts of a tensor on several ranks the one that is here is counted."""
        if self._mesh is None or not is_sharded(value):
            return self.are_first
        mesh: Any = value.device_mesh  # type: ignore[attr-defined]
        spread: Sequence[Any] = placements or value.placements  # type: ignore[attr-defined]
        replicas = [at for at, placement in zip(mesh.get_coordinate(), spread, strict=True) if placement.is_replicate()]
        return min(_members(self._mesh)) in _members(mesh) and not any(replicas)

    def sum(self, values: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        if not self.alone:
            for value in values:
                for group in self.groups:
                    torch.distributed.all_reduce(value, group=group)

    def agree(self, values: Iterable[Tensor]) -> None:
        """Replace each tensor by that of the first rank."""
        if not self.alone:
            for value in values:
                for group in self.groups:
                    torch.distributed.broadcast(value, group=group, group_src=0)

    def agreed(self, value: Tensor) -> Tensor:
        """That of the first rank, on the device where this one is."""
        if self.alone:
            return value
        on_device = value.contiguous() if self._mesh is None else value.to(self._mesh.device_type).contiguous()
        self.agree([on_device])
        return on_device.to(value.device)

    def agreed_object(self, value: Any) -> Any:
        """That of the first rank; its tensors should be on the CPU."""
        for group in self.groups:
            torch.distributed.broadcast_object_list(values := [value], group=group, group_src=0)
            value = values[0]
        return value

    def add_up(self, counts: Sequence[int]) -> list[int]:
        """Sums of whole numbers over the ranks."""
        if self.alone:
            return list(counts)
        totals: list[int] = self.summed(torch.tensor(counts, dtype=torch.int64, device="cpu")).tolist()
        return totals

    def dot(self, ones: Iterable[Tensor], others: Iterable[Tensor]) -> float:
        """Σ a·b in float64; of shards every rank gives its parts, and each element counts once."""
        own = sum(
            float((local(a) * local(b)).sum(dtype=torch.float64))
            for a, b in zip(ones, others, strict=True)
            if self.alone or self.counts(a)
        )
        return own if self.alone else float(self.summed(torch.tensor(own, dtype=torch.float64, device="cpu")))

    run_together = False
    """Whether a rank that runs the model waits for the others."""

    def in_step(self, batches: Iterable[tuple[Any, int]]) -> Iterable[tuple[Any, int]]:
        """The batches of this rank with their sizes, which it runs by itself."""
        return batches

    def summed(self, value: Tensor) -> Tensor:
        """The sum over the ranks of a tensor, on the device where this one is."""
        if self.alone:
            return value
        on_device = value.clone() if self._mesh is None else value.to(self._mesh.device_type, copy=True)
        self.sum([on_device])
        return on_device.to(value.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside is done on all ranks or on none: an error on one is an error on all, at its end.

        Raises:
            RuntimeError: on the ranks that had no error of their own.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            others = self.add_up([int(failed)])[0]
        if others:
            raise RuntimeError(
                f"{others} of the ranks met with an error, which they raise: the model is as it was on this rank too"
            )


@dataclass(frozen=True)
class HeldUnits:
    """Which of a model's units are here: a box in the grid that they lie in.

    Attributes:
        grid: how all units of a parameter lie, in their order: single weights as it lies, filters in a row.
        box: the part of it that is here.
        counts: whether these are counted here: of replicas, one is.
        ranks: those that hold the model.
        cut: the axes of the grid along which ranks share it.
    """

    grid: tuple[int, ...]
    box: Box
    counts: bool
    ranks: Ranks
    cut: frozenset[int] = frozenset()

    @property
    def units(self) -> int:
        """How many there are in all."""
        return prod(self.grid)

    def __len__(self) -> int:
        """How many are here."""
        return prod(self.box.size)

    def part(self, values: Tensor) -> Tensor:
        """Of one value for each unit there is, those of the units that are here."""
        return self.box.of(values.reshape(self.grid)).flatten()

    def gathered(self, values: Tensor) -> Tensor:
        """From one value for each unit that is here to one for each there is; every rank calls this."""
        every = values.new_zeros(self.grid, dtype=torch.uint8 if values.dtype is torch.bool else values.dtype)
        if self.counts:
            self.box.of(every).copy_(values.view(self.box.size))
        return self.ranks.summed(every).flatten().to(values.dtype)

    def numbers(self, at: Tensor) -> Tensor:
        """What numbers units have among all there are, by their numbers among those that are here."""
        if not len(self):
            return at
        found = torch.zeros_like(at)
        along = torch.unravel_index(at, self.box.size)
        for place, begin, length in zip(along, self.box.begin, self.grid, strict=True):
            found = found * length + (place + begin)
        return found


def _members(mesh: Any) -> list[int]:
    members: list[int] = mesh.mesh.flatten().tolist()
    return members
