"""What the experiments of the claims share.

Nets, how they are trained, scores of every measure, cuts, and where a cut model stands.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import torch_flowprune as fp
from benchmarks.paper import models
from benchmarks.paper.data import Batch, Data
from benchmarks.paper.protocol import mask_followers

Row = dict[str, Any]
Part = tuple[str, Callable[[], list[Row]]]
"""The name of a part of an experiment, and how to get its rows: what is in the file already is not asked for again."""

TEMPERATURES = (1.0, 200.0)
METHODS = (
    ("magnitude", 1.0),
    ("loss_preservation", 1.0),
    ("taylor", 1.0),
    ("biased_loss_preservation", 1.0),
    ("fisher", 1.0),
    ("synflow", 1.0),
    ("random", 1.0),
    ("gradient_norm_increase", 1.0),
    ("gradient_norm_increase", 200.0),
    ("gradient_norm_preservation", 1.0),
    ("gradient_norm_preservation", 200.0),
)
"""Measures, and the temperature of the loss they are taken of."""

TRAINED = (
    "magnitude",
    "loss_preservation",
    "biased_loss_preservation",
    "random",
    "gradient_norm_increase T=200",
    "gradient_norm_preservation T=1",
)
"""Those that are trained on after pruning: the paper's, with the temperatures of its code, and random."""


@dataclass(frozen=True)
class Setting:
    """A net, its data, how it is trained, and what is measured on it."""

    model: str
    width: float
    data: str
    size: int
    subset: int | None
    lr: float
    batch: int
    snapshots: tuple[int, ...]  # epochs of training before pruning
    samples: int  # images that scores, and what they predict, are taken over
    sparsities: tuple[float, ...]
    starts: tuple[int, ...]  # snapshots that convergence is measured from
    epochs: int  # and for how long
    goal: float  # at which sparsity


SETTINGS = {
    "digits": Setting("resnet20", 0.5, "digits", 8, None, 0.05, 64, (0, 1, 5, 20), 200, (0.1, 0.5), (1, 5), 6, 0.75),
    "digits-vgg": Setting(
        "vgg13", 0.125, "digits", 8, None, 0.05, 64, (0, 1, 5, 20), 200, (0.1, 0.5, 0.75), (1, 5), 6, 0.75
    ),
    "cifar10": Setting("vgg13", 0.125, "folder", 32, 3000, 0.05, 64, (0, 1, 5, 20), 200, (0.1, 0.5), (1, 5), 4, 0.75),
    "cifar10-16": Setting(
        "vgg13", 0.125, "folder", 16, 3000, 0.05, 64, (0, 1, 5, 20), 200, (0.1, 0.5), (1, 5), 4, 0.75
    ),
    **{
        name: Setting(name, width, "folder", 16, 1500, 0.05, 50, (), 200, (), (), 3, 0.75)
        for name, width in (("vgg13", 0.125), ("resnet20", 0.25), ("resnet20-zero", 0.25), ("vit", 1.0))
    },  # at initialisation
}


def train(model: nn.Module, data: Data, setting: Setting, epochs: range, seed: int) -> Iterator[float]:
    """SGD at one rate; the mean loss of each epoch as it ends."""
    total, seen = 0.0, 0
    for loss, count in steps(model, data, setting, epochs, seed):
        total, seen = total + loss * count, seen + count
        if seen == len(data.train):
            yield total / seen
            total, seen = 0.0, 0


def steps(model: nn.Module, data: Data, setting: Setting, epochs: range, seed: int) -> Iterator[tuple[float, int]]:
    """The same step by step: the loss of each minibatch, and its size."""
    optimizer = torch.optim.SGD(model.parameters(), setting.lr, momentum=0.9, weight_decay=1e-4)
    if fp.masks(model):
        fp.keep_zeros(model, optimizer)
    for epoch in epochs:
        model.train()
        for images, labels in data.epoch(setting.batch, seed * 1_000_003 + epoch):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            yield loss.item(), len(labels)


def snapshots(data: Data, setting: Setting, seed: int, wanted: tuple[int, ...] = ()) -> dict[int, nn.Module]:
    """One net as it is after so many epochs."""
    wanted = wanted or setting.snapshots
    torch.manual_seed(seed)
    model = models.build(setting.model, data.classes, setting.width)
    found = {0: settled(model, data)}
    for epoch, _ in enumerate(train(model, data, setting, range(max(wanted)), seed), 1):
        if epoch in wanted:
            found[epoch] = settled(model, data)
    return found


def settled(model: nn.Module, data: Data) -> nn.Module:
    """A copy whose batch norm has the statistics of the training images."""
    model = copy.deepcopy(model)
    models.settle(model, (images for images, _ in data.train.batches(250)))
    return model


def scored(data: Data, setting: Setting, seed: int) -> tuple[list[Batch], Batch]:
    """The images that scores are taken over, in batches and as one."""
    batches = data.scoring(setting.samples, 50, seed)
    return batches, (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))


def scores_of(model: nn.Module, batches: list[Batch], seed: int, granularity: str) -> dict[str, fp.Scores]:
    """Every measure of METHODS by name and temperature, from one flow a temperature."""
    found = {}
    for temperature in TEMPERATURES:
        names = [name for name, own in METHODS if own == temperature]
        several = fp.scores(
            model, names, batches, granularity=granularity, parameters=models.prunable(model), temperature=temperature,
            generator=torch.Generator().manual_seed(seed), progress=False,
        )  # fmt: skip
        found |= {label(name, temperature): scores for name, scores in several.items()}
    return found


def label(name: str, temperature: float) -> str:
    return f"{name} T={temperature:g}" if name.startswith("gradient_norm") else name


def pruned(model: nn.Module, scores: fp.Scores, sparsity: float, normalize: str | None = None) -> nn.Module:
    """A copy without the lowest units, ranked as the paper ranks them; a filter's batch norm goes with it."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fp.global_prune(
            model,
            sparsity=sparsity,
            scores=scores,
            granularity=scores.granularity,
            parameters=_owners(model, scores),
            min_keep=1,
            normalize=normalize,
        )
    if scores.granularity == "filter":
        mask_followers(model)
    return model


def _owners(model: nn.Module, scores: fp.Scores) -> list[models.Pair]:
    return [(model.get_submodule(name.rpartition(".")[0]), "weight") for name in scores]


def point(model: nn.Module, batch: Batch, held_out: Batch) -> Row:
    """Where a model stands in its flow: the loss, ‖g‖², the first two derivatives of ‖θ‖².

    And the loss of images not seen.
    """
    at = fp.flow(model, batch, needs=("g", "Hg"), progress=False)
    g = dot(at.g, at.g)
    with torch.no_grad():
        unseen = functional.cross_entropy(model.eval()(held_out[0]), held_out[1]).item()
    return {
        "loss": at.loss, "held_out": unseen, "gradient_norm": g, "theta_norm": dot(at.theta, at.theta),
        "rate": -2 * dot(at.theta, at.g), "acceleration": 2 * (g + dot(at.theta, at.Hg)),
    }  # fmt: skip


def dot(one: dict[str, Tensor] | None, other: dict[str, Tensor] | None) -> float:
    assert one is not None
    assert other is not None
    return sum((one[name] * other[name]).sum(dtype=torch.float64).item() for name in one)


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch]) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    logits, labels = torch.cat([model(x) for x, _ in batches]), torch.cat([y for _, y in batches])
    return functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()
