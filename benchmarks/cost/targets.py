"""Targets in latency and memory: what was asked for, what was predicted, and what the shrunk model takes.

    python -m benchmarks.cost.targets --out benchmarks/results/cost/targets.json --docs

Every model is pruned by magnitude to a share of its latency, and of its memory, in one ranking over all layers or in
equal fractions of each, to widths that are multiples of eight (``--round-to``), and shrunk. Latency: the dense and the
shrunk model answer the same input in turn; with one thread both they and the table are measured in processor time,
which other work on the machine adds little to. Memory: what torch's allocator hands out at most during one answer, as
its profiler has it, and the model and its input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import torch_flowprune as fp
from benchmarks.common.measure import alternating
from benchmarks.common.page import shown, table, wrapped
from benchmarks.common.record import ROOT, begun, deliver, steady
from benchmarks.cost.latency import MODELS, QUICK, answer, built, clock_of
from torch_flowprune.channels.costs.latency_table import in_turns

COMMAND = "python -m benchmarks.cost.targets"
PAGE = ROOT / "docs" / "guide" / "allocation.md"
MARKS = ("<!-- table of python -m benchmarks.cost.targets -->", "<!-- end of targets -->")
ALLOCATIONS = ("global", "layer")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    steady(options.threads)
    names, rounds = ([QUICK], 3) if options.quick else (options.models, options.rounds)
    settings = {name: getattr(options, name) for name in ("threads", "batch", "share", "round_to")}
    found = {**begun(COMMAND, arguments), "settings": settings, "rows": []}
    for name in names:
        for allocation in ALLOCATIONS:
            row = {"model": name, "allocation": allocation}
            asked = {"allocation": allocation, "sparsity": options.share, "round_to": options.round_to}
            row |= of_latency(name, asked, options.batch, rounds, options.threads)
            row |= of_memory(name, asked, options.batch)
            found["rows"].append(row)
            print(json.dumps(row), file=sys.stderr)
    deliver(found, report(found), options.out, PAGE if options.docs else None, MARKS)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Targets in latency and memory, and what comes of them.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm models")
    parser.add_argument("--share", type=float, default=0.3, help="of latency and memory that goes")
    parser.add_argument("--round-to", type=int, default=8, help="widths are multiples of it")
    parser.add_argument("--batch", type=int, default=2, help="images that are answered at once")
    parser.add_argument("--rounds", type=int, default=15, help="how often each model answers")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is steadiest on a busy machine")
    parser.add_argument("--quick", action="store_true", help="a small net, three rounds: measures nothing")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/guide/allocation.md")
    return parser


def pruned(name: str, cost: Any, asked: dict[str, Any], x: Tensor) -> tuple[nn.Module, nn.Module, Any]:
    """The dense model, the shrunk one, and what is known of both."""
    dense, masked = built(name)[0], built(name)[0]
    fp.global_prune(masked, "magnitude", granularity="channel", cost=cost, example_inputs=x, **asked)
    small = fp.shrink(masked, x)
    return dense, small, (fp.couple(dense, x).costs, fp.couple(small, x).costs)


def of_latency(name: str, asked: dict[str, Any], batch: int, rounds: int, threads: int) -> dict[str, Any]:
    x = torch.randn(batch, *built(name)[1])
    known = fp.LatencyTable(timer=lambda runs, device: in_turns(runs, device, clock_of(threads)))
    dense, small, costs = pruned(name, known, asked, x)
    foretold = [known.milliseconds(one.calls(one.all), one.device) for one in costs]
    times = alternating(
        {kind: lambda one=one: lambda: answer(one, x) for kind, one in (("dense", dense), ("shrunk", small))},
        rounds,
        clock_of(threads),
    )
    taken = [1e3 * times[kind].median for kind in ("dense", "shrunk")]
    spread = [times[kind].to_dict()["spread"] for kind in ("dense", "shrunk")]
    return {"ms_foretold": foretold, "ms_taken": taken, "ms_spread": spread, "measured": len(known.known)}


def of_memory(name: str, asked: dict[str, Any], batch: int) -> dict[str, Any]:
    x = torch.randn(batch, *built(name)[1])
    try:
        dense, small, costs = pruned(name, "memory", asked, x)
    except ValueError as error:
        return {"memory": str(error)}
    foretold = [one.count("memory", one.all) for one in costs]
    return {"bytes_foretold": foretold, "bytes_taken": [held(one, x) for one in (dense, small)]}


def held(model: nn.Module, x: Tensor) -> int:
    """Bytes of the model, its input, and what the allocator hands out at most."""
    answer(model, x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        answer(model, x)
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    own = [*model.parameters(), *model.buffers(), x]
    return most + sum(tensor.numel() * tensor.element_size() for tensor in own)


# -- the table ------------------------------------------


def report(found: dict[str, Any]) -> str:
    machine, settings = found["environment"], found["settings"]
    head = ["model", "allocation", "latency predicted", "measured", "dense ms predicted", "measured (spread)"]
    head += ["shrunk ms predicted", "measured (spread)", "off by"]
    head += ["memory predicted", "measured", "dense MiB predicted", "measured"]
    clock = "processor time" if settings["threads"] == 1 else "wall time"
    where = (
        f"{machine['processor']}, {settings['threads']} thread(s), {clock}, batch of {settings['batch']}; torch "
        f"{machine['versions']['torch']}; commit {machine['commit']}. Asked for in each case: {settings['share']:.0%} "
        "less. Predicted and measured: what is left of the dense model's. Off by: the milliseconds predicted for the "
        "shrunk model over those it took."
    )
    lines = table(head, [_row(row) for row in found["rows"]])
    return "\n\n".join([shown(found["command"]), wrapped(where), "\n".join(lines)])


def _row(row: dict[str, Any]) -> list[str]:
    foretold, taken = row["ms_foretold"], row["ms_taken"]
    cells = [row["model"], row["allocation"], _left(foretold), _left(taken)]
    for kind in (0, 1):
        cells += [f"{foretold[kind]:.1f}", f"{taken[kind]:.1f} ({row['ms_spread'][kind]:.0%})"]
    cells.append(f"{foretold[1] / taken[1] - 1:+.1%}")
    if "memory" in row:
        return [*cells, "out of reach", "", "", ""]
    foretold, taken = row["bytes_foretold"], row["bytes_taken"]
    return [*cells, _left(foretold), _left(taken), f"{foretold[0] / 2**20:.1f}", f"{taken[0] / 2**20:.1f}"]


def _left(pair: list[float]) -> str:
    return f"{pair[1] / pair[0]:.1%}"


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
