"""How much faster and smaller a model is once half of its channels are removed: measured, beside what the counts say.

    python -m benchmarks.cost.latency --out benchmarks/results/cost/latency.json --docs

Half of the channels of every coupled group go by magnitude, and the model is shrunk. Latency: the dense, the masked and
the shrunk model answer the same input in turn, in inference mode; with one thread it is processor time, which other
work on the machine adds little to, with more it is wall time. Memory: a fresh process loads the model and answers once;
the rise of its high-water mark is weights and activations together. Weights are random: neither figure depends on them,
denormal numbers being flushed to zero.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import torch_flowprune as fp
from benchmarks.common.measure import alternating, forget_peak, memory
from benchmarks.common.page import shown, table, wrapped
from benchmarks.common.record import ROOT, begun, deliver, steady
from torch_flowprune.channels.shrinking.proof.equivalence import relative_error

COMMAND = "python -m benchmarks.cost.latency"
PAGE = ROOT / "docs" / "guide" / "structured.md"
MARKS = ("<!-- table of python -m benchmarks.cost.latency -->", "<!-- end of table -->")
MODELS = ("resnet50", "mobilenetv2_100", "convnext_atto", "vit_small_patch16_224")
QUICK = "small"
"""The model of ``--quick``: a small convolutional net, for the tests."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    steady(options.threads)
    if options.memory_of:
        print(memory_of(*options.memory_of))
        return {}
    names, rounds, repeats = ([QUICK], 3, 1) if options.quick else (options.models, options.rounds, 3)
    settings = {
        "threads": options.threads,
        "batch": options.batch,
        "share": options.share,
        "clock": clock_of(options.threads).__name__,
    }
    found = {**begun(COMMAND, arguments), "settings": settings, "models": {}}
    for name in names:
        found["models"][name] = compared(name, options.share, options.batch, rounds, repeats, options.threads)
        print(name, json.dumps(found["models"][name]), file=sys.stderr)
    deliver(found, report(found), options.out, PAGE if options.docs else None, MARKS)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Latency and memory before and after shrinking.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm models")
    parser.add_argument("--share", type=float, default=0.5, help="of every group's channels that goes")
    parser.add_argument("--batch", type=int, default=1, help="images that are answered at once")
    parser.add_argument("--rounds", type=int, default=21, help="how often each model answers")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; one gives the steadiest figures on a busy machine"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small net, three rounds: shows that everything runs, measures nothing"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/guide/structured.md")
    parser.add_argument("--memory-of", nargs=3, metavar=("MODULE", "MODEL", "INPUT"), help=argparse.SUPPRESS)
    return parser


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if name == QUICK:
        layers = [
            nn.Conv2d(3, 64, 3),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ]
        return nn.Sequential(*layers, nn.Linear(64, 10)).eval(), (3, 48, 48)
    import timm

    model = timm.create_model(name).eval()
    return model, tuple(model.default_cfg["input_size"])


def compared(name: str, share: float, batch: int, rounds: int, repeats: int, threads: int) -> dict[str, Any]:
    """One model before and after."""
    model, size = built(name)
    example, x = torch.randn(2, *size), torch.randn(batch, *size)
    masked, _ = built(name)
    channels = fp.global_prune(masked, "magnitude", share, granularity="channel", scope="layer", example_inputs=example)
    small = fp.shrink(masked, example)
    models = {"dense": model, "masked": masked, "shrunk": small}
    _, ours, theirs = (answer(one, x) for one in models.values())  # and what a first run chooses and lays out is done
    times = alternating(
        {kind: lambda one=one: lambda: answer(one, x) for kind, one in models.items()}, rounds, clock_of(threads)
    )
    return {
        "channels": channels.sparsity,
        "error": relative_error(ours, theirs),
        "parameters": {kind: sum(p.numel() for p in models[kind].parameters()) for kind in ("dense", "shrunk")},
        "flops": {kind: flops(models[kind], x) for kind in ("dense", "shrunk")},
        "seconds": {kind: taken.to_dict() for kind, taken in times.items()},
        "memory": {kind: in_fresh_process(models[kind], x, threads, repeats) for kind in ("dense", "shrunk")},
    }


def clock_of(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


@torch.inference_mode()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


# -- memory ------------------------------------------


def in_fresh_process(model: nn.Module, x: Tensor, threads: int, repeats: int) -> dict[str, Any]:
    """The least of a few runs: what the allocator keeps besides only adds."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "model.pt", Path(folder) / "input.pt"]
        torch.save(model, files[0])
        torch.save(x, files[1])
        command = [
            sys.executable,
            "-m",
            "benchmarks.cost.latency",
            "--threads",
            str(threads),
            "--memory-of",
            type(model).__module__,
            *map(str, files),
        ]
        runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(repeats)]
    peaks = [int(run.stdout.splitlines()[-1]) for run in runs]
    return {"peak": min(peaks), "spread": (max(peaks) - min(peaks)) / min(peaks), "runs": repeats}


def memory_of(module: str, model: str, x: str) -> int:
    """Bytes by which loading the model and answering once raise the high-water mark.

    ``module`` is where its class is defined.
    """
    importlib.import_module(module)  # what loading imports is no part of the model
    importlib.import_module("torch_flowprune.channels.shrinking.graphs.exported_module")
    answer(built(QUICK)[0], torch.randn(1, 3, 48, 48))
    forget_peak()
    before, _ = memory()
    answer(torch.load(model, weights_only=False), torch.load(x))
    return memory()[1] - before


# -- the table ------------------------------------------


def report(found: dict[str, Any]) -> str:
    head = [
        "model",
        "parameters",
        "FLOPs",
        "latency",
        "dense ms (spread)",
        "shrunk ms (spread)",
        "peak memory",
        "dense MiB",
        "shrunk MiB",
    ]
    rows = [_row(name, result) for name, result in found["models"].items()]
    return "\n".join([shown(found["command"]), "", wrapped(where(found)), "", *table(head, rows)])


def where(found: dict[str, Any], more: str = "") -> str:
    """The sentence above a table: the machine, what was timed, with which versions of what."""
    machine, settings = found["environment"], found["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    kind = "processor time" if settings["clock"] == "process_time" else "wall time"
    return (
        f"{machine['processor']}, {settings['threads']} thread(s), {kind}, batch of {settings['batch']}{more}; "
        f"{versions}; commit {machine['commit']}."
    )


def _row(name: str, result: dict[str, Any]) -> list[str]:
    def share(before: float, after: float) -> str:
        return f"{after / before:.0%}"

    seconds, peaks = result["seconds"], {kind: one["peak"] for kind, one in result["memory"].items()}
    medians = {kind: taken["median"] for kind, taken in seconds.items()}
    return [
        name,
        share(**_ends(result["parameters"])),
        share(**_ends(result["flops"])),
        share(**_ends(medians)),
        *(f"{medians[kind] * 1e3:.3g} ({seconds[kind]['spread']:.0%})" for kind in ("dense", "shrunk")),
        share(**_ends(peaks)),
        *(f"{peaks[kind] / 2**20:.1f}" for kind in ("dense", "shrunk")),
    ]


def _ends(by_kind: dict[str, float]) -> dict[str, float]:
    return {"before": by_kind["dense"], "after": by_kind["shrunk"]}


if __name__ == "__main__":
    main()
