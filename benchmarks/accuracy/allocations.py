"""Which way of sharing out sparsity between layers leaves the better net, measured on three nets trained on CIFAR-10.

    python -m benchmarks.accuracy.allocations --data DIR --work DIR [--nets resnet20 mobilenet vit]
        [--stages tuned] [--measures magnitude] [--sharings mean lamp equal]
        [--out benchmarks/results/accuracy/allocations.json]

``--data`` holds ``cifar10_jpeg.npz``; ``--work`` keeps checkpoints, scores and rows, so that a run that was stopped
goes on where it was; several runs, one a net, may share it. Each net is trained once by a fast recipe and pruned in one
step: channels and filters, by five measures, with every sharing of ``benchmarks/accuracy/sharing.py``. Loss and
accuracy at once are those of ``--held-out`` test images, after ``--steps`` steps of tuning those of ``--tested``. A
seed draws the training images that scores are taken over, and those that the net is tuned on, in their order;
``magnitude`` reads no images, so at once it has one seed. Filters of the classifier stay: they are the classes.

The images were stored as JPEG files, which is lossy: accuracies may differ a little from those on the original arrays.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from functools import cached_property
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import torch_flowprune as fp
from benchmarks.accuracy.images import Images, load
from benchmarks.accuracy.nets import NETS, classifier
from benchmarks.accuracy.rows import Case, Rows, commit, environment, write_lines
from benchmarks.accuracy.sharing import SHARINGS
from benchmarks.accuracy.training import RECIPES, Recipe, evaluate, train, tune, wait_while

COMMAND = "python -m benchmarks.accuracy.allocations"
OUT = Path("benchmarks/results/accuracy/allocations.json")
MEASURES = ("magnitude", "loss_preservation", "taylor", "gradient_norm_preservation", "fisher")
GRANULARITIES = ("channel", "filter")
SPARSITIES = (0.5, 0.7, 0.3)
STAGES = ("at once", "tuned")
COSTS = ("units", "flops")
SCORE_BATCH = 64
WRITTEN_EVERY = 25


def at_once(seed: int) -> list[tuple[str, Case]]:
    """Every case of one draw of images."""
    measures = [one for one in MEASURES if seed == 0 or one != "magnitude"]
    every = product(GRANULARITIES, SPARSITIES, measures, SHARINGS)
    return [("at once", Case(*one, seed)) for one in every]


def tuned(
    granularity: str, sparsity: float, measures: Sequence[str], seeds: int, cost: str = "units"
) -> list[tuple[str, Case]]:
    every = product(range(seeds), measures, SHARINGS)
    return [("tuned", Case(granularity, sparsity, measure, sharing, seed, cost)) for seed, measure, sharing in every]


def plan(seeds: int) -> list[tuple[str, Case]]:
    """In the order of what one wants to know first: everything at once, half of the channels tuned, then the rest."""
    one, few, some = min(1, seeds), ("magnitude", "taylor"), ("magnitude", "taylor", "loss_preservation")
    steps = [
        *at_once(0),
        *tuned("channel", 0.5, few, one),
        *tuned("channel", 0.5, few, one, "flops"),
        *tuned("channel", 0.5, some, one),
        *tuned("channel", 0.5, some, one, "flops"),
        *tuned("channel", 0.7, few, one),
        *tuned("channel", 0.5, MEASURES, one),
        *tuned("filter", 0.5, few, one),
        *tuned("channel", 0.5, few, seeds, "flops"),
        *tuned("channel", 0.5, some, seeds),
        *(step for seed in range(1, seeds) for step in at_once(seed)),
        *tuned("channel", 0.7, MEASURES, seeds),
        *tuned("channel", 0.5, MEASURES, seeds),
        *tuned("filter", 0.5, MEASURES, seeds),
        *tuned("channel", 0.3, MEASURES, seeds),
        *tuned("filter", 0.7, MEASURES, seeds),
        *tuned("filter", 0.3, MEASURES, seeds),
    ]
    return list(dict.fromkeys(steps))


class Study:
    """One trained net, and what pruning does to it."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.options = name, options
        self.recipe: Recipe = RECIPES[name]
        self.images, self.test = (load(options.data, options.work, split) for split in ("train", "test"))
        self.images = self.images.drawn(options.images, 0)
        self.test = self.test.drawn(max(options.tested, options.held_out), 0)

    @property
    def measures(self) -> Sequence[str]:
        return self.options.measures or MEASURES

    def is_asked(self, stage: str, case: Case) -> bool:
        options = self.options
        asked = (
            (options.stages, stage),
            (options.measures, case.measure),
            (options.sharings, case.sharing),
            (options.costs, case.cost),
        )
        return all(chosen is None or one in chosen for chosen, one in asked)

    def pause(self) -> None:
        wait_while(self.options.pause_file)

    @cached_property
    def net(self) -> nn.Module:
        torch.manual_seed(0)
        net = NETS[self.name]().to(memory_format=torch.channels_last)
        return train(net, self.images, self.recipe, self.options.work / f"{self.name}.pt", 0, self.pause)

    @cached_property
    def identity(self) -> str:
        """A digest of all that changes a number: the trained weights, the images, the settings."""
        digest = hashlib.sha256(json.dumps([settings(self.options), asdict(self.recipe)]).encode())
        for value in (*self.net.state_dict().values(), self.images.labels, self.test.pixels):
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    @property
    def held_out(self) -> Images:
        return self.test.part(slice(self.options.held_out))

    def scores(self, granularity: str, measure: str, seed: int) -> fp.Scores:
        """Computed once for all measures that are asked for, then read back from a file."""
        path = self.options.work / f"{self.name}-{self.identity}-{granularity}-{seed}"
        if missing := [one for one in self.measures if not (path / f"{one}.safetensors").exists()]:
            path.mkdir(exist_ok=True)
            scored = self.images.drawn(self.options.score_images, 100 + seed).batches(SCORE_BATCH)
            exclude = None if granularity == "channel" else classifier(self.net)
            found = fp.scores(
                self.net, missing, scored, loss=cross_entropy, granularity=granularity, exclude=exclude, progress=False
            )
            for name, one in found.items():
                one.save(path / f"{name}.safetensors")
        return fp.Scores.load(path / f"{measure}.safetensors")

    def pruned(self, case: Case) -> tuple[nn.Module, fp.Report]:
        if case.cost == "units" or SHARINGS[case.sharing].scope == "global":
            return self.cut(case, case.sparsity, case.cost)
        share = bisect_left(range(99), True, key=lambda share: self.meets(case, share / 100))
        return self.cut(case, share / 100, "units")

    def meets(self, case: Case, share: float) -> bool:
        """Whether the target in FLOPs is met where every group loses this share of its units."""
        left, dense = attrgetter("left", "dense")(self.cut(case, share, "units")[1])
        return left.flops <= (1 - case.sparsity) * dense.flops

    def cut(self, case: Case, sparsity: float, cost: str) -> tuple[nn.Module, fp.Report]:
        sharing, net = SHARINGS[case.sharing], deepcopy(self.net)
        report = fp.global_prune(
            net,
            scores=sharing.of(self.scores(case.granularity, case.measure, case.seed)),
            sparsity=sparsity,
            cost=cost,
            granularity=case.granularity,
            min_keep=sharing.min_keep,
            scope=sharing.scope,
            normalize=None,
            example_inputs=self.test.pixels[:1] if case.granularity == "channel" else None,
        )
        return net, report

    def prune(self, case: Case, rows: Rows) -> dict[str, Any]:
        net, report = self.pruned(case)
        went = what_went(net, report)
        if (known := rows.same_masks("at once", case, went["masks"])) is not None:
            return known
        loss, accuracy = evaluate(net, self.held_out, self.recipe)
        return {**went, "loss": loss, "accuracy": accuracy}

    def prune_and_tune(self, case: Case, rows: Rows) -> dict[str, Any]:
        net, report = self.pruned(case)
        went = what_went(net, report)
        if (known := rows.same_masks("tuned", case, went["masks"])) is not None:
            return known
        whole = net
        if case.granularity == "channel":
            with suppress(fp.ShrinkError):  # where a layer is empty, no smaller net can be built: its masks stay on
                net = fp.shrink(net, self.test.pixels[:1])
        tune(net, self.images, self.recipe, self.options.steps, case.seed, self.pause)
        loss, accuracy = evaluate(net, self.test, self.recipe)
        return {**went, "loss": loss, "accuracy": accuracy, "masked": net is whole}

    def dense(self) -> dict[str, Any]:
        """The net unpruned: as trained, on both sets of images, and after the same tuning."""
        parts = {"held_out": self.held_out, "tested": self.test}
        found = {part: evaluate(self.net, images, self.recipe) for part, images in parts.items()}
        net = deepcopy(self.net)
        tune(net, self.images, self.recipe, self.options.steps, 0, self.pause)
        return {**found, "tuned": evaluate(net, self.test, self.recipe), "masks": "none"}

    def run(self, rows: Rows) -> None:
        """All that is not known yet: every case at once, then tuned ones."""
        nothing = Case("none", 0.0, "none", "none", 0)
        if ("dense", nothing) not in rows.found:
            rows.add("dense", nothing, self.dense())
        missing = [one for one in plan(self.options.seeds) if one not in rows.found and self.is_asked(*one)]
        for number, (stage, case) in enumerate(missing):
            self.pause()
            rows.add(stage, case, self.prune(case, rows) if stage == "at once" else self.prune_and_tune(case, rows))
            if number % WRITTEN_EVERY == 0:
                write(self.options)


def digest_of(net: nn.Module) -> str:
    """The masks, as a few letters: two prunes that took the same are one."""
    digest = hashlib.sha256()
    for name, mask in sorted(fp.masks(net).items()):
        digest.update(name.encode() + mask.numpy().tobytes())
    return digest.hexdigest()[:12]


def what_went(net: nn.Module, report: fp.Report) -> dict[str, Any]:
    kept = [1 - layer.sparsity for layer in report.layers]
    found = {
        "masks": digest_of(net),
        "gone": report.pruned,
        "units": report.units,
        "emptied": sum(share == 0 for share in kept),
        "under_a_tenth": sum(share < 0.1 for share in kept),
        "least_kept": min(kept),
    }
    if report.left is None or report.dense is None:
        weights = sum(parameter.numel() for parameter in net.parameters())
        zeros = sum(layer.weights_pruned for layer in report.layers)
        return {**found, "parameters": 1 - zeros / weights, "flops": None}
    left, dense = report.left, report.dense
    return {**found, "parameters": left.parameters / dense.parameters, "flops": left.flops / dense.flops}


def settings(options: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(options, name) for name in ("images", "score_images", "held_out", "tested", "steps")}


def write(options: argparse.Namespace) -> None:
    """One file of what all runs in the work folder have found, of these settings."""
    found = {"command": f"{COMMAND} --data DIR --work DIR", "commit": commit(), "environment": environment()}
    found |= {"settings": {**settings(options), "seeds_asked": options.seeds, "score_batch": SCORE_BATCH}, "nets": {}}
    for name in NETS:
        note = options.work / f"{name}.rows.json"
        if note.exists():
            by_stage = Rows(Path(json.loads(note.read_text()))).by_stage()
            dense, once, after = (by_stage.get(stage, []) for stage in ("dense", "at once", "tuned"))
            recipe = asdict(RECIPES[name])
            found["nets"][name] = {"recipe": recipe, "dense": dense, "at once": once, "tuned": after}
    write_lines(found, options.out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Measure ways of sharing out sparsity.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of cifar10_jpeg.npz")
    parser.add_argument("--work", type=Path, required=True, help="for checkpoints and rows")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="at once, or after tuning (default: both)")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, help="(default: all)")
    parser.add_argument("--sharings", nargs="+", choices=SHARINGS, help="(default: all)")
    parser.add_argument("--costs", nargs="+", choices=COSTS, help="what the sparsity is a fraction of (default: both)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument("--score-images", type=int, default=512, help="of the training images, for scores")
    parser.add_argument("--held-out", type=int, default=1_000, help="test images for loss and accuracy at once")
    parser.add_argument("--tested", type=int, default=3_000, help="test images for the accuracy after tuning")
    parser.add_argument("--steps", type=int, default=100, help="of tuning")
    parser.add_argument("--pause-file", type=Path, help="wait while this file exists")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.nets:
        study = Study(name, options)
        rows = options.work / f"{name}-{study.identity}.jsonl"
        (options.work / f"{name}.rows.json").write_text(json.dumps(str(rows)))
        study.run(Rows(rows))
    write(options)


if __name__ == "__main__":
    main(sys.argv[1:])
