"""Which carriers of a mask keep which rows of the host page, and what each costs.

    python -m benchmarks.carriers --out benchmarks/results/cost/carriers.json --docs

Each trial is a few lines on one layer, and passes or not; an error is no. Rows of scores, amounts and ties are none of
a carrier's, and those of several processes, schedules of training and files of whole models follow from these. Times
are of four linear layers on 8 samples: steps of training, masked over dense, in turn, processor time, medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.carriers.more_trials import TRIALS
from benchmarks.carriers.ways import WAYS, Way
from benchmarks.common.measure import alternating
from benchmarks.common.page import shown, table, wrapped
from benchmarks.common.record import ROOT, begun, deliver, steady

COMMAND = "python -m benchmarks.carriers"
PAGE = ROOT / "docs" / "explanation" / "host.md"
MARKS = ("<!-- table of python -m benchmarks.carriers -->", "<!-- end of carriers -->")
WIDTHS = (64, 256, 1024)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="how often each step is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one small width, two rounds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", action="store_true", help="write the section of the host page")
    options = parser.parse_args(arguments)
    steady(options.threads)
    widths, rounds = ((16,), 2) if options.quick else (WIDTHS, options.rounds)
    found = {
        **begun(COMMAND, arguments, threads=options.threads),
        "rows": {number: {"what": what, "holds": _tried(trial)} for number, (what, trial) in TRIALS.items()},
        "classes": {way.name: _classes(way) for way in WAYS},
        "steps": {str(width): _steps(width, rounds) for width in widths},
    }
    print(json.dumps(found["steps"], indent=1), file=sys.stderr)
    deliver(found, report(found), options.out, PAGE if options.docs else None, MARKS)
    return found


def _tried(trial: Callable[[Way], bool]) -> dict[str, bool]:
    return {way.name: _holds(way, trial) for way in WAYS}


def _holds(way: Way, trial: Callable[[Way], bool]) -> bool:
    torch.manual_seed(0)
    with warnings.catch_warnings(), way.here():
        warnings.simplefilter("ignore")
        try:
            return bool(trial(way))
        except Exception:
            return False


def _classes(way: Way) -> int:
    layers = [nn.Linear(4, 4) for _ in range(20)]
    with way.here():
        for layer in layers:
            way.put(layer, "weight", torch.eye(4) == 0)
    return len({type(layer) for layer in layers} - {nn.Linear})


def _steps(width: int, rounds: int) -> dict[str, float]:
    """A step of training of the masked model, over one of the dense."""
    torch.manual_seed(0)
    dense = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(width, width), nn.ReLU())))
    x, mask = torch.randn(8, width), torch.rand(width, width) < 0.1
    repeats = max(1, 40_000 // width**2 * 4)
    works = {"dense": _work(copy.deepcopy(dense), x, repeats)}
    for way in WAYS:
        model = copy.deepcopy(dense)
        with way.here():
            for part in model[::2]:
                way.put(part, "weight", mask)
        works[way.name] = _work(model, x, repeats)
    for prepare in works.values():
        prepare()()
    times = alternating(works, rounds)
    return {name: taken.median / times["dense"].median for name, taken in times.items() if name != "dense"}


def _work(model: nn.Module, x: torch.Tensor, repeats: int) -> Callable[[], Callable[[], object]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def steps() -> None:
        for _ in range(repeats):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    return lambda: steps


def report(found: dict[str, Any]) -> str:
    """The section of the page."""
    names = [way.name for way in WAYS]
    rows = [
        [f"{number}: {row['what']}", *("yes" if row["holds"][name] else "**no**" for name in names)]
        for number, row in found["rows"].items()
    ]
    held = [sum(row["holds"][name] for row in found["rows"].values()) for name in names]
    rows.append([f"of {len(found['rows'])}", *map(str, held)])
    steps = [
        [f"a step, width {width}, of dense", *(f"{times[name]:.2f}" for name in names)]
        for width, times in found["steps"].items()
    ]
    machine = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = f"{machine['processor']}, {machine['threads']} thread(s); {versions}; commit {machine['commit']}."
    classes = [["classes made for 20 layers of one kind", *(str(found["classes"][name]) for name in names)]]
    return "\n\n".join(
        [shown(found["command"]), wrapped(where), "\n".join(table(["", *names], rows + classes + steps))]
    )


if __name__ == "__main__":
    main()
