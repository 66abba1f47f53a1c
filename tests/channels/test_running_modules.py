"""Where an error comes from: of the modules that are watched, the innermost that it came out of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_flowprune.channels.shrinking.own_code.running_modules import RunningModules


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the sizes do not fit")


class Catches(nn.Module):
    """Falls back on its input where a module fails."""

    def __init__(self, fails: nn.Module) -> None:
        super().__init__()
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.fails(x)
        except RuntimeError:
            return x


def left_running(model: nn.Module, *paths: str, fails: bool) -> list[str]:
    running = RunningModules()
    running.watch(model, paths)
    if fails:
        with pytest.raises(RuntimeError, match="do not fit"):
            model(torch.ones(2))
    else:
        model(torch.ones(2))
    return running.paths


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ((), [""]),
        (("1",), ["", "1"]),
        (("1", "1.0", "0"), ["", "1", "1.0"]),
        (("0", "2"), [""]),
    ],
)
def test_an_error_leaves_the_modules_that_it_came_out_of(paths: tuple[str, ...], expected: list[str]) -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(Fails()), nn.Identity())
    assert left_running(model, *paths, fails=True) == expected


def test_a_run_leaves_none() -> None:
    assert left_running(nn.Sequential(nn.Identity(), nn.Identity()), "0", "1", fails=False) == []


def test_an_error_that_was_caught_is_forgotten() -> None:
    inner = Catches(nn.Sequential(Fails()))
    assert left_running(nn.Sequential(inner), "0", "0.fails", "0.fails.0", fails=False) == []
    behind = nn.Sequential(inner, Fails())
    assert left_running(behind, "0", "0.fails", "1", fails=True) == ["", "1"]
