"""Cost grows no faster than the work: counted at n and 10n, without a clock."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_flowprune as fp
from torch_flowprune.gradients.batches.memory_budget import Peak
from torch_flowprune.inputs.named_parameters import parameters
from torch_flowprune.scoring.candidates import channel_candidates, masks_of
from torch_flowprune.selection.ranking.lowest_k import lowest, lowest_of_each

PACKAGE = str(Path(fp.__file__).parent)
FEW, MANY = 30, 300
SLACK = 1.1


@dataclass
class Work:
    """What a call did: lines of this package that ran, turns of loops among them, and operators that torch ran."""

    lines: int = 0
    operators: Counter[str] = field(default_factory=Counter)

    def is_in_proportion_to(self, less: Work, times: float) -> bool:
        most = times * SLACK
        return self.lines <= most * less.lines and self.operators.total() <= most * less.operators.total()


class Operators(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.work.operators[operator.overloadpacket.__name__] += 1
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


def work_of(call: Callable[[nn.Module], object], model: nn.Module) -> Work:
    work = Work()
    with Operators(work), lines_counted(work):
        call(model)
    return work


def linear_layers(n: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(n)])


def alternating_layers(n: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(4 + i % 2, 4, bias=False) for i in range(n)])


LAYER_CASES: dict[str, tuple[Callable[[int], nn.Module], Callable[[nn.Module], object]]] = {
    "weights": (linear_layers, lambda model: fp.global_prune(model, sparsity=0.5)),
    "weights in two rounds": (linear_layers, lambda model: fp.global_prune(model, sparsity=0.5, rounds=2)),
    "filters over their mean": (
        alternating_layers,
        lambda model: fp.global_prune(model, sparsity=0.5, granularity="filter"),
    ),
    "filters of two alternating shapes": (
        alternating_layers,
        lambda model: fp.global_prune(model, sparsity=0.05, granularity="filter", normalize=None),
    ),
    "every layer by itself": (
        alternating_layers,
        lambda model: fp.global_prune(model, sparsity=0.5, scope="layer"),
    ),
    "scores": (linear_layers, lambda model: fp.scores(model, "magnitude")),
}


@pytest.mark.parametrize("case", LAYER_CASES)
def test_ten_times_the_layers_are_ten_times_the_work(case: str) -> None:
    build, call = LAYER_CASES[case]
    torch.manual_seed(0)
    few, many = (work_of(call, build(n)) for n in (FEW, MANY))
    assert many.is_in_proportion_to(few, MANY / FEW), (few, many)


def test_layers_of_one_size_are_selected_together() -> None:
    work = work_of(lambda model: fp.global_prune(model, sparsity=0.5, scope="layer"), linear_layers(40))
    assert work.operators["nonzero_static"] == 0, "a sweep of its own for every layer"
    assert work.operators["cumsum"] <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_layers_cut_together_are_cut_as_each_alone(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    scores = [torch.randint(-3, 3, (9,), generator=source).to(dtype) for _ in range(60)]
    alive = [None if i % 3 else torch.rand(9, generator=source) > 0.3 for i in range(60)]
    counts = [9 if flags is None else int(flags.sum()) for flags in alive]
    ks = [(0, count, count // 2)[i % 4 % 3] for i, count in enumerate(counts)]
    for found, one, k, flags in zip(lowest_of_each(scores, ks, alive), scores, ks, alive, strict=True):
        expected = lowest([one], k, [flags])
        assert torch.equal(found.keep[0], expected.keep[0])
        assert (found.kept, found.threshold, found.tied) == (expected.kept, expected.threshold, expected.tied)


def test_each_measure_of_a_comparison_is_ranked_once() -> None:
    methods = ("magnitude", "l1", "loss_preservation", "taylor")
    batch = (torch.randn(4, 4), torch.randint(4, (4,)))
    work = work_of(lambda model: fp.compare(model, methods, 0.5, batch), linear_layers(2))
    assert work.operators["_unique2"] == len(methods)


@pytest.mark.parametrize("normalize", [None, "mean"])
def test_a_budget_is_met_with_one_scoring_of_each_group(normalize: str | None) -> None:
    def prune(model: nn.Module) -> object:
        options = {"cost": "parameters", "normalize": normalize, "example_inputs": torch.ones(2, 4)}
        return fp.global_prune(model, "magnitude", 0.5, granularity="channel", **options)

    groups = 6
    layers = [layer for _ in range(groups) for layer in (nn.Linear(4, 4), nn.Tanh())]
    work = work_of(prune, nn.Sequential(*layers, nn.Linear(4, 2)))
    assert work.operators["linalg_vector_norm"] == groups


class Concatenating(nn.Module):
    """Every layer reads all that came before it, as DenseNet's do."""

    def __init__(self, depth: int, width: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width * (i + 1), width) for i in range(depth)])
        self.head = nn.Linear(width * (depth + 1), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.head(x)


def test_masks_of_concatenations_are_made_once_a_parameter_and_take_time_by_the_slice() -> None:
    works, slices = [], []
    for depth in (4, 16):
        model = Concatenating(depth)
        found = channel_candidates(model, torch.ones(2, 3))
        keeps = dict.fromkeys(found, torch.tensor([False, True, True]))
        work = work_of(lambda _, found=found, keeps=keeps: masks_of(found, keeps), model)  # type: ignore[misc]
        assert work.operators["ones_like"] == len(masks_of(found, keeps)) == 2 * depth + 1
        works.append(work)
        slices.append(sum(len(units.group.slices) for units in found.values()))  # type: ignore[attr-defined]
    assert works[1].is_in_proportion_to(works[0], slices[1] / slices[0]), (works, slices)


def test_slices_of_concatenations_share_their_positions() -> None:
    few, many = (fp.couple(Concatenating(depth), torch.ones(2, 3)) for depth in (8, 16))
    slices = [sum(len(group.slices) for group in coupling.groups) for coupling in (few, many)]
    tensors = [len({id(part.index) for group in coupling.groups for part in group.slices}) for coupling in (few, many)]
    assert slices[1] > 3 * slices[0]
    assert tensors[1] <= 2 * SLACK * tensors[0]


def test_each_parameter_of_coupled_channels_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: Counter[str] = Counter()

    def check(target: Any, name: str, **_: Any) -> Any:
        checked[name] += 1
        return target

    monkeypatch.setattr("torch_flowprune.scoring.candidates.group_units.check_can_mask", check)
    channel_candidates(Concatenating(8), torch.ones(2, 3))
    assert len(checked) == checked.total() == 17


def test_random_scores_are_drawn_where_they_are_read_and_not_stored() -> None:
    def peak(method: str) -> int:
        with Peak() as memory:
            fp.global_prune(nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(4)]), method, 0.5)
        return memory.peak

    assert peak("random") <= SLACK * peak("magnitude")


def test_a_prune_walks_over_the_model_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walks = linear_layers(3), []
    own = parameters._modules
    monkeypatch.setattr(
        parameters,
        "_modules",
        lambda module, *path, **more: (walks.append(1) if not path else 0) or own(module, *path, **more),
    )
    fp.global_prune(model, sparsity=0.5)
    assert len(walks) <= 5


def test_no_cycles_are_looked_for_while_names_and_masks_are_worked_on() -> None:
    running: list[bool] = []

    class Watching(nn.Linear):
        def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
            running.append(gc.isenabled())
            return super().register_forward_pre_hook(*args, **kwargs)

    fp.global_prune(nn.Sequential(Watching(4, 4)), sparsity=0.5)
    assert running == [False]
    assert gc.isenabled()
    with pytest.raises(ValueError, match="sparsity"):
        fp.global_prune(nn.Sequential(Watching(4, 4)), sparsity=2.0)
    assert gc.isenabled()
