"""Two processes that are one gloo group, on one thread each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed


@contextmanager
def group_of_two(rank: int, path: str) -> Iterator[None]:
    """Inside, this process is a rank of two that meet at a file; a rank that fails leaves at once."""
    torch.set_num_threads(1)
    store = distributed.FileStore(path, 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        yield
        distributed.barrier()  # a rank that leaves first would take the other down with it
    finally:
        distributed.destroy_process_group()
