"""Options that several commands share, each under a heading."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch_flowprune as fp
from torch_flowprune.cli.argument_types import (
    as_amount,
    as_count,
    as_fraction,
    as_model,
    as_number,
    as_seed,
    as_workers,
)
from torch_flowprune.selection import COSTS


def add_model(command: argparse.ArgumentParser) -> None:
    """Which model, with which weights, where."""
    command.add_argument(
        "name",
        metavar="NAME",
        type=as_model,
        help="a timm model: resnet18, vit_tiny_patch16_224.augreg_in21k_ft_in1k, ...; OWNER/NAME of timm's models on "
        "the Hugging Face hub; or a folder with one",
    )
    group = command.add_argument_group("the model")
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights to load instead of timm's pretrained ones; masks in the file are applied",
    )
    weights.add_argument(
        "--random-init",
        action="store_true",
        help="no pretrained weights: the model as timm initialises it (see --seed)",
    )
    group.add_argument("--num-classes", type=as_count, metavar="N", help="a new head for N classes")
    group.add_argument(
        "--device", default=None, metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if available)"
    )
    group.add_argument(
        "--seed",
        type=as_seed,
        default=0,
        metavar="N",
        help="random seed of --random-init, of the drawn samples and of the measure random (default: 0)",
    )
    add_traceback(command)


def add_method(command: argparse.ArgumentParser, default: str = "magnitude") -> None:
    """By which measure."""
    command.add_argument(
        "--method",
        default=default,
        metavar="NAME",
        help=f"a measure (default: %(default)s); {', '.join(fp.MEASURES)}",
    )


def add_allocation(command: argparse.ArgumentParser) -> None:
    """How much is pruned, and where."""
    add = command.add_argument_group("how much is pruned, and where").add_argument
    add(
        "--sparsity",
        type=as_fraction,
        metavar="S",
        help="the fraction of all prunable units that are pruned afterwards, 0 to 1; not for n:m",
    )
    add(
        "--cost",
        default="units",
        choices=COSTS,
        help="what --sparsity is a fraction of (default: units); all other costs need channels, and count what "
        "shrink leaves",
    )
    add(
        "--at-most",
        nargs="+",
        type=as_amount,
        metavar="COST=AMOUNT",
        help="absolute budgets for the smaller model, with channels: latency=12.5 (ms), memory=5e7 (bytes), flops=1e9, "
        "parameters=2e6; all of them are met",
    )
    add(
        "--scores",
        type=Path,
        metavar="FILE",
        help="scores written by score --out: no data is read, and --method is not needed",
    )
    add(
        "--scope",
        default="global",
        choices=("global", "layer"),
        help="a short form of --allocation global and layer",
    )
    add(
        "--allocation",
        metavar="NAME",
        help="how sparsity is distributed: global, layer, row, isomorphic, er, erk or lamp (default: global)",
    )
    add(
        "--normalize",
        choices=("default", "none", "mean", "max", "l2", "lamp"),
        default="default",
        help="what a layer's scores are divided by before layers are ranked together",
    )
    add("--max-sparsity", type=as_fraction, metavar="S", help="the highest sparsity of any layer")
    add("--min-keep", type=as_number, metavar="K", help="units that every layer keeps: a number or a fraction")
    add("--round-to", type=as_count, default=1, metavar="N", help="layers keep a multiple of N filters or channels")
    add("--uniform", action="store_true", help="layers of repeated blocks keep equally many channels")
    add("--allow-collapse", action="store_true", help="write the model even if nothing is left of a layer")


def add_rounds(command: argparse.ArgumentParser) -> None:
    """In how many steps."""
    add = command.add_argument_group("rounds").add_argument
    add(
        "--rounds",
        type=as_count,
        default=1,
        metavar="N",
        help="prune in N steps, with new scores before each (default: 1)",
    )
    add(
        "--schedule",
        default="exponential",
        choices=list(fp.SCHEDULES),
        help="the sparsity after each round (default: %(default)s)",
    )


def add_units(command: argparse.ArgumentParser) -> None:
    """What may be pruned."""
    add = command.add_argument_group("what can be pruned").add_argument
    add("--granularity", metavar="G", help="weight (the default), filter, channel, block, or n:m such as 2:4")
    add("--include", nargs="+", metavar="GLOB", help="prune only these parameters, by name: 'blocks.*.attn.qkv'")
    add("--exclude", nargs="+", metavar="GLOB", help="do not prune these parameters: 'head*'")


def add_data(command: argparse.ArgumentParser) -> None:
    """The data for the scores."""
    add = command.add_argument_group("data for the scores").add_argument
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="images, in one folder per class; timm's transforms for the model are used",
    )
    add(
        "--samples",
        type=as_count,
        default=2560,
        metavar="N",
        help="how many images to draw (default: 2560, as in the paper)",
    )
    add("--batch-size", type=as_count, default=64, metavar="N", help="images per batch (default: %(default)s)")
    add("--workers", type=as_workers, default=0, metavar="N", help="processes that read images (default: %(default)s)")
    add(
        "--mode",
        default="eval",
        choices=("eval", "train"),
        help="mode of batch norm and dropout while scoring (default: eval)",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="logits are divided by T; with 200 gradient_norm_increase is GraSP",
    )
    add(
        "--theta0",
        type=Path,
        metavar="FILE",
        help="a checkpoint at initialisation, for distance_biased_loss_preservation",
    )


def add_report(command: argparse.ArgumentParser) -> None:
    """Output files for the results."""
    add = command.add_argument_group("output").add_argument
    add("--report", type=Path, metavar="FILE.json", help="the results")
    add("--plot", type=Path, metavar="FILE.png", help="a figure of the results")


def add_traceback(command: argparse.ArgumentParser) -> None:
    """For bug reports."""
    command.add_argument("--traceback", action="store_true", help="show the traceback of an error")
