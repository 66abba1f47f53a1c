"""Couples, prunes and shrinks every architecture, and says whether what is left computes the same; beside Torch-Pruning.

    python -m benchmarks.coverage                             # all; resumes where it stopped
    python -m benchmarks.coverage --one timm/levit_128s       # one model, lines of JSON as it proceeds
    python -m benchmarks.coverage --peer PATH                 # beside Torch-Pruning installed in PATH

The smallest model of every timm module and every torchvision classification model, with random weights, affine parameters and running
statistics. Of each group of channels 50 %, then 25 %, with the lowest norm of their producers' rows go. Every model and tool runs in a
process of its own, one thread, with a limit on processor time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.coverage.models import listed
from benchmarks.coverage.page import page
from benchmarks.coverage.trial import LIMIT, RATIOS, trial
from benchmarks.measure import commit, environment

RESULTS = Path(__file__).parent.parent / "results" / "coverage"
MEMORY = 14  # GiB of address space for one process


def one(name: str, which: str, ratios: Sequence[float]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for found in trial(which, name, ratios):
        print(json.dumps(found), flush=True)


def in_process(name: str, which: str, ratios: Sequence[float], path: str | None = None) -> dict[str, Any]:
    """One model and tool in a process of its own; of one that dies, what it said last."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.coverage", "--one", name, "--which", which, "--ratios", *map(str, ratios)]
    paths = [p for p in (path, os.environ.get("PYTHONPATH")) if p]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, preexec_fn=limited)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = dict(json.loads(lines[-1])) if lines else {}
    if done.returncode:
        found["died"] = f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
    return {**found, "commit": commit()}


def limited() -> None:
    """Guards against what hangs outside the timed parts, and against a machine that runs out of memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (4 * LIMIT, 4 * LIMIT + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY << 30, MEMORY << 30))


def due(found: dict[str, Any] | None, name: str, which: str, options: argparse.Namespace) -> bool:
    if found is None or (options.again and re.search(options.again, f"{name} {which}")):
        return True
    return which == "ours" and options.renew and found["commit"] != commit()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.one:
        one(options.one, options.which, options.ratios)
        return
    data = options.out.with_suffix(".json")
    held = json.loads(data.read_text()) if data.exists() else {"results": {}}
    names = listed(options.out.with_suffix(".models.json"))
    tools = ("ours", "peer") if options.peer else ("ours",)
    for name in [n for n in names if re.search(options.only, n)]:
        both = held["results"].get(name, {})
        for which in tools if options.which is None else (options.which,):
            if due(both.get(which), name, which, options):
                both[which] = in_process(name, which, options.ratios, options.peer if which == "peer" else None)
                held["results"][name] = both
                held["results"] = {n: held["results"][n] for n in names if n in held["results"]}
                data.write_text(json.dumps({"environment": environment(), "results": held["results"]}, indent=1) + "\n")
                print(name, which, json.dumps(both[which])[:400], flush=True)
    if options.docs:
        options.docs.write_text(page(json.loads(data.read_text()), len(names)))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="read and written: OUT.json, and OUT.models.json, the list of models")
    parser.add_argument("--docs", type=Path, help="write the page with the table there")
    parser.add_argument("--only", default="", metavar="REGEX", help="only models whose library/name matches")
    parser.add_argument("--again", default="", metavar="REGEX", help="repeat those whose 'library/name tool' matches")
    parser.add_argument("--renew", action="store_true", help="repeat this package's rows that another commit measured")
    parser.add_argument("--one", metavar="NAME", help="a single model, as library/name")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="shares of each group that go")
    parser.add_argument("--which", choices=("ours", "peer"), help="this package, or Torch-Pruning")
    parser.add_argument("--peer", metavar="PATH", help="where Torch-Pruning is installed; it is then measured too")
    return parser


if __name__ == "__main__":
    main()
