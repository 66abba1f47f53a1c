"""Other people's code on the model and samples that ours is timed on, out of the folders that a command names.

None of it is kept here.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Batches = list[tuple[Tensor, Tensor]]
Work = Callable[[], Any]

PAPER, TORCH_PRUNING, SYNAPTIC_FLOW = (
    "the paper's code",
    "Torch-Pruning's Taylor",
    "the Synaptic Flow repository's loop",
)


@dataclass(frozen=True)
class Folders:
    """Where each is, if it is at hand.

    Checkouts of the paper's and of Synaptic Flow's repository, a folder Torch-Pruning is installed in.
    """

    paper: Path | None = None
    torch_pruning: Path | None = None
    synaptic_flow: Path | None = None


def paper_products(folder: Path, model: nn.Module, data: Batches) -> Work:
    """The paper's H·g of these samples: its code reads one class after the other, a batch of them each."""
    theirs = _module(folder, "imp_estimator")
    classes, each = len(data), len(data[0][0])
    loader = [(images, torch.full_like(targets, label)) for label, (images, targets) in enumerate(data)]
    loader.append(
        (data[0][0][:1].repeat(classes, 1, 1, 1), torch.arange(classes))
    )  # it reads one sample more of each class than it takes
    net = copy.deepcopy(model)
    return _quiet(lambda: theirs.cal_hg(net, loader, n_samples=each, n_classes=classes, T=200))


def paper_scores(folder: Path, model: nn.Module, data: Batches) -> Work:
    """The paper's loss preservation and Fisher, a sweep each."""
    theirs, net = _module(folder, "imp_estimator"), copy.deepcopy(model)
    return lambda: (theirs.cal_importance_loss_based(net, data), theirs.cal_importance_fisher(net, data))


def taylor(folder: Path, model: nn.Module, data: Batches) -> Work:
    """Torch-Pruning's recipe.

    Gradients summed up on the model, then the importance of every group, by a graph made beforehand.
    """
    tp, net = _module(folder, "torch_pruning"), copy.deepcopy(model).eval()
    ignored = [list(net.modules())[-1]]  # the classifier
    pruner = tp.pruner.BasePruner(
        net, data[0][0][:1], importance=tp.importance.GroupTaylorImportance(), pruning_ratio=0.5, ignored_layers=ignored
    )

    def run() -> list[Tensor]:
        net.zero_grad()
        for images, targets in data:
            functional.cross_entropy(net(images), targets).backward()
        groups = pruner.DG.get_all_groups(
            ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
        )
        return [pruner.estimate_importance(group) for group in groups]

    return run


def synaptic_flow(folder: Path, model: nn.Module, data: Batches, rounds: int) -> Work:
    """The loop of Synaptic Flow's repository down to a tenth of the weights, on its own ResNet-50 with our weights.

    It returns the share of the weights that is left: its scores are in float32, and where they overflow, everything
    goes.
    """
    resnet, generator, pruners, prune = (
        _module(folder, name) for name in ("Models.imagenet_resnet", "Utils.generator", "Pruners.pruners", "prune")
    )
    net = resnet.ResNet(resnet.Bottleneck, [3, 4, 6, 3], num_classes=10)
    net.load_state_dict(model.state_dict(), strict=False)  # without its masks, which are ones

    def run() -> float:
        fresh = copy.deepcopy(net)
        pruner = pruners.SynFlow(generator.masked_parameters(fresh))
        with contextlib.suppress(SystemExit):  # it ends the process where another share than was asked for went
            prune.prune_loop(fresh, None, pruner, data, "cpu", 0.1, "exponential", "global", rounds)
        left, total = pruner.stats()
        return float(left / total)

    return _quiet(run)


def _module(folder: Path, name: str) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def _quiet(run: Work) -> Work:
    def quiet() -> Any:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return run()

    return quiet
