"""What scoring, selecting and masking cost, as ratios taken in one run.

    python -m benchmarks.cost.calls [--models resnet50 vit_base_patch16_224] [--quick] [--rounds 5]
        [--out FILE.json]

``benchmarks/README.md`` says how to read the result.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

import torch_flowprune as fp
from benchmarks.common.measure import Times, alternating, forget_peak, memory
from benchmarks.common.page import shown, table, wrapped
from benchmarks.common.record import ROOT, begun, keep, steady
from torch_flowprune.inputs.named_parameters.parameters import prunable
from torch_flowprune.scoring import measure_lookup
from torch_flowprune.scoring.candidates import parameter_candidates
from torch_flowprune.scoring.evaluation import evaluate

COMMAND = "python -m benchmarks.cost.calls"
GRANULARITIES = ("weight", "filter", "2:4")
SPARSITY = 0.9
QUICK = "small"
"""The model of ``--quick``: a small convolutional net, for the tests."""

Batches = list[tuple[Tensor, Tensor]]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    steady(options.threads)
    if options.memory_of:
        print(json.dumps(memory_of(*options.memory_of)))
        return {}
    names, rounds, batches = ([QUICK], 2, 2) if options.quick else (options.models, options.rounds, options.batches)
    found = {**begun(COMMAND, arguments, threads=options.threads), "models": {}}
    for name in names:
        found["models"][name] = cost(name, rounds, batches, options.threads)
    text = report(found)
    print(text)
    keep(found, options.out)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="What scoring, selecting and masking cost.")
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_base_patch16_224"], help="timm models")
    parser.add_argument(
        "--quick", action="store_true", help="a small net, two rounds: shows that everything runs, measures nothing"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each thing is timed")
    parser.add_argument("--batches", type=int, default=4, help="how many batches of 8 images are scored over")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; one gives the steadiest ratios on a busy machine"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--memory-of", nargs=2, metavar=("WORK", "MODEL"), help=argparse.SUPPRESS)
    return parser


def cost(name: str, rounds: int, batches: int, threads: int) -> dict[str, Any]:
    """Everything about one model."""
    model, data = build(name, batches)
    return {
        "weights": sum(weight.numel() for weight in weights_of(model)),
        "tensors": len(weights_of(model)),
        "batches": f"{batches} of {' x '.join(map(str, data[0][0].shape))}",
        "scoring": scoring(model, data, rounds),
        "selection": selection(model, rounds),
        "memory": {work: _in_fresh_process(work, name, threads) for work in PRUNERS},
    }


# ------------------------------------------------------------------------------------------------- models and data


def build(name: str, batches: int) -> tuple[nn.Module, Batches]:
    """A model with its own random weights, and image batches of 64 x 64 pixels."""
    torch.manual_seed(0)
    if name == QUICK:
        convolutions = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)), _data(
            batches, size=2, pixels=16
        )
    timm = importlib.import_module("timm")
    try:
        model = timm.create_model(name, num_classes=10, img_size=64)
    except TypeError:
        model = timm.create_model(name, num_classes=10)
    return model, _data(batches, size=8, pixels=64)


def _data(batches: int, size: int, pixels: int) -> Batches:
    return [(torch.randn(size, 3, pixels, pixels), torch.randint(10, (size,))) for _ in range(batches)]


def weights_of(model: nn.Module) -> list[Tensor]:
    """What is pruned unless told otherwise."""
    return [target.parameter.detach() for target in prunable(model)]


# ------------------------------------------------------------------------------------------------- scoring


def scoring(model: nn.Module, data: Batches, rounds: int) -> dict[str, Any]:
    """Each flow against a forward+backward over the same batches, and each formula on its flow by granularity."""
    theta0 = {name: value.clone() for name, value in model.state_dict().items()}
    needed = {
        name: tuple(kind for kind in measure_lookup.needs(name) if kind not in ("theta", "theta0", "generator"))
        for name in fp.MEASURES
    }
    flows = {", ".join(needs) or "theta": needs for needs in needed.values()}
    works: dict[str, Callable[[], Callable[[], object]]] = {
        "forward+backward": lambda: lambda: _forward_backward(model, data)
    }
    for label, needs in flows.items():
        works[label] = lambda needs=needs: lambda: fp.flow(model, data, needs=needs, theta0=theta0, progress=False)  # type: ignore[misc]
    together = tuple({need for needs in needed.values() for need in needs} - {"g2_sample", "diagH"})
    works["all of these at once, but g2_sample"] = lambda: lambda: fp.flow(model, data, needs=together, progress=False)
    for work in works.values():
        work()()
    times = alternating(works, rounds)
    everything = fp.flow(model, data, needs=(*together, "g2_sample", "diagH"), probes=2, theta0=theta0, progress=False)
    base = times["forward+backward"].median
    formulas = {granularity: _formulas(model, everything, granularity, rounds) for granularity in GRANULARITIES}
    return {
        "flows": {label: {**taken.to_dict(), "ratio": taken.median / base} for label, taken in times.items()},
        "measures": {
            name: {
                granularity: {
                    **taken[name].to_dict(),
                    "ratio": (times[", ".join(needed[name]) or "theta"].median + taken[name].median) / base,
                }
                for granularity, taken in formulas.items()
            }
            for name in fp.MEASURES
        },
    }


def _forward_backward(model: nn.Module, data: Batches) -> None:
    model.eval()
    for images, targets in data:
        functional.cross_entropy(model(images), targets).backward()
    model.zero_grad()


def _formulas(model: nn.Module, point: fp.Flow, granularity: str, rounds: int) -> dict[str, Times]:
    cuts = parameter_candidates(model, granularity)
    works = {
        name: lambda measure=measure: lambda: evaluate(point, measure, cuts, granularity)
        for name, measure in fp.MEASURES.items()
    }
    return alternating(works, rounds)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- selection and masks


def _ours(model: nn.Module) -> None:
    fp.global_prune(model, "magnitude", SPARSITY)


def _torch(model: nn.Module) -> None:
    pairs = [target.owners[0] for target in prunable(model)]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=SPARSITY)


PRUNERS: dict[str, Callable[[nn.Module], None]] = {"global_prune": _ours, "prune.global_unstructured": _torch}


def selection(model: nn.Module, rounds: int) -> dict[str, Any]:
    """Magnitude of single weights, 90 % pruned.

    Scores, selection and masks on the model, against torch and one read of the weights.
    """

    def pruning(run: Callable[[nn.Module], None]) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            fresh = copy.deepcopy(model)
            return lambda: run(fresh)

        return prepare

    works = {name: pruning(run) for name, run in PRUNERS.items()}
    works["one read of the weights"] = lambda: lambda: [weight.sum() for weight in weights_of(model)]
    for work in works.values():
        work()()
    times = alternating(works, rounds)
    ours = times["global_prune"].median
    return {name: {**taken.to_dict(), "times ours": taken.median / ours} for name, taken in times.items()}


def _in_fresh_process(work: str, name: str, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cost.calls", "--threads", str(threads), "--memory-of", work, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {work} on {name} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory_of(work: str, name: str) -> dict[str, float]:
    """Peak extra memory of one prune and what it leaves behind, in bytes and in multiples of the weights' bytes."""
    PRUNERS[work](build(QUICK, 1)[0])  # what a first call loads is not this call's
    gc.collect()
    model, _ = build(name, 1)
    weights = sum(weight.nbytes for weight in weights_of(model))
    gc.collect()
    held_before, _ = _tensor_bytes(), forget_peak()
    resident, _ = memory()
    PRUNERS[work](model)
    _, peak = memory()
    gc.collect()
    held = _tensor_bytes() - held_before
    return {
        "weights": weights,
        "peak": peak - resident,
        "held": held,
        "peak ratio": (peak - resident) / weights,
        "held ratio": held / weights,
    }


def _tensor_bytes() -> int:
    """Bytes of every tensor storage this process holds, each once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors: Iterable[Tensor] = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return sum(
        {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}.values()
    )


# ------------------------------------------------------------------------------------------------- the tables


def report(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        shown(found["command"]),
        "",
        (
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['threads']} "
            "thread(s);"
        ),
        wrapped(f"{versions}; commit {machine['commit']}."),
    ]
    for name, result in found["models"].items():
        lines += [
            "",
            (
                f"### {name}: {result['weights']:,} prunable weights in {result['tensors']} tensors; data: "
                f"{result['batches']}"
            ),
            "",
        ]
        lines += [
            *_selection_table(result),
            "",
            *_flow_table(result["scoring"]["flows"]),
            "",
            *_measure_table(result["scoring"]["measures"]),
        ]
    return "\n".join(lines)


def _seconds(taken: dict[str, Any]) -> list[str]:
    return [f"{taken['median']:.3g}", f"{taken['min']:.3g}", f"{taken['spread']:.0%}"]


def _selection_table(result: dict[str, Any]) -> list[str]:
    rows = []
    for work, taken in result["selection"].items():
        memory = result["memory"].get(work)
        extra = [f"{memory['peak ratio']:.2f}", f"{memory['held ratio']:.2f}"] if memory else ["", ""]
        rows.append([work, *_seconds(taken), f"{taken['times ours']:.3g}", *extra])
    return table(
        [
            "magnitude, single weights, 90 %",
            "median s",
            "min s",
            "spread",
            "times ours",
            "peak extra / weights",
            "held after / weights",
        ],
        rows,
    )


def _flow_table(flows: dict[str, Any]) -> list[str]:
    rows = [[label, *_seconds(taken), f"{taken['ratio']:.2f}"] for label, taken in flows.items()]
    return table(["flow", "median s", "min s", "spread", "of forward+backward"], rows)


def _measure_table(scores: dict[str, Any]) -> list[str]:
    rows = [
        [f"`{name}`", *(f"{taken['ratio']:.2f} ({taken['median'] * 1e3:.0f})" for taken in by.values())]
        for name, by in scores.items()
    ]
    return table(["measure: of forward+backward (formula, ms)", *GRANULARITIES], rows)


if __name__ == "__main__":
    main()
