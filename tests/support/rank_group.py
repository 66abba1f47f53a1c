"""Several processes that are one gloo group, on one thread each."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed


@contextmanager
def group_of(size: int, rank: int, path: str) -> Iterator[None]:
    """Inside, this process is a rank of so many that meet at a file; a rank that fails leaves at once."""
    torch.set_num_threads(1)
    store = distributed.FileStore(path, size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    try:
        yield
        distributed.barrier()  # a rank that leaves first would take the others down with it
    finally:
        distributed.destroy_process_group()


def group_of_two(rank: int, path: str) -> object:
    """Two of them."""
    return group_of(2, rank, path)


def run_all(rank: int, size: int, path: str, modules: Iterable[str]) -> None:
    """The scenarios of these modules in turn, in one group: starting processes is what takes the time."""
    with group_of(size, rank, path):
        for scenario in [one for name in modules for one in importlib.import_module(name).SCENARIOS]:
            torch.manual_seed(0)
            try:
                scenario(rank, f"{path}.{scenario.__name__}")
            except BaseException as error:
                error.add_note(f"on rank {rank}, in {scenario.__name__}")
                raise
            distributed.barrier()
