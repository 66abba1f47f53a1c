"""Several processes that are one gloo group, on one thread each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import distributed

Scenario: TypeAlias = Callable[[int, str], None]
"""What a rank does, and a path of its own for what it writes."""

# What ranks import, which takes seconds a process: they are forked from one that has imported it, and run nothing.
_IMPORTED = [
    "pytest",
    "torch._dynamo",  # which the first fully_shard imports
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch_flowprune",
]


def on_ranks(size: int, folder: Path, scenarios: Sequence[Scenario]) -> None:
    """These scenarios in turn, in one group of so many ranks."""
    start(size, _in_turn, size, str(folder / "store"), list(scenarios))


def start(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """A function of ``(rank, *arguments)`` in so many processes; an error in one is an error here."""
    forked = "forkserver" in multiprocessing.get_all_start_methods()
    multiprocessing.set_forkserver_preload(_IMPORTED)
    method = "forkserver" if forked else "spawn"
    torch.multiprocessing.start_processes(function, arguments, size, start_method=method)


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


def _in_turn(rank: int, size: int, path: str, scenarios: Sequence[Scenario]) -> None:
    with group_of(size, rank, path):
        for scenario in scenarios:
            torch.manual_seed(0)
            try:
                scenario(rank, f"{path}.{scenario.__name__}")
            except BaseException as error:
                raise RuntimeError(f"on rank {rank}, in {scenario.__name__}") from error
            distributed.barrier()
