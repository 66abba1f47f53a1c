"""The goals of cost, each measured beside its peer in one run: met or missed.

    python -m benchmarks.cost.goals [--large] [--quick] [--only ROW ...] [--readme]
        [--out benchmarks/results/cost/goals.json]

``benchmarks/README.md`` says how to read the result. ``--large`` adds the model of 1.3 B weights, which takes 17 GiB
and a minute or two.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.profiler import ProfilerActivity, profile

import torch_flowprune as fp
from benchmarks.common.measure import Times, alternating, forget_peak, memory
from benchmarks.common.page import into_page, shown, table, wrapped
from benchmarks.common.record import README, RESULTS, ROOT, Row, begun, keep, steady
from benchmarks.cost.calls import SPARSITY, _ours, _tensor_bytes, _torch, build, weights_of
from torch_flowprune.inputs.named_parameters.parameters import prunable

COMMAND = "python -m benchmarks.cost.goals"
MARKS = ("<!-- table of python -m benchmarks.cost.goals -->", "<!-- end of table -->")


@dataclass(frozen=True)
class Scale:
    """How much of it: the whole, or as little as shows that it runs."""

    pruned: tuple[str, ...] = ("resnet50", "vit_large_patch16_224")
    batched: str = "vit_large_patch16_224"
    trained: tuple[str, ...] = ("resnet50", "vit_small_patch16_224")
    widths: tuple[tuple[int, int], ...] = ((384, 6), (768, 14), (1024, 24))
    large: tuple[int, int] = (2048, 24)
    vocabulary: int = 50_257
    rounds: int = 5
    batch: int = 32
    pixels: int = 224


QUICK = Scale(("small",), "small", ("small",), ((16, 1), (32, 2)), (32, 2), vocabulary=64, rounds=2, batch=2, pixels=16)


# ------------------------------------------------------------------------------------------------- magnitude: time,
# memory, calls


def magnitude(scale: Scale) -> list[Row]:
    """Scores, selection and masks on the model against torch's, and against one read of the weights."""
    rows = []
    for name in scale.pruned:
        model = _model(name)
        ours, theirs, read = _pruning_times(model, scale.rounds)
        times = (
            f"{ours.median:.3g} s against {theirs.median:.3g} s; {ours.median / read.median:.3g} reads of the "
            "weights, where 4 are the floor"
        )
        rows.append(
            Row(
                "magnitude, 90 %",
                name,
                theirs.median / ours.median,
                25,
                "times faster than torch",
                more=True,
                note=times,
            )
        )
        del model
        held, torchs = _fresh("ours", name), _fresh("torch", name)
        theirs_too = f"torch {torchs['peak ratio']:.3g}"
        rows.append(
            Row(
                "peak extra memory, masks included",
                name,
                held["peak ratio"],
                0.6,
                "of the weights' bytes",
                note=theirs_too,
            )
        )
        rows.append(
            Row(
                "held after",
                name,
                held["held ratio"],
                0.3,
                "of the weights' bytes",
                note=f"torch {torchs['held ratio']:.3g}",
            )
        )
    return rows


def _pruning_times(model: nn.Module, rounds: int) -> tuple[Times, Times, Times]:
    def pruning(run: Callable[[nn.Module], None]) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            fresh = copy.deepcopy(model)
            return lambda: run(fresh)

        return prepare

    ours, read = pruning(_ours), lambda: lambda: [weight.sum() for weight in weights_of(model)]
    ours()()
    read()()
    # torch's takes a hundred times as long: two rounds of it beside several of the others
    short = alternating({"ours": ours, "read": read, "again": ours}, max(1, rounds // 2))
    both = alternating({"torch": pruning(_torch), "ours": ours, "read": read}, 2 if rounds > 2 else 1)
    return _joined(short["ours"], short["again"], both["ours"]), both["torch"], _joined(short["read"], both["read"])


def _joined(*times: Times) -> Times:
    return Times(tuple(second for some in times for second in some.seconds))


def _model(name: str) -> nn.Module:
    """With all of its classes and at its own image size: what the goals are stated for."""
    if name == "small":
        return build(name, 1)[0]
    import timm

    torch.manual_seed(0)
    return timm.create_model(name)


def _fresh(who: str, name: str) -> dict[str, float]:
    """In a process of its own, where nothing else has held memory before."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cost.goals", "--alone", who, name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{who} on {name} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def alone(who: str, name: str) -> dict[str, float]:
    """Peak extra memory of one prune and what it leaves behind."""
    run = {"ours": _ours, "torch": _torch}[who]
    run(build("small", 1)[0])  # what a first call loads is not this call's
    model = _model(name)
    weights = sum(weight.nbytes for weight in weights_of(model))
    gc.collect()
    before = _tensor_bytes()
    forget_peak()
    resident, _ = memory()
    run(model)
    _, peak = memory()
    gc.collect()
    return {"peak ratio": (peak - resident) / weights, "held ratio": (_tensor_bytes() - before) / weights}


WORKLESS = {
    *(
        "view",
        "slice",
        "select",
        "detach",
        "detach_",
        "reshape",
        "as_strided",
        "split",
        "split_with_sizes",
        "unsqueeze",
        "expand",
        "view_as",
    ),
    *(
        "unbind",
        "alias",
        "flatten",
        "to",
        "lift_fresh",
        "resolve_conj",
        "resolve_neg",
        "empty",
        "empty_like",
        "new_empty",
        "item",
        "is_nonzero",
    ),
}
"""Operators that compute and move nothing: views, memory, and reading one number (counted apart)."""
WAITING = {"aten::item", "aten::is_nonzero", "aten::_local_scalar_dense", "aten::nonzero"}
"""Those for which the host would wait on an accelerator."""


def calls(scale: Scale) -> list[Row]:
    """What the profiler counts from Python, in all and those that wait."""
    model = _model(scale.batched)
    tensors = len(prunable(model))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        _ours(model)
    found = Counter(event.name for event in profiled.events() if event.cpu_parent is None)
    working = {name: count for name, count in found.items() if name.removeprefix("aten::") not in WORKLESS}
    waiting = sum(count for name, count in found.items() if name in WAITING)
    per = f"{sum(working.values())} for {tensors} tensors; {sum(found.values())} with views and allocation"
    return [
        Row("operator calls", scale.batched, sum(working.values()) / tensors, 6, "a tensor", note=per),
        Row(
            "calls the host waits for",
            scale.batched,
            waiting / tensors,
            0.5,
            "a tensor",
            note=f"{waiting} in all, whatever the number of tensors",
        ),
    ]


# ------------------------------------------------------------------------------------------------- growth, and the
# largest


def transformer(width: int, depth: int, vocabulary: int, tokens: int = 32) -> nn.Module:
    """A GPT-like language model with the configuration class of transformers.

    Its head is not tied, so it is pruned as well.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=tokens,
        n_embd=width,
        n_layer=depth,
        n_head=max(1, width // 64),
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config).eval()


def growth(scale: Scale, larger: bool) -> list[Row]:
    """The exponents of time and peak extra memory over weights, from the smallest to the largest."""
    sizes = [*scale.widths, *([scale.large] if larger else [])]
    points = [_fresh("growth", json.dumps([width, depth, scale.vocabulary])) for width, depth in sizes]
    rows = []
    for what, unit in (("seconds", "s"), ("peak gib", "GiB")):
        exponent = _slope([(math.log(point["weights"]), math.log(max(point[what], 1e-9))) for point in points])
        note = ", ".join(f"{point['weights'] / 1e6:.4g} M: {point[what]:.3g} {unit}" for point in points)
        rows.append(
            Row(
                f"growth of {'time' if unit == 's' else 'peak extra memory'} with the weights",
                "GPT-like",
                exponent,
                1.05,
                "exponent",
                note=note,
            )
        )
    return rows


def alone_growing(width: int, depth: int, vocabulary: int) -> dict[str, float]:
    """Processor time of magnitude pruning, and its peak extra memory."""
    _ours(build("small", 1)[0])  # what a first call loads is not this call's
    model = transformer(width, depth, vocabulary)
    weights = sum(weight.numel() for weight in weights_of(model))
    gc.collect()
    forget_peak()
    resident, _ = memory()
    seconds = [_timed(lambda: _ours(model))]
    peak = memory()[1] - resident
    for _ in range(2):
        fp.remove(model)
        seconds.append(_timed(lambda: _ours(model)))
    return {"weights": weights, "seconds": min(seconds), "peak gib": peak / 2**30}


def _timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _slope(points: list[tuple[float, float]]) -> float:
    xs, ys = zip(*points, strict=True)
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a in xs)


def largest(scale: Scale) -> list[Row]:
    """Magnitude and loss preservation on the largest, each in a process of its own."""
    rows = []
    for method in ("magnitude", "loss_preservation"):
        try:
            found = _fresh(method, json.dumps([*scale.large, scale.vocabulary]))
        except RuntimeError as error:  # killed for its memory, for instance
            rows.append(
                Row(f"{method}, 90 %", "GPT-like", float("inf"), 24, "GiB at most held", note=str(error)[-200:])
            )
            continue
        subject = f"GPT-like, {found['weights'] / 1e9:.3g} B weights"
        note = (
            f"{found['seconds']:.3g} s, of it {found['weights gib']:.3g} GiB the weights; {found['sparsity']:.4f} "
            "pruned"
        )
        rows.append(Row(f"{method}, 90 %", subject, found["peak gib"], 24, "GiB at most held", note=note))
    return rows


def alone_largest(method: str, width: int, depth: int, vocabulary: int) -> dict[str, float]:
    """Time and the most held, of the whole process."""
    model = transformer(width, depth, vocabulary)
    tokens = torch.randint(vocabulary, (1, 32))
    data = None if method == "magnitude" else [{"input_ids": tokens, "labels": tokens}]
    gc.collect()
    forget_peak()
    start = time.perf_counter()
    report = fp.global_prune(model, method, SPARSITY, data=data)
    seconds = time.perf_counter() - start
    weights = sum(weight.nbytes for weight in weights_of(model))
    sizes = {"weights": report.units, "weights gib": weights / 2**30, "peak gib": memory()[1] / 2**30}
    return {**sizes, "seconds": seconds, "sparsity": report.sparsity}


# ------------------------------------------------------------------------------------------------- the masked model at
# work


def masked(scale: Scale) -> list[Row]:
    """A training step and an evaluating forward of the masked model against the dense one, torch's hook beside it."""
    rows = []
    for name in scale.trained:
        dense = _model(name)
        models = {"dense": dense, "ours": copy.deepcopy(dense), "torch": copy.deepcopy(dense)}
        _ours(models["ours"])
        prune_with_masks(models["torch"], fp.masks(models["ours"]))
        images, targets = torch.randn(scale.batch, 3, scale.pixels, scale.pixels), torch.randint(10, (scale.batch,))
        for work, run in {"training step": _step, "eval forward": _forward}.items():
            works = {who: partial(run, model, images, targets) for who, model in models.items()}
            for prepare in works.values():
                prepare()()  # what a first call loads and allocates is not the second's
            times = alternating(works, scale.rounds)
            ours, torchs = (_paired(times[who], times["dense"]) for who in ("ours", "torch"))
            spreads = [f"{times_.to_dict()['spread']:.0%}" for times_ in (ours, torchs)]
            note = (
                f"spread {spreads[0]}; torch's hook {torchs.median:.3f}, spread {spreads[1]}; dense "
                f"{times['dense'].median:.3g} s"
            )
            rows.append(Row(f"masked {work}, batch {scale.batch}", name, ours.median, 1.03, "of dense", note=note))
    return rows


def _paired(times: Times, dense: Times) -> Times:
    """The ratios in each round: what slows one round slows both."""
    return Times(tuple(one / other for one, other in zip(times.seconds, dense.seconds, strict=True)))


def prune_with_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """The same masks by torch's own pruning."""
    for target in prunable(model):
        prune.custom_from_mask(*target.owners[0], masks[target.name])


def _step(model: nn.Module, images: Tensor, targets: Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), targets).backward()
        optimizer.step()

    return step


def _forward(model: nn.Module, images: Tensor, _: Tensor) -> Callable[[], object]:
    model.eval()

    def forward() -> None:
        with torch.no_grad():
            model(images)

    return forward


# ------------------------------------------------------------------------------------------------- the table

ROWS: dict[str, Callable[[Scale], list[Row]]] = {"magnitude": magnitude, "calls": calls, "masked": masked}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    steady(options.threads)
    if options.alone:
        print(json.dumps(_alone(*options.alone)))
        return {}
    scale = QUICK if options.quick else replace(Scale(), **{"pruned": tuple(options.pruned)} if options.pruned else {})
    found = {**begun(COMMAND, arguments, threads=options.threads), "rows": []}
    works = {
        **ROWS,
        "growth": lambda scale: growth(scale, larger=options.large),
        **({"largest": largest} if options.large else {}),
    }
    for name in options.only or works:
        for row in works[name](scale):
            print(" | ".join(row.cells()), flush=True)
            found["rows"].append(row.to_dict())
    keep(found, options.out)
    if options.readme:
        into_page(README, MARKS, "\n\n".join(map(report, _results())))
    return found


def _alone(who: str, what: str) -> dict[str, float]:
    if who in ("ours", "torch"):
        return alone(who, what)
    return alone_growing(*json.loads(what)) if who == "growth" else alone_largest(who, *json.loads(what))


def _results() -> list[dict[str, Any]]:
    """Every result kept that has such rows, whichever benchmark wrote it."""
    kept = [json.loads(file.read_text()) for file in sorted((RESULTS / "cost").glob("*.json"))]
    return [
        found
        for found in kept
        if isinstance(found, dict) and isinstance(rows := found.get("rows"), list) and rows and "met" in rows[0]
    ]


def report(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine = found["environment"]
    rows = [Row.from_dict(row).cells() for row in found["rows"]]
    where = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['threads']} thread(s)"
    )
    lines = [
        shown(found["command"]),
        "",
        wrapped(f"{where}; torch {machine['versions']['torch']}; commit {machine['commit']}."),
        "",
    ]
    return "\n".join([*lines, *table(["work", "on", "goal", "measured", "", "beside it"], rows)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="The goals of cost, each measured: met or missed.")
    parser.add_argument("--large", action="store_true", help="also the model of 1.3 B weights: 17 GiB, a minute or two")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, one round: shows that everything runs, measures nothing"
    )
    parser.add_argument("--only", nargs="+", choices=[*ROWS, "growth", "largest"], help="some of the rows")
    parser.add_argument(
        "--pruned", nargs="+", metavar="MODEL", help="timm models to prune; torch's side of the large ViT takes 19 GiB"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; one gives the steadiest ratios on a busy machine"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--readme", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--alone", nargs=2, metavar=("WHO", "MODEL"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
