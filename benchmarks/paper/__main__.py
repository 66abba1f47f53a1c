"""One run of the paper's protocol.

    python -m benchmarks.paper --model resnet56 --method gradient_norm_preservation --sparsity 0.6 --rounds 5 --data DIR
    --epochs 160 --seed 0 python -m benchmarks.paper --preset smoke

Interrupted, the same command goes on where it stopped, with the same result.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

import torch_flowprune as fp
from benchmarks.paper import models
from benchmarks.paper.data import load
from benchmarks.paper.plot import plot
from benchmarks.paper.protocol import NONE, Config, Run
from torch_flowprune.scoring import measure_lookup

RUNS = Path("build/paper")
_SMOKE = {
    "model": "resnet20",
    "width": 0.5,
    "method": "gradient_norm_preservation",
    "data": "digits",
    "score_samples": 256,
}
_SHORT = {"epochs": 12, "batch": 32, "lr": 0.05, "lr_prune": 0.05, "temperature": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "smoke": {**_SMOKE, **_SHORT},
}


def main(arguments: list[str] | None = None) -> int:
    torch.set_flush_denormal(True)
    options = _options(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(options.threads)
    try:
        config = _config(options)
        data = load(
            options.data,
            root=options.root,
            download=options.download,
            size=options.size,
            validation=options.validation,
            subset=options.subset,
            progress=not options.quiet,
        )
        folder = options.out or RUNS / _name(config, data.name)
        found = Run(config, data, folder, device=options.device, progress=not options.quiet).run(options.stop_after)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if found is None:
        print(f"stopped after epoch {options.stop_after}; the same command without --stop-after goes on")
        return 0
    plot(found, folder / "plot.png")
    print(_summary(found, folder))
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    defaults = asdict(Config())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="The paper's protocol: rounds of one epoch and a prune, then the rest.",
    )
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="smoke: a small net on digits, under two minutes on two cores",
    )
    add("--model", choices=models.MODELS)
    add("--method", help=f"a measure ({', '.join(fp.MEASURES)}), or {NONE} to train the model unpruned")
    add("--sparsity", type=float, help="the share of all filters that is gone in the end")
    add("--rounds", type=int, help="of one epoch and one prune each; the paper has 1, 5, 25")
    add(
        "--thresholds",
        type=float,
        nargs="+",
        metavar="S",
        help="the sparsity after each round, instead of --sparsity, --rounds and --schedule",
    )
    add("--schedule", choices=fp.SCHEDULES)
    add(
        "--min-keep",
        type=float,
        help="filters every layer keeps: a number, or a fraction below 1 (the paper's code: 0.05 for VGG and "
        "MobileNet)",
    )
    add("--epochs", type=int, help="all of them, warm-up and rounds among them")
    add("--warmup", type=int, help="epochs before the first round")
    add("--seed", type=int)
    add("--width", type=float, help="of every layer, 1 being the paper's")
    add("--batch", type=int)
    add("--lr", type=float)
    add("--lr-prune", type=float, help="learning rate of warm-up and rounds")
    add("--momentum", type=float)
    add("--weight-decay", type=float)
    add("--temperature", type=float, help="of the loss in training")
    add(
        "--score-temperature",
        type=float,
        help="of the loss scored: 200 for grasp, 1 for gradient_norm_preservation, else --temperature",
    )
    add("--score-samples", type=int)
    add("--score-batch", type=int)
    add(
        "--track",
        action="store_true",
        default=None,
        help="score by an exponential average over the last minibatches of the epoch, any measure",
    )
    add("--track-batches", type=int)
    add("--alpha", type=float, help="the newest minibatch's weight in that average")
    add(
        "--fresh-momentum",
        action="store_true",
        default=None,
        help="forget the momentum at every prune (the paper's code's default)",
    )
    add(
        "--settle",
        action="store_true",
        default=None,
        help="take batch norm's statistics anew before each prune: for epochs of few steps",
    )
    add("--pretrained", help="a state dict to start from: pruned.pt of a run with --method none, for instance")
    add("--data", help="digits, cifar10, cifar100, or a folder with train/ and test/")
    add("--root", default="data", help="where torchvision keeps CIFAR")
    add("--download", action="store_true", help="let torchvision download CIFAR")
    add("--size", type=int, help="height and width of the images; 16 for digits, else 32")
    add("--subset", type=int, help="so many training and test images at most")
    add("--validation", type=float, default=0.1, help="share of the training images to choose by")
    add("--out", type=Path, help=f"folder of this run; {RUNS}/... if left out")
    add("--stop-after", type=int, metavar="EPOCH", help="stop there, to go on another time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    for name, value in {**defaults, "data": "digits", **PRESETS[options.preset]}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _config(options: argparse.Namespace) -> Config:
    chosen = {field.name: getattr(options, field.name) for field in fields(Config)}
    if options.method != NONE:
        measure_lookup.resolve(options.method)
    if options.thresholds:
        chosen |= {
            "thresholds": tuple(options.thresholds),
            "rounds": len(options.thresholds),
            "sparsity": options.thresholds[-1],
        }
    if float(options.min_keep).is_integer() and options.min_keep >= 1:
        chosen["min_keep"] = int(options.min_keep)
    return Config(**chosen)


def _name(config: Config, data: str) -> str:
    """A folder for this run: what one varies, where it is not the default."""
    plain, given = asdict(Config()), asdict(config)
    shown = [
        f"{key}={given[key]}"
        for key in given
        if given[key] != plain[key] and key not in ("model", "method", "sparsity", "rounds", "seed", "pretrained")
    ]
    kind = config.method if config.method == NONE else f"{config.method}-{config.sparsity:g}-{config.rounds}"
    return "-".join([config.model, data, kind, *shown, f"seed{config.seed}"]).replace(" ", "")


def _summary(found: dict[str, Any], folder: Path) -> str:
    test, size = found["test"], found["size"]
    lines = [
        (
            f"test accuracy {test['accuracy']:.2%}, with the model that the validation images chose, of epoch "
            f"{test['chosen_epoch']}"
        )
    ]
    for what, name in (("parameters", "parameters"), ("macs", "multiply-adds")):
        dense, pruned = size["dense"][what], size["pruned"][what]
        lines.append(f"{name}: {pruned:,} of {dense:,} ({pruned / dense:.1%})")
    for one in found["rounds"]:
        predicted = one["predicted_loss_change"]
        foreseen = "" if predicted is None else f", predicted {predicted:+.3g}"
        lines.append(
            f"epoch {one['epoch']}: {one['sparsity']:.1%} of filters gone, loss {one['loss_before']:.3g} -> "
            f"{one['loss_after']:.3g}{foreseen}"
        )
    return "\n".join([*lines, f"{folder}/result.json, plot.png, pruned.pt"])


if __name__ == "__main__":
    sys.exit(main())
