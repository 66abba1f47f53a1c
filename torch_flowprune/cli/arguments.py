"""The commands and their options."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch_flowprune as fp
from torch_flowprune.cli import checkpoint_command as files
from torch_flowprune.cli import demo
from torch_flowprune.cli import timm_models as zoo
from torch_flowprune.selection import COSTS


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    whole = argparse.ArgumentParser(prog="torch-flowprune", description=fp.__doc__)
    whole.add_argument("--version", action="version", version=f"torch-flowprune {fp.__version__}")
    commands = whole.add_subparsers(dest="command", required=True)
    _demo(
        commands.add_parser(
            "demo", help="a small net on scikit-learn's digits, pruned by every measure; seconds on a CPU"
        )
    )
    _prune(commands.add_parser("prune", help="prune any timm model, and write it"))
    _score(
        commands.add_parser("score", help="score the units of any timm model, and write the scores for prune --scores")
    )
    _prune_checkpoint(commands.add_parser("prune-checkpoint", help="prune a folder of safetensors, without a model"))
    return whole


def _prune_checkpoint(command: argparse.ArgumentParser) -> None:
    files.add_arguments(command, share, _number)
    _traceback(command)
    command.set_defaults(run=files.prune_files)


def _demo(command: argparse.ArgumentParser) -> None:
    default = demo.Settings()
    command.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        metavar="N",
        help="of the net, the order of the data and `random` (default: 0)",
    )
    command.add_argument(
        "--out", type=Path, default=default.out, metavar="FILE.png", help="the picture (default: %(default)s)"
    )
    command.add_argument(
        "--granularity",
        default=default.granularity,
        choices=("weight", "filter"),
        help="what a unit is (default: %(default)s)",
    )
    command.add_argument(
        "--sparsities",
        type=share,
        nargs="+",
        default=default.sparsities,
        metavar="S",
        help="the share of units to prune (default: 0.1 0.5 0.8)",
    )
    command.add_argument(
        "--methods",
        nargs="+",
        default=default.methods,
        choices=list(fp.MEASURES),
        metavar="NAME",
        help="measures (default: all)",
    )
    command.add_argument(
        "--epochs", type=_at_least_one, default=default.epochs, metavar="N", help="of training (default: %(default)s)"
    )
    command.add_argument(
        "--tuning-epochs",
        type=int,
        default=default.tuning_epochs,
        metavar="N",
        help="after pruning (default: %(default)s)",
    )
    _traceback(command)
    command.set_defaults(run=_run_demo)


def _run_demo(chosen: argparse.Namespace) -> None:
    zoo.check_output("--out", chosen.out, zoo.PICTURES)
    demo.run(demo.Settings(**{field.name: getattr(chosen, field.name) for field in fields(demo.Settings)}))


def _prune(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument(
        "--method",
        default="magnitude",
        metavar="NAME",
        help=f"a measure (default: %(default)s); {', '.join(fp.MEASURES)}",
    )
    command.add_argument(
        "--sparsity",
        type=share,
        metavar="S",
        help="the share of all prunable units that is gone afterwards, 0 to 1; not for n:m",
    )
    command.add_argument(
        "--cost",
        default="units",
        choices=COSTS,
        help="what --sparsity is a share of; all but units: of what shrink leaves of the model, with channels "
        "(default: units)",
    )
    command.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="scores written by `score --out`: no data are read, and --method is not needed",
    )
    command.add_argument(
        "--scope",
        default="global",
        choices=("global", "layer"),
        help="a shorter name for --allocation global and layer",
    )
    command.add_argument(
        "--allocation",
        metavar="NAME",
        help="how sparsity is shared out: global, layer, row, er, erk or lamp (default: global)",
    )
    command.add_argument(
        "--normalize",
        choices=("default", "none", "mean", "max", "l2"),
        default="default",
        help="what a layer's scores are divided by before layers are ranked together",
    )
    command.add_argument(
        "--max-sparsity", type=share, metavar="S", help="the largest share of any layer that may be gone"
    )
    command.add_argument(
        "--round-to", type=_at_least_one, default=1, metavar="N", help="layers keep a multiple of N filters or channels"
    )
    command.add_argument(
        "--allow-collapse", action="store_true", help="write a model of which a layer has nothing left all the same"
    )
    command.add_argument(
        "--rounds",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="prune in N steps, scoring anew before each (default: 1)",
    )
    command.add_argument(
        "--schedule",
        default="exponential",
        choices=list(fp.SCHEDULES),
        help="the sparsity after each round (default: %(default)s)",
    )
    command.add_argument(
        "--min-keep", type=_number, metavar="K", help="units that every layer keeps: a number, or a share such as 0.05"
    )
    _scoring(command)
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE.safetensors",
        help="the pruned weights, under the model's own names, zeros in place",
    )
    command.add_argument("--report", type=Path, metavar="FILE.json", help="what went, layer by layer")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="the sparsity of every layer as a picture")
    command.set_defaults(run=zoo.prune_timm)


def _score(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument(
        "--method",
        default="magnitude",
        metavar="NAME",
        help=f"a measure (default: %(default)s); {', '.join(fp.MEASURES)}",
    )
    _scoring(command)
    command.add_argument("--out", type=Path, metavar="FILE.safetensors", help="the scores, one tensor a parameter")
    command.set_defaults(run=zoo.score)


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "name", metavar="NAME", help="a timm model: resnet18, vit_tiny_patch16_224.augreg_in21k_ft_in1k, ..."
    )
    weights = command.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights to load instead of timm's pretrained ones"
    )
    weights.add_argument(
        "--random-init", action="store_true", help="no weights: the model as timm initialises it (see --seed)"
    )
    command.add_argument(
        "--num-classes", type=_at_least_one, metavar="N", help="a head for N classes instead of the model's own"
    )
    command.add_argument(
        "--device", default=None, metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)"
    )
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of --random-init, the choice of samples and `random` (default: 0)",
    )
    _traceback(command)


def _scoring(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--granularity",
        default=None,
        metavar="G",
        help="what a unit is: weight (the default), filter, channel, or n:m such as 2:4",
    )
    command.add_argument(
        "--include", nargs="+", metavar="GLOB", help="prune only these parameters, by name: 'blocks.*.attn.qkv'"
    )
    command.add_argument("--exclude", nargs="+", metavar="GLOB", help="leave these parameters alone: 'head*'")
    command.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="pictures in one folder a class; timm's transforms for the model are used",
    )
    command.add_argument(
        "--samples",
        type=_at_least_one,
        default=2560,
        metavar="N",
        help="pictures drawn from --data (default: 2560, the paper's)",
    )
    command.add_argument("--batch-size", type=_at_least_one, default=64, metavar="N", help="(default: %(default)s)")
    command.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read pictures (default: %(default)s)"
    )
    command.add_argument(
        "--mode", default="eval", choices=("eval", "train"), help="batch norm and dropout while scoring (default: eval)"
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="logits are divided by T; with 200 gradient_norm_increase is GraSP",
    )
    command.add_argument(
        "--theta0",
        type=Path,
        metavar="FILE",
        help="a checkpoint at initialisation, for distance_biased_loss_preservation",
    )


def _traceback(command: argparse.ArgumentParser) -> None:
    command.add_argument("--traceback", action="store_true", help="show where an error came from")


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, such as 0.9, got {text!r}")
    return value


def _at_least_one(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else share(text)
