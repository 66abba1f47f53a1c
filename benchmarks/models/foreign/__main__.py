"""Models of other libraries, with random weights, through a whole life.

    python -m benchmarks.models.foreign                          # all; resumes where it stopped
    python -m benchmarks.models.foreign --only diffusers --again 'shrink|equal'
    python -m benchmarks.models.foreign --docs docs/results/coverage.md

A library that is not installed is left out. Every model has a process of its own, one thread, and a limit of time.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measure import commit, environment
from benchmarks.common.page import into_page
from benchmarks.common.record import RESULTS
from benchmarks.models.coverage.__main__ import in_process
from benchmarks.models.foreign import generative, language, pictures, plain, sound, vision
from benchmarks.models.foreign.case import CASES
from benchmarks.models.foreign.life import life
from benchmarks.models.foreign.page import MARKS, section

MODULES = {
    "smp": "segmentation_models_pytorch", "monai": "monai.networks.nets", "pytorchcv": "pytorchcv.model_provider",
    "plain": "torch",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for catalogue in (plain, vision, language, pictures, sound, generative):
        catalogue.register()
    held: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"results": {}}
    for name in [name for name in CASES if is_due(name, held["results"].get(name), options)]:
        one = {**in_process(life(name, options.stages)), "commit": commit()}
        held["results"][name] = one
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"environment": environment(), "results": held["results"]}, indent=1) + "\n")
        print(f"{name}: {status(one)} {sum(one.get('seconds', {}).values()):.0f} s", flush=True)
    if options.docs:
        into_page(options.docs, MARKS, section(json.loads(options.out.read_text()), len(CASES)))


def is_due(name: str, found: dict[str, Any] | None, options: argparse.Namespace) -> bool:
    if not re.search(options.only, name) or not is_installed(name.split("/", maxsplit=1)[0]):
        return False
    return found is None or bool(options.again and re.search(options.again, f"{name} {status(found)}"))


def is_installed(library: str) -> bool:
    """Imported where it is, so that the processes need not."""
    try:
        importlib.import_module(MODULES.get(library, library))
    except ImportError:
        return False
    gc.collect()
    gc.freeze()
    return True


def status(one: dict[str, Any]) -> str:
    if one.get("errors"):
        return "; ".join(f"{stage}: {' '.join(error.split())[:230]}" for stage, error in one["errors"].items())
    return one.get("died") or ("ok" if one.get("stage") == "done" else f"stopped in {one.get('stage')}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.foreign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "models" / "foreign.json", help="read and written")
    parser.add_argument("--docs", type=Path, help="write the table into this page")
    parser.add_argument("--only", default="", metavar="REGEX", help="only models whose library/name matches")
    parser.add_argument("--again", default="", metavar="REGEX", help="repeat those whose 'library/name status' matches")
    parser.add_argument("--stages", default="", metavar="REGEX", help="only these stages of a life")
    return parser


if __name__ == "__main__":
    main()
