"""The command ``prune-checkpoint``: a folder of safetensors in, another out, no model and bounded memory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch_flowprune as fp
from torch_flowprune.cli.argument_types import as_count, as_fraction, as_number
from torch_flowprune.cli.option_groups import add_traceback
from torch_flowprune.cli.output_files import check_output, tell


def add_checkpoint_options(command: argparse.ArgumentParser) -> None:
    """The options, which are those of :func:`~torch_flowprune.prune_checkpoint`."""
    option = command.add_argument
    option("source", type=Path, metavar="DIR", help="a folder of .safetensors files, with their index if several")
    option("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    option(
        "--sparsity",
        type=as_fraction,
        metavar="S",
        help="the fraction of weights to prune, 0 to 1; not for n:m",
    )
    option("--method", default="magnitude", metavar="NAME", help="magnitude; with --scores, a name for the report")
    option("--scores", type=Path, metavar="DIR", help="a folder of safetensors with one score per weight")
    option("--granularity", default="weight", metavar="G", help="weight (the default), or n:m such as 2:4")
    option(
        "--allocation", metavar="NAME", help="how sparsity is distributed: global (the default), layer, row, er, erk"
    )
    option("--include", nargs="+", metavar="GLOB", help="prune only these tensors, by name: '*.mlp.*'")
    option("--exclude", nargs="+", metavar="GLOB", help="do not prune these tensors: 'lm_head*'")
    option("--min-keep", type=as_number, metavar="K", help="weights that every tensor keeps: a number or a fraction")
    option("--max-sparsity", type=as_fraction, metavar="S", help="the highest sparsity of any tensor")
    option("--threads", type=as_count, metavar="N", help="shards to process in parallel")
    option("--report", type=Path, metavar="FILE.json", help="a report of what is pruned, tensor by tensor")
    add_traceback(command)
    command.set_defaults(run=_prune_files)


def _prune_files(chosen: argparse.Namespace) -> None:
    """Prune, print what was pruned, write the report."""
    check_output("--report", chosen.report, (".json",))
    words = ("granularity", "allocation", "scores", "include", "exclude", "min_keep", "max_sparsity", "threads")
    report = fp.prune_checkpoint(
        chosen.source, chosen.out, chosen.method, chosen.sparsity, **{word: getattr(chosen, word) for word in words}
    )
    if chosen.report:
        chosen.report.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    tell(report)
    tell(f"{chosen.out} written")
