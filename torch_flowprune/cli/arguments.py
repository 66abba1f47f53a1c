"""The commands and their options."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import torch_flowprune as fp
from torch_flowprune.analysis import DEFAULT_MEASURES
from torch_flowprune.cli import demo
from torch_flowprune.cli.analyses import run_compare, run_diagnose, run_score
from torch_flowprune.cli.argument_types import as_count, as_fraction, as_seed, as_workers
from torch_flowprune.cli.checkpoint_command import add_checkpoint_options
from torch_flowprune.cli.help_examples import EXAMPLES, OF_ALL
from torch_flowprune.cli.option_groups import (
    add_allocation,
    add_data,
    add_method,
    add_model,
    add_report,
    add_rounds,
    add_traceback,
    add_units,
)
from torch_flowprune.cli.output_files import IMAGES, check_output
from torch_flowprune.cli.prune_model import run_prune


class _Description(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, and the sentence above the options in lines of the terminal's width."""

    def add_text(self, text: str | None) -> None:
        super().add_text(text if text is None or "\n" in text else textwrap.fill(text, self._width))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: a screen of options would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the options)\n")


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    whole = _Parser(
        prog="torch-flowprune",
        description=fp.__doc__,
        epilog=OF_ALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"torch-flowprune {fp.__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_options, text) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text[:1].upper() + text[1:] + ".",
            epilog=f"examples:\n{EXAMPLES[name]}",
            formatter_class=_Description,
        )
        add_options(command)
    return whole


def _demo(command: argparse.ArgumentParser) -> None:
    default = demo.Settings()
    add = command.add_argument
    add(
        "--seed",
        type=as_seed,
        default=default.seed,
        metavar="N",
        help="random seed of the network, the data and the measure random (default: 0)",
    )
    add("--out", type=Path, default=default.out, metavar="FILE.png", help="the figure (default: %(default)s)")
    add(
        "--granularity",
        default=default.granularity,
        choices=("weight", "filter"),
        help="what a unit is (default: %(default)s)",
    )
    add(
        "--sparsities",
        type=as_fraction,
        nargs="+",
        default=default.sparsities,
        metavar="S",
        help="the fraction of units to prune (default: 0.1 0.5 0.8)",
    )
    add(
        "--methods",
        nargs="+",
        default=default.methods,
        choices=list(fp.MEASURES),
        metavar="NAME",
        help="measures (default: all)",
    )
    add(
        "--epochs", type=as_count, default=default.epochs, metavar="N", help="epochs of training (default: %(default)s)"
    )
    add(
        "--tuning-epochs",
        type=as_workers,
        default=default.tuning_epochs,
        metavar="N",
        help="epochs of fine-tuning after pruning (default: %(default)s)",
    )
    add_traceback(command)
    command.set_defaults(run=_run_demo)


def _run_demo(chosen: argparse.Namespace) -> None:
    check_output("--out", chosen.out, IMAGES)
    demo.run(demo.Settings(**{field.name: getattr(chosen, field.name) for field in fields(demo.Settings)}))


def _prune(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_method(command)
    add_allocation(command)
    add_rounds(command)
    add_units(command)
    add_data(command)
    written = command.add_argument_group("output")
    written.add_argument(
        "--out",
        type=Path,
        metavar="FILE.safetensors",
        help="the pruned weights under the model's own names, with zeros, and the masks in the metadata",
    )
    written.add_argument(
        "--shrink", action="store_true", help="remove the pruned channels (with --granularity channel or block)"
    )
    written.add_argument(
        "--onnx", type=Path, metavar="FILE.onnx", help="the pruned model as ONNX, run and compared with the original"
    )
    written.add_argument("--report", type=Path, metavar="FILE.json", help="a report of what is pruned, layer by layer")
    written.add_argument("--plot", type=Path, metavar="FILE.png", help="a figure of the sparsity of every layer")
    command.set_defaults(run=run_prune)


def _score(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_method(command)
    add_units(command)
    add_data(command)
    command.add_argument("--out", type=Path, metavar="FILE.safetensors", help="the scores, one tensor per parameter")
    command.set_defaults(run=run_score)


def _compare(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument(
        "--methods",
        nargs="+",
        default=list(DEFAULT_MEASURES),
        metavar="NAME",
        help=f"measures (default: {' '.join(DEFAULT_MEASURES)})",
    )
    command.add_argument(
        "--sparsities",
        type=as_fraction,
        nargs="+",
        default=[0.5, 0.8, 0.9],
        metavar="S",
        help="fractions of the prunable units (default: 0.5 0.8 0.9)",
    )
    add_units(command)
    add_data(command)
    command.add_argument(
        "--held-out", type=Path, metavar="DIR", help="images to measure the loss on (default: those of --data)"
    )
    add_report(command)
    command.set_defaults(run=run_compare)


def _diagnose(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_method(command, default="loss_preservation")
    add_units(command)
    add_data(command)
    add_report(command)
    command.set_defaults(run=run_diagnose)


COMMANDS = {
    "demo": (_demo, "prune a small network on scikit-learn's digits by every measure; a minute on a CPU"),
    "prune": (_prune, "prune any timm model and write it to a file"),
    "score": (_score, "score the units of any timm model and write the scores, for prune --scores"),
    "compare": (_compare, "measure how much each measure raises the loss of a timm model at each sparsity"),
    "diagnose": (_diagnose, "show how the norm of each layer changes in training, and how stable its scores are"),
    "prune-checkpoint": (add_checkpoint_options, "prune a folder of safetensors, without a model"),
}
"""By name: what adds a command's options, and what it does."""
