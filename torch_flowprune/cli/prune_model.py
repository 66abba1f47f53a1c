"""The command ``prune``: a timm model in, a pruned one out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import nn

import torch_flowprune as fp
from torch_flowprune.cli.output_files import IMAGES, check_output, tell
from torch_flowprune.cli.scoring_words import check_measures, source_of, units_of
from torch_flowprune.cli.sources import example_input, existing, load_model
from torch_flowprune.scoring import SHRINKABLE
from torch_flowprune.selection import AllocationOptions

_NORMALIZE = {"none": None}


def run_prune(chosen: argparse.Namespace) -> None:
    """Prune a timm model, write what was asked for, print what is pruned."""
    _check_files(chosen)
    scores = None if chosen.scores is None else fp.Scores.load(existing("--scores", chosen.scores))
    methods = [] if scores else [chosen.method]
    check_measures(chosen, methods)
    _check_goal(chosen, scores)
    model = load_model(chosen)
    scored = {"scores": scores} if scores else {"method": chosen.method, "schedule": chosen.schedule}
    units = units_of(chosen) | ({"granularity": chosen.granularity} if scores else {})
    chooses = {name: getattr(chosen, name) for name in ("sparsity", "rounds", *AllocationOptions.__annotations__)} | {
        "normalize": _NORMALIZE.get(chosen.normalize, chosen.normalize),
        "at_most": chosen.at_most and dict(chosen.at_most),
    }
    report = fp.global_prune(model, **scored, **units, **chooses, **source_of(chosen, model, methods))
    _check_alive(report, allowed=chosen.allow_collapse)
    written = _write(model, report, chosen)  # before it is told
    tell(report)
    tell("\n".join(written) or "nothing was written: --out FILE.safetensors keeps the pruned weights")


def _check_files(chosen: argparse.Namespace) -> None:
    check_output("--out", chosen.out, (".safetensors",))
    check_output("--onnx", chosen.onnx, (".onnx",))
    check_output("--report", chosen.report, (".json",))
    check_output("--plot", chosen.plot, IMAGES)


def _check_goal(chosen: argparse.Namespace, given: fp.Scores | None) -> None:
    granularity = chosen.granularity or (given.granularity if given else "weight")
    if chosen.sparsity is None and chosen.at_most is None and ":" not in granularity:
        raise ValueError(
            "--sparsity is missing: expected a fraction from 0 to 1, such as --sparsity 0.9 (only n:m granularity and "
            "--at-most need none)"
        )
    if chosen.shrink and granularity not in SHRINKABLE:
        raise ValueError(
            f"--shrink removes whole channels and blocks, and the units are {granularity}s: expected --granularity "
            "channel or block"
        )


def _write(model: nn.Module, report: fp.Report, chosen: argparse.Namespace) -> list[str]:
    """What was asked for, to files; returns a line on each."""
    lines = []
    shrunk = fp.shrink(model, example_input(model, 2)) if chosen.shrink else None
    if chosen.out:
        facts: dict[str, Any] = {
            "method": report.method,
            "granularity": report.granularity,
            "sparsity": report.sparsity,
        }
        written = fp.save_pruned(shrunk or model, chosen.out, facts=facts)
        anywhere = shrunk is None and not written.masks_apart
        lines.append(f"{chosen.out} written: load it with {_loading(chosen, anywhere=anywhere)}")
    if chosen.onnx:
        lines.append(f"{fp.export(model, example_input(model, 2), chosen.onnx, shrink=chosen.shrink)}")
    if chosen.report:
        _write_json(chosen.report, report.to_dict())
        lines.append(f"{chosen.report} written")
    if chosen.plot:
        report.plot(chosen.plot)
        lines.append(f"{chosen.plot} written")
    return lines


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _check_alive(report: fp.Report, *, allowed: bool) -> None:
    if (empty := report.emptied) and not allowed:
        tell(report)
        raise ValueError(
            f"nothing is left of {', '.join(empty[:5])}: the model is dead, and was not written; prune less, use "
            "--allocation layer or erk, or pass --allow-collapse to write it anyway"
        )


def _loading(chosen: argparse.Namespace, *, anywhere: bool) -> str:
    classes = "" if chosen.num_classes is None else f", num_classes={chosen.num_classes}"
    if anywhere:
        return f"timm.create_model({chosen.name!r}, checkpoint_path={str(chosen.out)!r}{classes})"
    return f"torch_flowprune.load_pruned(timm.create_model({chosen.name!r}{classes}), {str(chosen.out)!r})"
