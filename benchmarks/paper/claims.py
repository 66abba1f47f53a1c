"""The paper's claims as experiments, at sizes that a processor finishes; ``docs/results/paper.md`` says what came out.

    python -m benchmarks.paper.claims expansions --setting digits --out FILE.json
    python -m benchmarks.paper.claims trajectories --setting cifar10-16 --data DIR --out FILE.json

Every part that is done is in the file, and a command that is given again goes on with the parts that are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import torch_flowprune as fp
from benchmarks.common.measure import environment
from benchmarks.paper import experiment
from benchmarks.paper.data import Batch, Data, load
from benchmarks.paper.experiment import (
    SETTINGS,
    Part,
    Row,
    Setting,
    dot,
    evaluate,
    point,
    pruned,
    scores_of,
    settled,
    snapshots,
    train,
)
from benchmarks.paper.initialisation import initialisation
from benchmarks.paper.trajectories import trajectories
from torch_flowprune.analysis.rank_correlation import laid_out, spearman

# ------------------------------------------------------------------------------------------------- the experiments


def expansions(data: Data, setting: Setting, seed: int) -> Iterator[Part]:
    """What pruning does to the loss, ‖g‖² and the derivatives of ‖θ‖², predicted and actual (ii, iii; O2 to O5)."""
    batches, whole = experiment.scored(data, setting, seed)
    held_out = data.test.take(
        torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))[: 2 * setting.samples]
    )
    unseen = held_out.batches(len(held_out))[0]
    for epoch, model in snapshots(data, setting, seed).items():
        for granularity, sparsities in {"filter": setting.sparsities, "weight": (0.9,)}.items():
            scores = partial(scores_of, model, batches, seed, granularity)
            yield (
                f"{granularity}/{epoch}",
                partial(_cuts, model, scores, sparsities, min(setting.sparsities), whole, unseen),
            )


def _cuts(
    model: nn.Module,
    scores_of_all: Callable[[], dict[str, fp.Scores]],
    sparsities: tuple[float, ...],
    curved: float,
    whole: Batch,
    unseen: Batch,
) -> list[Row]:
    before, at, rows = point(model, whole, unseen), fp.flow(model, whole, needs=("g", "Hg"), progress=False), []
    for name, scores in scores_of_all().items():
        for sparsity in sparsities:
            cut = pruned(model, scores, sparsity)
            masks = fp.masks(cut)
            gone = {key: torch.where(mask, 0, at.theta[key]) for key, mask in masks.items()}
            row = {
                "method": name,
                "sparsity": sparsity,
                "granularity": scores.granularity,
                "before": before,
                "after": point(cut, whole, unseen),
                "predicted_loss": -dot(gone, at.g),
                "predicted_gradient_norm": -2 * dot(gone, at.Hg),
                "removed": dot(gone, gone),
            }
            if sparsity == curved:
                row["curvature"] = fp.predict(model, masks, whole, progress=False).curvature
            rows.append(row)
    return rows


def norms(data: Data, setting: Setting, seed: int) -> Iterator[Part]:
    """‖g‖² of the pruned model as ``fp.predict`` says it, and as it is, at the smallest cut of filters."""
    batches, whole = experiment.scored(data, setting, seed)
    for epoch, model in snapshots(data, setting, seed).items():
        yield str(epoch), partial(_norms, model, batches, whole, min(setting.sparsities), seed)


def _norms(model: nn.Module, batches: list[Batch], whole: Batch, sparsity: float, seed: int) -> list[Row]:
    rows = []
    for name, scores in scores_of(model, batches, seed, "filter").items():
        cut = pruned(model, scores, sparsity)
        said = fp.predict(model, fp.masks(cut), whole, progress=False)
        after = fp.flow(cut, whole, needs=("g",), progress=False)
        row = {
            "method": name, "before": said.gradient_norm, "first_order": said.gradient_norm + said.gradient_norm_change,
            "predicted": said.pruned_gradient_norm, "error": said.gradient_norm_error, "after": dot(after.g, after.g),
        }  # fmt: skip
        rows.append(row)
    return rows


def stability(data: Data, setting: Setting, seed: int) -> Iterator[Part]:
    """How alike the rankings of two disjoint samples are, and those of two measures.

    And what share of scores is exactly zero.
    """
    for epoch, model in snapshots(data, setting, seed).items():
        yield str(epoch), partial(_stable, model, data, seed)


def _stable(model: nn.Module, data: Data, seed: int) -> list[Row]:
    rows = []
    for samples in (50, 400):
        drawn = data.scoring(2 * samples, 50, seed)
        halves = [scores_of(model, drawn[i::2], seed, "filter") for i in (0, 1)]
        laid = [
            {name: laid_out(scores.values(), sum(map(torch.numel, scores.values()))) for name, scores in half.items()}
            for half in halves
        ]
        rows += [
            {
                "method": name,
                "samples": samples,
                "spearman": spearman(laid[0][name], laid[1][name]),
                "overlap": _overlap(laid[0][name], laid[1][name]),
                "zero": (laid[0][name] == 0).double().mean().item(),
                "others": {other: spearman(laid[0][name], laid[0][other]) for other in laid[0]}
                if samples == 400
                else None,
            }
            for name in laid[0]
        ]
    return rows


def _overlap(one: Tensor, other: Tensor) -> float:
    """Which share of the half that one sample would prune the other would prune, too; by chance 0.5."""
    k = len(one) // 2
    return len(set(one.argsort(stable=True)[:k].tolist()) & set(other.argsort(stable=True)[:k].tolist())) / k


def convergence(data: Data, setting: Setting, seed: int) -> Iterator[Part]:
    """Equal amounts pruned at once by each measure, then trained alike: how fast the loss falls (claim i, O1, O5)."""
    batches, _ = experiment.scored(data, setting, seed)
    for epoch, model in snapshots(data, setting, seed, setting.starts).items():
        if epoch in setting.starts:
            scores = scores_of(model, batches, seed, "filter")
            cuts = {name: pruned(model, scores[name], setting.goal) for name in experiment.TRAINED}
            cuts["magnitude, by mean"] = pruned(model, scores["magnitude"], setting.goal, normalize="mean")
            for name, cut in cuts.items():
                yield f"{epoch}/{name}", partial(_converges, cut, name, data, setting, seed, epoch)


def _converges(cut: nn.Module, name: str, data: Data, setting: Setting, seed: int, epoch: int) -> list[Row]:
    """Evaluated with batch norm's statistics taken anew, and with the running averages that training leaves behind."""
    trained: list[float] = []
    parts = {"validation": data.validation.batches(1000), "test": data.test.batches(1000)}
    found: Row = {"validation": [evaluate(settled(cut, data), parts["validation"])], "validation_lagging": []}
    for loss in train(cut, data, setting, range(epoch, epoch + setting.epochs), seed):
        trained.append(loss)
        found["validation"].append(evaluate(settled(cut, data), parts["validation"]))
        found["validation_lagging"].append(evaluate(cut, parts["validation"]))
    found |= {"test": evaluate(settled(cut, data), parts["test"]), "test_lagging": evaluate(cut, parts["test"])}
    return [{"method": name, "sparsity": setting.goal, "train": trained, **found}]


EXPERIMENTS: dict[str, Callable[[Data, Setting, int], Iterator[Part]]] = {
    "expansions": expansions,
    "norms": norms,
    "stability": stability,
    "convergence": convergence,
    "trajectories": trajectories,
    "initialisation": initialisation,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.claims", description="The paper's claims as experiments."
    )
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
    wanted = {"experiment": options.experiment, "name": options.setting, "setting": asdict(setting)}
    wanted = json.loads(json.dumps({**wanted, "data": data.digest()}))
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {**wanted}
    if other := [key for key, value in wanted.items() if found.get(key) != value]:
        parser.error(f"{options.out} holds rows of another {', '.join(other)}: give another --out, or delete it")
    found["environment"] = {**environment(), "threads": options.threads}
    runs = found.setdefault("runs", [])  # each part is of one of them
    runs.append({"command": " ".join(sys.argv[1:] if arguments is None else arguments), **found["environment"]})
    parts, made_by = found.setdefault("parts", {}), found.setdefault("run_of_part", {})
    for seed in tqdm(options.seeds, desc=f"{options.experiment} {options.setting}", unit="seed"):
        if f"{seed}/done" in parts:
            continue
        for name, rows in EXPERIMENTS[options.experiment](data, setting, seed):
            if f"{seed}/{name}" not in parts:
                parts[f"{seed}/{name}"] = rows()
                made_by[f"{seed}/{name}"] = len(runs) - 1
                _write(options.out, found)
        parts[f"{seed}/done"] = []
        _write(options.out, found)


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
