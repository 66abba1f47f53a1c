"""Couples, prunes and shrinks every architecture, and says whether what is left computes the same.

    python -m benchmarks.models.coverage                             # all; resumes where it stopped
    python -m benchmarks.models.coverage --only levit --again .      # some models, once more
    python -m benchmarks.models.coverage --peer PATH                 # beside Torch-Pruning installed in PATH

The smallest model of every timm module and every torchvision classification model, with random weights, affine
parameters and running statistics. Of each group of channels 50 %, then 25 %, with the lowest norm of their producers'
rows go. Every model and tool runs in a process of its own, one thread, with a limit on processor time and memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import re
import resource
import sys
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.common.measure import commit, environment
from benchmarks.common.record import RESULTS
from benchmarks.models.coverage.models import listed
from benchmarks.models.coverage.page import page
from benchmarks.models.coverage.trial import LIMIT, RATIOS, TOOLS, building, trial

MEMORY = 14  # GiB of address space for one process
FORK = multiprocessing.get_context("fork")


def in_process(work: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """What one model and tool say in a process of their own; of one that dies, what it said last."""
    receive, send = FORK.Pipe(duplex=False)
    child = FORK.Process(target=one, args=(work, send))
    child.start()
    send.close()
    found: dict[str, Any] = {}
    while True:
        try:
            found = receive.recv()
        except EOFError:
            break
    child.join()
    return {**found, **({"died": f"exit code {child.exitcode}"} if child.exitcode else {})}


def one(work: Iterator[dict[str, Any]], send: Connection) -> None:
    torch.set_num_threads(1)  # makes the thread pool anew, for which autograd's threads would race after a fork
    resource.setrlimit(resource.RLIMIT_CPU, (4 * LIMIT, 4 * LIMIT + 5))  # what hangs outside the timed parts
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY << 30, MEMORY << 30))
    for found in work:
        send.send(found)


def warmed(tools: Sequence[str]) -> None:
    """What the tools import at their first use is imported before any of it is timed, and before the processes fork."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    for which in tools:
        tool = TOOLS[which](net, torch.randn(2, 3, 8, 8))
        tool.prepare()
        tool.build(0.5)
        tool.prune(0.5)
    gc.collect()
    gc.freeze()  # a full collection of what was imported, a quarter of a second, would fall to whichever tool it hits


def due(found: dict[str, Any] | None, name: str, which: str, options: argparse.Namespace, now: str) -> bool:
    if found is None:
        return True
    statuses = " ".join(found[str(ratio)]["status"] for ratio in RATIOS if str(ratio) in found)
    if options.again and re.search(options.again, f"{name} {which} {statuses}"):
        return True
    return which == "ours" and options.renew and found["commit"] != now


def seconds_to_build(names: Sequence[str], tools: Sequence[str], results: dict[str, Any], rounds: int = 3) -> None:
    """Taken anew for every tool that builds the model, one after the other, in turns; the median of the rounds."""
    for name in (name for name in names if name in results):
        known = [which for which in tools if "build_s" in results[name].get(which, {})]
        found = [{which: in_process(building(which, name)).get("build_s") for which in known} for _ in range(rounds)]
        for which in known:
            if seconds := [one[which] for one in found if one[which] is not None]:
                results[name][which]["build_s"] = round(median(seconds), 3)
        print(name, {which: results[name][which]["build_s"] for which in known}, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    data = options.out.with_suffix(".json")
    held = json.loads(data.read_text()) if data.exists() else {"results": {}}
    names = listed(options.out.with_suffix(".models.json"))
    tools = [which for which in TOOLS if options.which in (None, which) and (which == "ours" or options.peer)]
    sys.path[:0] = [options.peer] if options.peer else []
    warmed(tools)
    now = commit()
    for name in [n for n in names if re.search(options.only, n)]:
        both = held["results"].get(name, {})
        for which in tools:
            if due(both.get(which), name, which, options, now):
                both[which] = {**in_process(trial(which, name, options.ratios, options.limit)), "commit": now}
                held["results"][name] = both
                held["results"] = {n: held["results"][n] for n in names if n in held["results"]}
                data.write_text(json.dumps({"environment": environment(), "results": held["results"]}, indent=1) + "\n")
                print(name, which, json.dumps(both[which])[:400], flush=True)
    if options.builds:
        seconds_to_build([n for n in names if re.search(options.only, n)], tools, held["results"])
        data.write_text(json.dumps({**held, "environment": environment(), "built_at": now}, indent=1) + "\n")
    if options.docs:
        options.docs.write_text(page(json.loads(data.read_text()), len(names)))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.coverage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "models" / "coverage",
        help="read and written: OUT.json, and OUT.models.json, the list of models",
    )
    parser.add_argument("--docs", type=Path, help="write the page with the table there")
    parser.add_argument("--only", default="", metavar="REGEX", help="only models whose library/name matches")
    parser.add_argument(
        "--again", default="", metavar="REGEX", help="repeat those whose 'library/name tool statuses' matches"
    )
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help="seconds of processor time to build and prune, for one model and tool"
    )
    parser.add_argument("--renew", action="store_true", help="repeat this package's rows that another commit measured")
    parser.add_argument(
        "--builds", action="store_true", help="take the seconds to build anew, of both tools in turns, and nothing else"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="shares of each group that go")
    parser.add_argument("--which", choices=("ours", "peer"), help="this package, or Torch-Pruning")
    parser.add_argument("--peer", metavar="PATH", help="where Torch-Pruning is installed; it is then measured too")
    return parser


if __name__ == "__main__":
    main()
