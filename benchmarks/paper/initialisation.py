"""Where each measure stands before any training.

Three kinds of units, four sparsities, and nets whose blocks begin as the identity.
"""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import torch_flowprune as fp
from benchmarks.paper import experiment, models
from benchmarks.paper.data import Batch, Data
from benchmarks.paper.experiment import Part, Row, Setting
from benchmarks.paper.protocol import mask_followers

SPARSITIES = (0.5, 0.75, 0.9, 0.95)
TRAINED_AT = {"weight": 0.9, "filter": 0.75, "channel": 0.75}
"""Where the pruned net is trained, too, by granularity."""
MEASURES = (
    ("magnitude", 1.0), ("loss_preservation", 1.0), ("fisher", 1.0), ("synflow", 1.0), ("random", 1.0),
    ("gradient_norm_increase", 200.0), ("gradient_norm_preservation", 1.0),
)  # fmt: skip
ROUNDS = 20
ITERATIVE = f"synflow, {ROUNDS} rounds"
NONE = "none"


@dataclass(frozen=True)
class Net:
    """How one is built, how it is trained, and by which units it is pruned."""

    build: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    granularities: tuple[str, ...]


def _zero(name: str, classes: int, width: float) -> nn.Module:
    """Every block begins as its shortcut: the last batch norm of the residual branch has γ = 0."""
    model = models.build(name, classes, width)
    for block in model.modules():
        if isinstance(block, models.Block):
            nn.init.zeros_(block.norm2.weight)
    return model


def _vit(classes: int) -> nn.Module:
    transformer = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    return transformer(img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=classes)  # type: ignore[no-any-return]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3)


NETS = {
    "vgg13": Net(lambda classes: models.build("vgg13", classes, 0.125), _sgd, ("weight", "filter")),
    "resnet20": Net(lambda classes: models.build("resnet20", classes, 0.25), _sgd, ("weight", "channel")),
    "resnet20-zero": Net(lambda classes: _zero("resnet20", classes, 0.25), _sgd, ("weight", "channel")),
    "vit": Net(_vit, _adamw, ("weight", "channel")),
}


def initialisation(data: Data, setting: Setting, seed: int) -> Iterator[Part]:
    """ΔL, ‖g‖², emptied layers and exact zeros of every measure at initialisation.

    And what a short training makes of some of the cuts.
    """
    net = NETS[setting.model]
    for granularity in net.granularities:
        yield granularity, partial(_cuts, setting.model, net, granularity, data, setting, seed)


def _cuts(name: str, net: Net, granularity: str, data: Data, setting: Setting, seed: int) -> list[Row]:
    torch.manual_seed(seed)
    model = experiment.settled(net.build(data.classes), data)
    batches, whole = experiment.scored(data, setting, seed)
    before, rows = _point(model, whole), []
    common = {"net": name, "granularity": granularity}
    if granularity == "weight":
        rows.append(
            {**common, "method": NONE, "sparsity": 0.0, **before, "trained": _trained(model, net, data, setting, seed)}
        )
    for method, scores in _scores(model, batches, granularity, seed).items():
        for sparsity in SPARSITIES:
            cut, report = _cut(model, scores, sparsity, granularity, batches)
            after = _point(cut, whole)
            row = {
                **common, "method": method, "sparsity": sparsity, "change": after["loss"] - before["loss"],
                "norm_ratio": _log_ratio(after["gradient_norm"], before["gradient_norm"]),
                "emptied": sum(layer.units == layer.pruned for layer in report.layers), "layers": len(report.layers),
                "zero": None if scores is None else _zeros(scores),
            }  # fmt: skip
            if sparsity == TRAINED_AT[granularity]:
                row["trained"] = _trained(cut, net, data, setting, seed)
            rows.append(row)
    return rows


def _scores(model: nn.Module, batches: list[Batch], granularity: str, seed: int) -> dict[str, fp.Scores | None]:
    found: dict[str, fp.Scores | None] = {}
    for temperature in experiment.TEMPERATURES:
        names = [name for name, own in MEASURES if own == temperature]
        several = fp.scores(
            model, names, batches, granularity=granularity, exclude=_classifier(model), temperature=temperature,
            generator=torch.Generator().manual_seed(seed), progress=False,
        )  # fmt: skip
        found |= {experiment.label(name, temperature): scores for name, scores in several.items()}
    return {**found, ITERATIVE: None}


def _cut(
    model: nn.Module, scores: fp.Scores | None, sparsity: float, granularity: str, batches: list[Batch]
) -> tuple[nn.Module, fp.Report]:
    """A copy, pruned without a floor: a measure that empties layers is to show it."""
    model = copy.deepcopy(model)
    how: dict[str, Any] = {
        "granularity": granularity,
        "exclude": _classifier(model),
        "progress": False,
        "example_inputs": batches[0][0],
    }
    how |= {"method": "synflow", "rounds": ROUNDS} if scores is None else {"scores": scores}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = fp.global_prune(model, sparsity=sparsity, normalize=None, min_keep=0, **how)
    if granularity == "filter" and isinstance(model, models.Classifier):
        mask_followers(model)
    return model, report


def _classifier(model: nn.Module) -> str:
    return "linear*" if isinstance(model, models.Classifier) else "head*"


def _point(model: nn.Module, whole: Batch) -> dict[str, float]:
    at = fp.flow(model, whole, needs=("g",), progress=False)
    assert at.loss is not None
    return {"loss": at.loss, "gradient_norm": experiment.dot(at.g, at.g)}


def _log_ratio(after: float, before: float) -> float | None:
    return math.log10(after / before) if after > 0 else None


def _zeros(scores: fp.Scores) -> float:
    return sum(int((one == 0).sum()) for one in scores.values()) / sum(map(torch.numel, scores.values()))


def _trained(model: nn.Module, net: Net, data: Data, setting: Setting, seed: int) -> dict[str, float]:
    """The loss and accuracy on the test images after a few epochs, with batch norm's statistics taken anew."""
    model = copy.deepcopy(model)
    optimizer = net.optimizer(model)
    if fp.masks(model):
        fp.keep_zeros(model, optimizer)
    for epoch in range(setting.epochs):
        model.train()
        for images, labels in data.epoch(setting.batch, seed * 1_000_003 + epoch):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    loss, accuracy = experiment.evaluate(experiment.settled(model, data), data.test.batches(500))
    return {"loss": loss, "accuracy": accuracy}
