"""Networks at their level, to prune: trained on all of CIFAR-10 with a fast recipe, kept as safetensors.

    python -m benchmarks.accuracy.baselines --data DIR --work DIR [--nets resnet20] [--seeds 0 1 2] [--epochs 30]

DIR of ``--data`` holds ``cifar10_jpeg.npz``; in that of ``--work`` a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.accuracy.images import Images, load
from benchmarks.accuracy.nets import NETS
from benchmarks.accuracy.rows import commit, environment, write_lines
from benchmarks.accuracy.training import RECIPES, Recipe, evaluate, train
from benchmarks.common.record import RESULTS, begun

COMMAND = "python -m benchmarks.accuracy.baselines"
FOLDER = RESULTS / "accuracy" / "baselines"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Train networks on CIFAR-10, to prune them afterwards.")
    parser.add_argument("--data", type=Path, required=True, help="holds cifar10_jpeg.npz")
    parser.add_argument("--work", type=Path, required=True, help="where a run that was stopped goes on")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["resnet20"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    images = {split: load(options.data, options.work, split) for split in ("train", "test")}
    recorded = begun(COMMAND, None, **environment())
    for name in options.nets:
        for seed in options.seeds:
            write_lines({**recorded, **baseline(name, seed, images, options)}, options.out / f"{name}-{seed}.json")


def baseline(name: str, seed: int, images: dict[str, Images], options: argparse.Namespace) -> dict[str, Any]:
    """One network trained; its weights go beside its record."""
    recipe = lengthened(RECIPES[name], options.epochs)
    torch.manual_seed(seed)
    net = NETS[name]().to(memory_format=torch.channels_last)
    known = digest(images["train"])
    kept = options.work / f"{name}-{seed}-{options.epochs}-{known}.pt"  # other data, or another length: another run
    net = train(net, images["train"], recipe, kept, seed)
    weights = {key: value.contiguous() for key, value in net.state_dict().items()}
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.out / f"{name}-{seed}.safetensors")
    losses = {split: evaluate(net, each, recipe) for split, each in images.items()}
    return {
        "commit": commit(),
        "net": name,
        "seed": seed,
        "recipe": asdict(recipe),
        "data": {"digest": known, **{split: len(each) for split, each in images.items()}},
        "epoch reported": "the last",
        **{
            f"{split} {kind}": value
            for split, pair in losses.items()
            for kind, value in zip(("loss", "accuracy"), pair, strict=True)
        },
    }


def lengthened(recipe: Recipe, epochs: int) -> Recipe:
    """The same cycle over other epochs: it rises for as large a part of them."""
    return replace(recipe, epochs=epochs, rising=recipe.rising * epochs / recipe.epochs)


def digest(images: Images) -> str:
    """What names the data: their pixels and labels, in their order."""
    labels, pixels = images.labels.numpy(), images.pixels.contiguous(memory_format=torch.channels_last)
    return hashlib.sha256(labels.tobytes() + pixels.permute(0, 2, 3, 1).numpy().tobytes()).hexdigest()[:12]


if __name__ == "__main__":
    main()
