"""What becomes of modules whose forward spells out a size, on the models of the list in which a graph stood before.

    python -m benchmarks.models.coverage.replaced --below 35     # models of fewer million parameters; resumes

Half of every group's channels go, and `shrink` proves what is left. Counted by class: modules of which an attribute was
set, that a written module stands for, and in whose code another number stands. The page of coverage has the table.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_flowprune as fp
from benchmarks.common.measure import commit
from benchmarks.common.record import RESULTS
from benchmarks.models.coverage.models import built
from benchmarks.models.coverage.page import graphs_before
from benchmarks.models.coverage.trial import LIMIT, RATIOS, Ours, timed


def became(dense: nn.Module, small: nn.Module) -> dict[str, dict[str, int]]:
    """Kind -> class -> how many modules."""
    change = fp.describe(dense, small)
    own = {path for path, module in dense.named_modules() if not is_of_torch(module)}
    of_kind = {
        "attribute": [path for path in change["attributes"] if path in own and path not in change["code"]],
        "written": change["written"],
        "number in the code": list(change["code"]),
    }
    counts = {kind: Counter(type(dense.get_submodule(p)).__name__ for p in paths) for kind, paths in of_kind.items()}
    return {kind: dict(found) for kind, found in counts.items() if found}


def is_of_torch(module: nn.Module) -> bool:
    """Whether its class is torch's, or comes of one of torch's layers."""
    return any(kind.__module__.startswith("torch.nn.") and kind is not nn.Module for kind in type(module).__mro__)


def replaced_in(name: str) -> dict[str, Any]:
    model, x = built(name)
    tool = Ours(model, x)
    tool.build(RATIOS[0])
    try:
        small, seconds = timed(lambda: tool.prune(RATIOS[0]), LIMIT)
    except fp.channels.ShrinkError as error:
        return {"refused": str(error)[:300], "commit": commit()}
    return {"became": became(model, small), "seconds": round(seconds, 2), "commit": commit()}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    data = json.loads(options.out.with_suffix(".json").read_text())
    coverage, found = data["results"], data.setdefault("replaced", {})
    torch.set_num_threads(1)
    for name in (name for name in coverage if graphs_before(coverage, name) and name not in found):
        if coverage[name]["ours"]["parameters"] < options.below * 1e6:
            found[name] = replaced_in(name)
            data["replaced"] = {n: found[n] for n in coverage if n in found}
            options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
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
        help="read and written: OUT.json",
    )
    return parser


if __name__ == "__main__":
    main()
