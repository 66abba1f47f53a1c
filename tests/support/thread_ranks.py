"""Ranks that are threads of one process: what is decided by sums over them is tried without starting processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.inputs import Ranks


class ThreadRanks(Ranks):
    """One of several threads; counts the sums it takes part in, and their bytes."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]) -> None:
        super().__init__()
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board
        self.calls = self.bytes = 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def are_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Iterable[Tensor]) -> None:
        for value in values:
            self.calls, self.bytes = self.calls + 1, self.bytes + value.nbytes
            self._board[self.rank] = value.clone()
            self._barrier.wait(30)
            total = torch.stack(self._board).sum(0).to(value.dtype)
            self._barrier.wait(30)
            value.copy_(total)


def on_threads(size: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """What each rank returns, or the error that it raises."""
    barrier, board, found = threading.Barrier(size), [None] * size, [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadRanks(rank, size, barrier, board))
        except ValueError as error:  # the test looks at it
            found[rank] = error
        except Exception:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found
