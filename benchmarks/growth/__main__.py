"""How time and memory grow with layers, weights, depth, batches, tokens and more, with the exponents.

    python -m benchmarks.growth --out benchmarks/results/growth/growth.json --docs

Each size of each work runs in a process of its own: once for the rise of the process's high-water mark, then a few
times for the least processor time, on one thread. The exponent is the slope of a line through the logarithms: 1 is in
proportion. ``--only`` measures some of what grows, and keeps what the file has of the rest; without a name behind it,
nothing is measured anew. Torch-Pruning is a peer
that has to be on the path; where it is not, its columns stay empty.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import torch_flowprune as fp
from benchmarks.common.measure import forget_peak, memory
from benchmarks.common.page import shown, table, wrapped
from benchmarks.common.record import ROOT, begun, deliver, keep, steady
from benchmarks.growth.figure import draw
from benchmarks.growth.works import GROWTHS, Growth

COMMAND = "python -m benchmarks.growth"
PAGE, FIGURE = ROOT / "docs" / "results" / "growth.md", ROOT / "docs" / "results" / "figures" / "growth.png"
MARKS = ("<!-- table of python -m benchmarks.growth -->", "<!-- end of table -->")
_ENOUGH, _LONG = 0.5, 1.0
"""Seconds: repeated until so many went by; not repeated where one takes so many."""
_SMALLEST = 2
"""How many of the sizes ``--quick`` runs."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    steady(1)
    if options.one:
        name, side, size = options.one
        print(json.dumps(measured(GROWTHS[name], side, int(size))))
        return {}
    found = {**begun(COMMAND, arguments, threads=1), "growths": _kept(options.out, options.only)}
    for name in GROWTHS if options.only is None else options.only:
        of = {"command": found["command"], "commit": found["environment"]["commit"]}
        found["growths"][name] = {**_of(name, quick=options.quick), **of}
        keep(found, options.out)
    found["growths"] = {name: found["growths"][name] for name in GROWTHS if name in found["growths"]}
    deliver(found, report(found), options.out, PAGE if options.docs else None, MARKS)
    if options.docs:
        draw(found, FIGURE)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="How time and memory grow.")
    parser.add_argument("--only", nargs="*", choices=list(GROWTHS), help="some of what grows; the rest as it was")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: shows that everything runs")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/results/growth.md")
    parser.add_argument("--one", nargs=3, metavar=("GROWTH", "SIDE", "SIZE"), help=argparse.SUPPRESS)
    return parser


def _kept(out: Path | None, only: list[str] | None) -> dict[str, Any]:
    return json.loads(out.read_text())["growths"] if only is not None and out and out.exists() else {}


def _of(name: str, *, quick: bool) -> dict[str, Any]:
    growth = GROWTHS[name]
    sizes = growth.sizes[:_SMALLEST] if quick else growth.sizes
    sides: dict[str, Any] = {}
    for side in growth.sides:
        upto = growth.upto.get(side, max(sizes))
        points = {size: _apart(name, side, size) for size in sizes if size <= upto}
        points = {size: point for size, point in points.items() if point}
        exponents = {what: exponent({size: p[what] for size, p in points.items()}) for what in ("seconds", "peak")}
        sides[side] = {"points": points, "exponents": exponents}
        print(name, side, json.dumps(sides[side]), file=sys.stderr, flush=True)
    return {"grows": growth.grows, "goal": growth.goal, "sides": sides}


def _apart(name: str, side: str, size: int) -> dict[str, float] | None:
    """In a process of its own; None where a peer is not there."""
    command = [sys.executable, "-m", "benchmarks.growth", "--one", name, side, str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "No module named 'torch_pruning'" in done.stderr:
        return None
    if done.returncode:
        raise RuntimeError(f"{name}, {side}, {size}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measured(growth: Growth, side: str, size: int) -> dict[str, float]:
    """The least processor time, and the rise of the process's memory in a first run."""
    fp.global_prune(torch.nn.Linear(8, 8), "magnitude", 0.5)  # what a process loads once
    prepare, seconds = growth.sides[side], list[float]()
    work = prepare(size)
    gc.collect()
    forget_peak()
    held, _ = memory()
    seconds.append(_timed(work))
    peak = memory()[1] - held
    while sum(seconds) < _ENOUGH and seconds[0] < _LONG:
        work = prepare(size)
        seconds.append(_timed(work))
    return {"seconds": min(seconds), "peak": peak, "runs": len(seconds)}


def _timed(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def exponent(values: dict[int, float]) -> float | None:
    """The slope of the line through the logarithms; None for fewer than two."""
    points = [(math.log(size), math.log(value)) for size, value in values.items() if value > 0]
    if len(points) < 2:
        return None
    xs, ys = zip(*points, strict=True)
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a in xs)


def report(found: dict[str, Any]) -> str:
    machine = found["environment"]
    where = (
        f"{machine['processor']}, {machine['cores']} cores, one thread; torch {machine['versions']['torch']}; "
        "milliseconds of processor time (the least of several) and MB of memory that the process took besides."
    )
    tables = ("\n".join(_table(growth)) for growth in found["growths"].values())
    return "\n\n".join(
        [shown(f"{COMMAND} --out benchmarks/results/growth/growth.json --docs"), wrapped(where), *tables]
    )


def _table(growth: dict[str, Any]) -> list[str]:
    sizes = sorted({int(size) for side in growth["sides"].values() for size in side["points"]})
    goal = f"goal {growth['goal']:g}"
    head = [growth["grows"], *(f"{size:,}" for size in sizes), f"exponent ({goal})", "of memory"]
    rows = []
    for name, side in growth["sides"].items():
        points = {int(size): point for size, point in side["points"].items()}
        cells = [_cell(points[size]) if size in points else "" for size in sizes]
        exponents = [side["exponents"][what] for what in ("seconds", "peak")]
        rows.append([name, *cells, *("" if value is None else f"{value:.2f}" for value in exponents)])
    return table(head, rows)


def _cell(point: dict[str, float]) -> str:
    return f"{point['seconds'] * 1e3:.3g} ms, {point['peak'] / 1e6:.3g} MB"


if __name__ == "__main__":
    main()
