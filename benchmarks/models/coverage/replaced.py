"""What becomes of modules whose forward spells out a size, on the models of the list in which a graph stood before.

    python -m benchmarks.models.coverage.replaced --below 35     # models of fewer million parameters; resumes

Half of every group's channels go, and `shrink` proves what is left. Counted by class: modules of which an attribute was
set, that a written module stands for, in whose code another number stands, and that a graph replaced.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_flowprune as fp
from benchmarks.common.measure import commit
from benchmarks.common.record import RESULTS
from benchmarks.models.coverage.models import built
from benchmarks.models.coverage.trial import LIMIT, RATIOS, Ours, timed

KINDS = ("attribute", "written", "number in the code", "graph")
HEAD = """## What became of modules that spell out a size

The models of the list in which `shrink` once put exported graphs (*before*: how many), at 50 % and with the proof that
`shrink` makes. Modules of torch's own classes, which state their sizes, are not counted. *attribute*: one was set;
*written*: a module written for the size stands there; *number*: another number stands in the class's code, in one line
or several. None holds a graph, which takes `graphs=True`.

    python -m benchmarks.models.coverage.replaced --below 35
"""


def became(dense: nn.Module, small: nn.Module) -> dict[str, dict[str, int]]:
    """Kind -> class -> how many modules."""
    change = fp.describe(dense, small)
    own = {path for path, module in dense.named_modules() if not type(module).__module__.startswith("torch.nn")}
    of_kind = {
        "attribute": [path for path in change["attributes"] if path in own and path not in change["code"]],
        "written": change["written"],
        "number in the code": list(change["code"]),
    }
    counts = {kind: Counter(type(dense.get_submodule(p)).__name__ for p in paths) for kind, paths in of_kind.items()}
    return {kind: dict(found) for kind, found in counts.items() if found}


def replaced_in(name: str) -> dict[str, Any]:
    model, x = built(name)
    tool = Ours(model, x)
    tool.build(RATIOS[0])
    try:
        small, seconds = timed(lambda: tool.prune(RATIOS[0]), LIMIT)
    except fp.channels.ShrinkError as error:
        return {"refused": str(error)[:300], "commit": commit()}
    return {"became": became(model, small), "seconds": round(seconds, 2), "commit": commit()}


def section(found: Mapping[str, Any], coverage: Mapping[str, Any]) -> str:
    """The table of a page."""
    lines = ["| model | before | what became of them |", "| --- | ---: | --- |"]
    for name, row in found.items():
        said = [
            f"{kind.split(' ')[0]}: {', '.join(f'{n} {cls}' for cls, n in row['became'][kind].items())}"
            for kind in KINDS
            if kind in row.get("became", {})
        ]
        shown = "; ".join(said) or ("refused" if "refused" in row else "nothing but torch's own layers")
        lines.append(f"| {name.replace('_', chr(92) + '_')} | {graphs_before(coverage, name)} | {shown} |")
    left = [name for name in coverage if graphs_before(coverage, name) and name not in found]
    commits = Counter(row["commit"] for row in found.values())
    rows = ", ".join(f"{one} ({n} rows)" for one, n in commits.most_common())
    return "\n".join([HEAD, *lines, "", f"Commits: {rows}. Not run again: {', '.join(left) or 'none'}."])


def graphs_before(coverage: Mapping[str, Any], name: str) -> int:
    return int(coverage[name].get("ours", {}).get("0.5", {}).get("graphs", 0))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    coverage = json.loads(options.out.with_suffix(".json").read_text())["results"]
    data = options.out.with_suffix(".replaced.json")
    found = json.loads(data.read_text()) if data.exists() else {}
    torch.set_num_threads(1)
    for name in (name for name in coverage if graphs_before(coverage, name) and name not in found):
        if coverage[name]["ours"]["parameters"] < options.below * 1e6:
            found[name] = replaced_in(name)
            data.write_text(json.dumps({n: found[n] for n in coverage if n in found}, indent=1) + "\n")
            print(name, json.dumps(found[name]), flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.coverage.replaced",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--below", type=float, default=1e6, help="only models of fewer million parameters")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "models" / "coverage",
        help="read: OUT.json; written: OUT.replaced.json",
    )
    return parser


if __name__ == "__main__":
    main()
