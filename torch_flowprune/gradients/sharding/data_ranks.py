"""The ranks over which the data of a sharded model are spread: those along the axes of the mesh it is cut over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.sharding.sharded_modules import fully_sharded, is_in_parts
from torch_flowprune.inputs import Batch, Ranks
from torch_flowprune.torch_internals import sharded_parameters


class Parts(list[Tensor]):
    """Sums of this rank's parts, over all ranks already: each gradient was summed on its way to them."""


class DataRanks(Ranks):
    """None where all ranks have the same data, as under tensor parallelism alone."""

    run_together = True

    def __init__(self, meshes: Sequence[Any]) -> None:
        super().__init__()
        distinct = {tuple(map(int, mesh.mesh.flatten())): mesh for mesh in meshes}
        if len(distinct) > 1:
            raise ValueError(
                "parameters of this model are sharded over meshes of different ranks (for example experts over their "
                "own mesh), which is not supported: shard over one mesh, or score before fully_shard"
            )
        self.mesh: Any = next(iter(distinct.values()), None)

    @classmethod
    def of_shards(cls, model: nn.Module, otherwise: Ranks) -> Ranks:
        """Those of a model of which they hold parts; of one that is whole, the others."""
        meshes = [one.mesh for module in fully_sharded(model) for one in sharded_parameters(module)]
        return cls(meshes) if is_in_parts(model) else otherwise

    @property
    def alone(self) -> bool:
        """Never: a rank that runs the model by itself waits for the others."""
        return False

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else int(self.mesh.size())

    def sum(self, values: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, but for those that are such sums."""
        if isinstance(values, Parts):
            return
        self._in_place(values, lambda value, group: torch.distributed.all_reduce(value, group=group))

    def agree(self, values: Iterable[Tensor]) -> None:
        """Replace each tensor by that of the first rank."""
        self._in_place(values, lambda value, group: torch.distributed.broadcast(value, group=group, group_src=0))

    def _in_place(self, values: Iterable[Tensor], collective: Callable[[Tensor, Any], object]) -> None:
        """Axis by axis of the mesh, on its devices."""
        if self.mesh is None:
            return
        for value in values:
            moved = value.to(self.mesh.device_type)
            for axis in range(self.mesh.ndim):
                collective(moved, self.mesh.get_group(axis))
            if moved is not value:
                value.copy_(moved)

    def in_step(self, batches: Iterable[tuple[Batch, int]]) -> Iterator[tuple[Batch, int]]:
        """As many on each rank: one that has no more goes through its last one again, of size 0, which counts nothing.

        Raises:
            ValueError: on every rank, where one has no data at all.
        """
        own, last = iter(batches), None
        while True:
            following = next(own, None)
            some = int(self.total(following is not None))
            if not some:
                return
            if last is None and some < self.count:
                raise ValueError(
                    "the data of a rank are empty: each rank needs at least one batch of its own, as all of them run "
                    "a sharded model together"
                )
            batch, size = (last, 0) if following is None else following
            yield batch, size
            last = batch

    def total(self, value: float) -> float:
        """Of a number on each rank."""
        self.sum([number := torch.tensor([value], dtype=torch.float64, device="cpu")])
        return float(number)
