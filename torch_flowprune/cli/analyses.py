"""The commands that prune nothing: ``score``, ``compare`` and ``diagnose``."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch_flowprune as fp
from torch_flowprune.cli.output_files import IMAGES, check_output, tell
from torch_flowprune.cli.scoring_words import check_measures, images, source_of, units_of
from torch_flowprune.cli.sources import load_model


def run_score(chosen: argparse.Namespace) -> None:
    """Score the units of a timm model, write the scores, print a summary."""
    check_output("--out", chosen.out, (".safetensors",))
    check_measures(chosen, [chosen.method])
    model = load_model(chosen)
    scores = fp.scores(model, chosen.method, **units_of(chosen), **source_of(chosen, model, [chosen.method]))
    if chosen.out:
        scores.save(chosen.out)
    tell(scores)
    if chosen.out:
        tell(f"{chosen.out} written: prune with torch-flowprune prune {chosen.name} --scores {chosen.out} --sparsity S")
    else:
        tell("nothing was written: --out FILE.safetensors keeps the scores")


def run_compare(chosen: argparse.Namespace) -> None:
    """Measure what every measure at every sparsity costs; a table and a picture."""
    _check(chosen, "compare", chosen.methods)
    model = load_model(chosen)
    source = source_of(chosen, model, chosen.methods, always=True)
    held_out = None if chosen.held_out is None else images(chosen, model, "held_out")
    comparison = fp.compare(model, chosen.methods, chosen.sparsities, held_out=held_out, **units_of(chosen), **source)
    _show(comparison, chosen)


def run_diagnose(chosen: argparse.Namespace) -> None:
    """Tell where a model stands in its gradient flow; a table and a picture."""
    _check(chosen, "diagnose", [chosen.method])
    model = load_model(chosen)
    diagnosis = fp.diagnose(
        model, method=chosen.method, **units_of(chosen), **source_of(chosen, model, [chosen.method], always=True)
    )
    _show(diagnosis, chosen)


def _check(chosen: argparse.Namespace, command: str, methods: list[str]) -> None:
    check_output("--report", chosen.report, (".json",))
    check_output("--plot", chosen.plot, IMAGES)
    if chosen.data is None:
        raise ValueError(
            f"--data is missing: {command} measures a loss; expected --data DIR, with one folder of images per class"
        )
    check_measures(chosen, methods)


def _show(found: Any, chosen: argparse.Namespace) -> None:
    """To files first, then to the terminal."""
    if chosen.report:
        chosen.report.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    if chosen.plot:
        found.plot(chosen.plot)
    tell(found)
    for path in (chosen.report, chosen.plot):
        if path:
            tell(f"{path} written")
