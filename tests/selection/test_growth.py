"""Cost grows no faster than the work: counted at n and 10n, without a clock."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_flowprune as fp

PACKAGE = str(Path(fp.__file__).parent)
FEW, MANY = 30, 300
SLACK = 1.1


@dataclass
class Work:
    """What a call did: lines of this package that ran, turns of loops among them, and operators that torch ran."""

    lines: int = 0
    operators: int = 0

    def is_in_proportion_to(self, less: Work, times: float) -> bool:
        return self.lines <= times * SLACK * less.lines and self.operators <= times * SLACK * less.operators


class Operators(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.work.operators += 1
        return operator(*args, **(kwargs or {}))


@contextmanager
def lines_counted(work: Work) -> Iterator[None]:
    def line(_frame: FrameType, event: str, _value: Any) -> Any:
        work.lines += event == "line"
        return line

    def call(frame: FrameType, _event: str, _value: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def work_of(call: Callable[[], object]) -> Work:
    work = Work()
    with Operators(work), lines_counted(work):
        call()
    return work


def linear_layers(n: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(n)])


def alternating_layers(n: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(4 + i % 2, 4, bias=False) for i in range(n)])


LAYER_CASES: dict[str, Callable[[int], Callable[[], object]]] = {
    "weights": lambda n: lambda: fp.global_prune(linear_layers(n), sparsity=0.5),
    "weights in two rounds": lambda n: lambda: fp.global_prune(linear_layers(n), sparsity=0.5, rounds=2),
    "scores": lambda n: lambda: fp.scores(linear_layers(n), "magnitude"),
}


@pytest.mark.parametrize("case", LAYER_CASES)
def test_ten_times_the_layers_are_ten_times_the_work(case: str) -> None:
    few, many = (work_of(LAYER_CASES[case](n)) for n in (FEW, MANY))
    assert many.is_in_proportion_to(few, MANY / FEW), (few, many)
