"""The protocol by every measure in 1, 5 and 25 rounds: many runs of one network, what is plotted of them in one file.

    python -m benchmarks.paper.sweep --plan vgg13 --data DIR --out FILE.json

A run that is in the file is not run again, and one that was interrupted goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common.measure import environment
from benchmarks.paper.data import Data, load
from benchmarks.paper.protocol import NONE, Config, Run

PAPER = (
    "magnitude",
    "loss_preservation",
    "biased_loss_preservation",
    "gradient_norm_increase",
    "gradient_norm_preservation",
)
BESIDE = ("random", "taylor", "fisher", "synflow")
KIN = ("l1", "distance_biased_loss_preservation", "fisher_sample")
"""Near relations of magnitude, biased loss preservation and Fisher."""
_BROKEN = ("are not all finite", "scores would mean nothing")
"""What the library says of scores and of losses that are no numbers."""
CURVES = ("loss", "validation_loss", "validation_accuracy", "theta_norm", "gradient_norm")


@dataclass(frozen=True)
class Plan:
    """A configuration, and what is varied of it."""

    config: Config
    size: int
    subset: int
    methods: tuple[str, ...] = (*PAPER, *BESIDE)
    rounds: tuple[int, ...] = (1, 5, 25)
    unpruned: bool = True

    def runs(self, seed: int) -> Iterator[Config]:
        """The unpruned one first."""
        if self.unpruned:
            yield replace(self.config, method=NONE, rounds=1, seed=seed)
        for method in self.methods:
            for rounds in self.rounds:
                yield replace(self.config, method=method, rounds=rounds, seed=seed)


_NARROW = Config(sparsity=0.75, epochs=50, batch=64, score_samples=200, score_batch=100)
"""Learning rate 0.1, momentum 0.9, weight decay 1e-4 and T = 5 as in the paper's code; a third of its epochs."""

_FULL = Config(sparsity=0.6, rounds=1, epochs=4, batch=20, lr=0.05, lr_prune=0.05, score_samples=100, score_batch=50)
"""180 steps, from start to end: that it runs, and no accuracy to compare."""
_FEW: dict[str, Any] = {"methods": (*PAPER[:2], *PAPER[3:], "random")}
_ONCE: dict[str, Any] = {"methods": ("gradient_norm_preservation",), "rounds": (1,), "unpruned": False}

PLANS = {
    "vgg13": Plan(replace(_NARROW, model="vgg13", width=0.125, min_keep=0.05), 16, 1500, (*PAPER, *BESIDE, *KIN)),
    "mobilenet": Plan(replace(_NARROW, model="mobilenet", width=0.125, min_keep=0.05, settle=True), 16, 1500, **_FEW),
    "resnet56": Plan(replace(_NARROW, model="resnet56", width=0.25, settle=True), 16, 1500, **_FEW),
    "vgg13-full": Plan(replace(_FULL, model="vgg13", min_keep=0.05), 32, 1000, **_ONCE),
    "mobilenet-full": Plan(replace(_FULL, model="mobilenet", min_keep=0.05), 32, 1000, **_ONCE),
    "resnet56-full": Plan(replace(_FULL, model="resnet56"), 32, 1000, **_ONCE),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.sweep", description="The protocol by every measure and number of rounds."
    )
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--data", required=True, help="a folder with train/ and test/, or digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="of the plan's, these alone; the others another time")
    parser.add_argument("--rounds", type=int, nargs="+", help="likewise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/paper/sweep"), help="of the runs")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)
    torch.set_num_threads(options.threads)
    plan = PLANS[options.plan]
    data = load(options.data, size=plan.size, subset=plan.subset)
    found: dict[str, Any] = (
        json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"parts": {}}
    )
    found |= {"experiment": "protocol", "name": options.plan, "setting": described(plan, data)}
    found |= {"environment": {**environment(), "threads": options.threads}}
    wanted = {
        f"{config.seed}/{config.method}/{config.rounds}": config for seed in options.seeds for config in plan.runs(seed)
    }
    methods, rounds = {NONE, *(options.methods or plan.methods)}, {*(options.rounds or plan.rounds)}
    wanted = {key: config for key, config in wanted.items() if config.method in methods and config.rounds in rounds}
    for key, config in tqdm(wanted.items(), desc=options.plan, unit="run"):
        if key not in found["parts"]:
            found["parts"][key] = [_outcome(config, data, options.folder / options.plan / key)]
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")


def _outcome(config: Config, data: Data, folder: Path) -> dict[str, Any]:
    """The run in short; or, of one that broke down until its loss or scores were no numbers, that it did."""
    try:
        return short(Run(config, data, folder, progress=False).run())
    except ValueError as error:
        if not any(sign in str(error) for sign in _BROKEN):
            raise
        return {"method": config.method, "rounds": config.rounds, "seed": config.seed, "failed": str(error)}


def described(plan: Plan, data: Data) -> dict[str, Any]:
    """What was run, for the table's title."""
    kept = {
        key: value for key, value in asdict(plan.config).items() if key not in ("method", "rounds", "seed", "sparsity")
    }
    return {
        **kept,
        "data": data.name,
        "size": plan.size,
        "subset": plan.subset,
        "goal": plan.config.sparsity,
        "train": len(data.train),
    }


def short(result: dict[str, Any] | None) -> dict[str, Any]:
    """One run without its layers: what the tables and figures read, to four digits."""
    assert result is not None
    config, history = result["config"], result["history"]
    pruned = config["method"] != NONE
    return {
        "method": config["method"], "rounds": config["rounds"] if pruned else 0, "seed": config["seed"],
        "test": result["test"], "size": result["size"],
        "curves": {key: [float(f"{entry[key]:.4g}") for entry in history] for key in CURVES},
        "train_loss": [float(f"{entry['train_loss']:.4g}") for entry in history[1:]],
        "predicted": [one["predicted_loss_change"] for one in result["rounds"]],
        "actual": [one["loss_after"] - one["loss_before"] for one in result["rounds"]],
        "left": [layer["units"] - layer["pruned"] for layer in result["rounds"][-1]["layers"]] if pruned else [],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
