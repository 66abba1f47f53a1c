"""The paper's claims as experiments, at sizes that a processor finishes; ``docs/paper.md`` says what came out.

    python -m benchmarks.paper.claims expansions --setting digits --out FILE.json
    python -m benchmarks.paper.claims convergence --setting cifar10 --data DIR --out FILE.json

Every part that is done is in the file, and a command that is given again goes on with the parts that are missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import torch_flowprune as fp
from benchmarks.measure import environment
from benchmarks.paper import models
from benchmarks.paper.data import Batch, Data, load
from benchmarks.paper.protocol import mask_followers
from torch_flowprune.ranking import laid_out, spearman

Row = dict[str, Any]
TEMPERATURES = (1.0, 200.0)
METHODS = (
    ("magnitude", 1.0), ("loss_preservation", 1.0), ("taylor", 1.0), ("biased_loss_preservation", 1.0), ("fisher", 1.0), ("synflow", 1.0),
    ("random", 1.0), ("gradient_norm_increase", 1.0), ("gradient_norm_increase", 200.0),
    ("gradient_norm_preservation", 1.0), ("gradient_norm_preservation", 200.0),
)  # fmt: skip
"""Measures, and the temperature of the loss they are taken of."""

TRAINED = (
    "magnitude", "loss_preservation", "biased_loss_preservation", "random", "gradient_norm_increase T=200", "gradient_norm_preservation T=1",
)  # fmt: skip
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
    "digits-vgg": Setting("vgg13", 0.125, "digits", 8, None, 0.05, 64, (0, 1, 5, 20), 200, (0.1, 0.5, 0.75), (1, 5), 6, 0.75),
    "cifar10": Setting("vgg13", 0.125, "folder", 32, 3000, 0.05, 64, (0, 1, 5), 200, (0.1, 0.5), (1,), 4, 0.75),
}


def train(model: nn.Module, data: Data, setting: Setting, epochs: range, seed: int) -> Iterator[float]:
    """SGD at one rate; the mean loss of each epoch as it ends."""
    optimizer = torch.optim.SGD(model.parameters(), setting.lr, momentum=0.9, weight_decay=1e-4)
    if fp.masks(model):
        fp.keep_zeros(model, optimizer)
    for epoch in epochs:
        model.train()
        total = 0.0
        for images, labels in data.epoch(setting.batch, seed * 1_000_003 + epoch):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        yield total / len(data.train)


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


@torch.no_grad()
def settled(model: nn.Module, data: Data) -> nn.Module:
    """A copy whose batch norm has the statistics of the training images.

    Running averages lag behind weights that move fast: after one epoch of twenty steps they gave a loss in the fifties.
    """
    model = copy.deepcopy(model).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    for images, _ in data.train.batches(250):
        model(images)
    for norm in norms:
        norm.momentum = 0.1
    return model


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


def pruned(model: nn.Module, scores: fp.Scores, sparsity: float) -> nn.Module:
    """A copy without the lowest units; a filter's batch norm goes with it."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fp.global_prune(model, sparsity=sparsity, scores=scores, granularity=scores.granularity, parameters=_owners(model, scores), min_keep=1)
    if scores.granularity == "filter":
        mask_followers(model)
    return model


def _owners(model: nn.Module, scores: fp.Scores) -> list[models.Pair]:
    return [(model.get_submodule(name.rpartition(".")[0]), "weight") for name in scores]


def point(model: nn.Module, batch: Batch, held_out: Batch) -> Row:
    """Where a model stands in its flow: the loss, ‖g‖², the first two derivatives of ‖θ‖²; and the loss of images not seen."""
    at = fp.flow(model, batch, needs=("g", "Hg"), progress=False)
    g = _dot(at.g, at.g)
    with torch.no_grad():
        unseen = functional.cross_entropy(model.eval()(held_out[0]), held_out[1]).item()
    return {
        "loss": at.loss, "held_out": unseen, "gradient_norm": g, "theta_norm": _dot(at.theta, at.theta),
        "rate": -2 * _dot(at.theta, at.g), "acceleration": 2 * (g + _dot(at.theta, at.Hg)),
    }  # fmt: skip


def _dot(one: dict[str, Tensor] | None, other: dict[str, Tensor] | None) -> float:
    assert one is not None
    assert other is not None
    return sum((one[name] * other[name]).sum(dtype=torch.float64).item() for name in one)


# ------------------------------------------------------------------------------------------------- the experiments


def expansions(data: Data, setting: Setting, seed: int) -> Iterator[tuple[str, list[Row]]]:
    """What pruning does to the loss, to ‖g‖² and to the derivatives of ‖θ‖², predicted and actual (claims ii and iii, O2 to O5)."""
    batches = data.scoring(setting.samples, 50, seed)
    whole = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    held_out = data.test.take(torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))[: 2 * setting.samples])
    unseen = held_out.batches(len(held_out))[0]
    for epoch, model in snapshots(data, setting, seed).items():
        before, at = point(model, whole, unseen), fp.flow(model, whole, needs=("g", "Hg"), progress=False)
        for granularity in ("filter", "weight"):
            rows = []
            for name, scores in scores_of(model, batches, seed, granularity).items():
                for sparsity in setting.sparsities if granularity == "filter" else (0.9,):
                    cut = pruned(model, scores, sparsity)
                    masks = fp.masks(cut)
                    gone = {key: torch.where(mask, 0, at.theta[key]) for key, mask in masks.items()}
                    row = {
                        "method": name, "sparsity": sparsity, "granularity": granularity, "before": before, "after": point(cut, whole, unseen),
                        "predicted_loss": -_dot(gone, at.g), "predicted_gradient_norm": -2 * _dot(gone, at.Hg), "removed": _dot(gone, gone),
                    }  # fmt: skip
                    if sparsity == min(setting.sparsities):
                        row["curvature"] = fp.predict(model, masks, whole, progress=False).curvature
                    rows.append(row)
            yield f"{granularity}/{epoch}", rows


def stability(data: Data, setting: Setting, seed: int) -> Iterator[tuple[str, list[Row]]]:
    """How alike the rankings of two disjoint samples are, and those of two measures; and what share of scores is exactly zero."""
    for epoch, model in snapshots(data, setting, seed).items():
        rows = []
        for samples in (50, 400):
            drawn = data.scoring(2 * samples, 50, seed)
            halves = [scores_of(model, drawn[i::2], seed, "filter") for i in (0, 1)]
            laid = [{name: laid_out(scores) for name, scores in half.items()} for half in halves]
            rows += [
                {
                    "method": name, "samples": samples, "spearman": spearman(laid[0][name], laid[1][name]),
                    "overlap": _overlap(laid[0][name], laid[1][name]), "zero": (laid[0][name] == 0).double().mean().item(),
                    "others": {other: spearman(laid[0][name], laid[0][other]) for other in laid[0]} if samples == 400 else None,
                }
                for name in laid[0]
            ]  # fmt: skip
        yield str(epoch), rows


def _overlap(one: Tensor, other: Tensor) -> float:
    """Which share of the half that one sample would prune the other would prune, too; by chance 0.5."""
    k = len(one) // 2
    return len(set(one.argsort(stable=True)[:k].tolist()) & set(other.argsort(stable=True)[:k].tolist())) / k


def convergence(data: Data, setting: Setting, seed: int) -> Iterator[tuple[str, list[Row]]]:
    """Equal amounts pruned at once by each measure, then trained alike: how fast the loss falls (claim i, O1, O5)."""
    batches = data.scoring(setting.samples, 50, seed)
    validation = data.validation.batches(1000)
    found = snapshots(data, setting, seed, setting.starts)
    for epoch in setting.starts:
        model = found[epoch]
        scores = scores_of(model, batches, seed, "filter")
        for name in scores:
            if name not in TRAINED:
                continue
            cut = pruned(model, scores[name], setting.goal)
            losses = [_evaluate(cut, validation)]
            trained = []
            for loss in train(cut, data, setting, range(epoch, epoch + setting.epochs), seed):
                trained.append(loss)
                losses.append(_evaluate(cut, validation))
            test = _evaluate(cut, data.test.batches(1000))
            row = {"method": name, "sparsity": setting.goal, "train": trained, "validation": losses, "test": test}
            yield f"{epoch}/{name}", [row]


@torch.no_grad()
def _evaluate(model: nn.Module, batches: list[Batch]) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    logits, labels = torch.cat([model(x) for x, _ in batches]), torch.cat([y for _, y in batches])
    return functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


EXPERIMENTS: dict[str, Callable[[Data, Setting, int], Iterator[tuple[str, list[Row]]]]] = {
    "expansions": expansions,
    "stability": stability,
    "convergence": convergence,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.claims", description="The paper's claims as experiments.")
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--setting", choices=SETTINGS, default="digits")
    parser.add_argument("--data", help="a folder with train/ and test/, for the settings that are not of digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    torch.set_num_threads(options.threads)
    setting = SETTINGS[options.setting]
    if setting.data != "digits" and not options.data:
        parser.error(f"--setting {options.setting} needs --data, a folder with train/ and test/")
    data = load("digits" if setting.data == "digits" else options.data, size=setting.size, subset=setting.subset)
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found |= {
        "experiment": options.experiment,
        "name": options.setting,
        "setting": asdict(setting),
        "environment": {**environment(), "threads": options.threads},
    }
    parts = found.setdefault("parts", {})
    for seed in tqdm(options.seeds, desc=f"{options.experiment} {options.setting}", unit="seed"):
        if f"{seed}/done" in parts:
            continue
        for name, rows in EXPERIMENTS[options.experiment](data, setting, seed):
            parts[f"{seed}/{name}"] = rows
            _write(options.out, found)
        parts[f"{seed}/done"] = []
        _write(options.out, found)


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
