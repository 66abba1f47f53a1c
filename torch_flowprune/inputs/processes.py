"""Several processes, one set of masks. One machine is a process group of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Ranks:
    """The processes that hold copies of one model: sums over all of them, and values they all take from the first."""

    def __init__(self, group: Any = None) -> None:
        self.group = group

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those of the ``DistributedDataParallel`` wrapper; else this process alone."""
        return cls(model.process_group) if isinstance(model, DistributedDataParallel) else cls()

    @property
    def alone(self) -> bool:
        """Whether there is only this process."""
        return self.group is None or torch.distributed.get_world_size(self.group) == 1

    def sum(self, values: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks."""
        if not self.alone:
            for value in values:
                torch.distributed.all_reduce(value, group=self.group)

    def agree(self, values: Iterable[Tensor]) -> None:
        """Replace each tensor by that of the first rank."""
        if not self.alone:
            for value in values:
                torch.distributed.broadcast(value, group=self.group, group_src=0)
