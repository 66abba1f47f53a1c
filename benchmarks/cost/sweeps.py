"""What the sweeps of a flow cost, each against its goal, as ratios of processor time taken in one run.

    python -m benchmarks.cost.sweeps [--models vgg13 mobilenet resnet56 resnet50 vit_small] [--rounds 3] [--quick]
        [--peer DIR] [--torch-pruning DIR] [--synaptic-flow DIR] [--correlations]
        [--out benchmarks/results/cost/sweeps.json]

``--peer`` is a checkout of the paper's own code (flowandprune), ``--torch-pruning`` a folder that Torch-Pruning is
installed in, ``--synaptic-flow`` a checkout of that repository: each is then timed beside ours, on the same model and
samples. ``--correlations`` adds how scores in bfloat16 rank against those in float32. ``benchmarks/cost/notes.md`` says
where the time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import torch_flowprune as fp
from benchmarks.common.measure import alternating
from benchmarks.common.record import Row, begun, keep, steady
from benchmarks.cost import peers
from benchmarks.cost.peers import PAPER, SYNAPTIC_FLOW, TORCH_PRUNING, Batches, Folders, Work
from benchmarks.paper.models import MODELS, build
from torch_flowprune.analysis.rank_correlation import laid_out, spearman
from torch_flowprune.scoring import measure_lookup

COMMAND = "python -m benchmarks.cost.sweeps"
NAMES = ("vgg13", "mobilenet", "resnet56", "resnet50", "vit_small")
CORRELATED = ("resnet18", "resnet50", "vit_small", "trained")
"""With random weights, but for the last: ResNet-20, half as wide, trained on scikit-learn's digits."""
MEMORY = "6GB"
"""Enough for every graph of the table."""

PRODUCTS, PRODUCTS_OF_ONE = 1.08 * 11 / 3, 1.08 * 3
"""Goals of H·g: 8 % above the products that it takes, with the first sweep's made again or its graphs kept."""
SQUARES = {"resnet50": 1.25, "vit_small": 1.25}
"""Goals of squared sample gradients; 1.5 of others, whose convolutions have many positions and few channels."""

Timed = dict[str, float]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    _steady(options.threads)
    found = {**begun(COMMAND, arguments, threads=options.threads), "rows": []}
    folders = Folders(options.peer, options.torch_pruning, options.synaptic_flow)
    for name in ["small"] if options.quick else options.models:
        for rows in (
            partial(scoring, folders=folders),
            partial(products, folders=folders),
            together,
            partial(synaptic, folders=folders),
        ):
            new = rows(name, 2 if options.quick else options.rounds)
            print(*(" | ".join(row.cells()) for row in new), sep="\n", flush=True)
            found["rows"] += [row.to_dict() for row in new]
        keep(found, options.out)
    for name in (["small"] if options.quick else CORRELATED) if options.correlations else []:
        found.setdefault("correlations", {})[name] = new = correlations(name)
        print(name, {kind: f"{value:.4f}" for kind, value in new.items()}, flush=True)
    keep(found, options.out)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="What the sweeps cost.")
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--rounds", type=int, default=3, help="how often each thing is timed")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; one gives the steadiest ratios on a busy machine"
    )
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of the paper's code")
    parser.add_argument("--torch-pruning", type=Path, metavar="DIR", help="where Torch-Pruning is installed")
    parser.add_argument("--synaptic-flow", type=Path, metavar="DIR", help="a checkout of Synaptic Flow's repository")
    parser.add_argument(
        "--correlations", action="store_true", help="rank correlation of scores in bfloat16 with those in float32"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small net: shows that everything runs, measures nothing"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    return parser


def _steady(threads: int) -> None:
    """One thread, no denormals, and an allocator that keeps freed memory (glibc), as torch's does on a GPU.

    Page faults are the system's.
    """
    steady(threads)
    with contextlib.suppress(OSError, AttributeError):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(option, ctypes.c_int(2**31 - 1))


def model_of(name: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """The model with random weights, the shape of a sample and the size of a batch."""
    torch.manual_seed(0)
    if name == "small":
        return build("vgg13", width=0.05), (3, 16, 16), 4
    if name in MODELS:
        return build(name), (3, 32, 32), 16
    if name == "resnet50":
        return importlib.import_module("torchvision").models.resnet50(num_classes=10), (3, 64, 64), 8
    return (
        importlib.import_module("timm").create_model("vit_small_patch16_224", num_classes=10, img_size=64),
        (3, 64, 64),
        8,
    )


def data_of(shape: tuple[int, ...], size: int, batches: int) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(size, *shape), torch.arange(size) % 10) for _ in range(batches)]


def forward_backward(model: nn.Module, data: Batches) -> None:
    model.eval()
    for images, targets in data:
        functional.cross_entropy(model(images), targets).backward()
    model.zero_grad()


def _timed(works: dict[str, Work], rounds: int, base: str, warm: bool = True) -> dict[str, Timed]:
    """Each work's median as a multiple of the base's, with its spread."""
    if warm:
        for work in works.values():
            work()
    times = alternating({name: lambda work=work: work for name, work in works.items()}, rounds, time.process_time)  # type: ignore[misc]
    return {
        name: {
            "measured": taken.median / times[base].median,
            "spread": taken.to_dict()["spread"],
            "seconds": taken.median,
        }
        for name, taken in times.items()
    }


def _row(work: str, model: str, goal: float, taken: Timed, of: str = "forward+backward", beside: str = "") -> Row:
    return Row(
        work,
        model,
        taken["measured"],
        goal,
        f"of {of}",
        note=f"spread {taken['spread']:.0%}, {taken['seconds']:.3g} s{beside}",
    )


@dataclass
class _Beside:
    """Peers that can be timed on a model, and what is said of them."""

    works: dict[str, Work] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, folder: Path | None, make: Callable[[Path], Work]) -> Any:
        """Run it once: one that is not at hand, or that this model is too much for, is named with the reason."""
        if folder is None:
            self.failed[name] = "not at hand"
            return None
        try:
            found = (work := make(folder))()
        except (RuntimeError, NotImplementedError) as error:
            self.failed[name] = f"fails ({str(error).splitlines()[0]})"
            return None
        self.works[name] = work
        return found

    def said(self, taken: dict[str, Timed]) -> str:
        """For the note of a row: the peers as multiples of the same base."""
        times = {name: f"{taken[name]['measured']:.3g}, spread {taken[name]['spread']:.0%}" for name in self.works}
        return "".join(f"; {name} {what}" for name, what in {**times, **self.failed}.items())


def scoring(name: str, rounds: int, folders: Folders) -> list[Row]:
    """Loss preservation and Fisher over 20 batches."""
    model, shape, size = model_of(name)
    data, beside = data_of(shape, min(size, 8), 20), _Beside()
    if name != "vit_small":  # it knows convolutions with a norm each
        beside.add(PAPER, folders.paper, lambda folder: peers.paper_scores(folder, model, data))
    beside.add(TORCH_PRUNING, folders.torch_pruning, lambda folder: peers.taylor(folder, model, data))
    works = {
        "fb": lambda: forward_backward(model, data),
        "scores": lambda: fp.scores(model, ["loss_preservation", "fisher"], data, granularity="filter", progress=False),
    }
    taken = _timed({**works, **beside.works}, rounds, "fb")
    return [
        _row(
            "loss preservation and Fisher, filters, 20 batches", name, 1.05, taken["scores"], beside=beside.said(taken)
        )
    ]


def products(name: str, rounds: int, folders: Folders) -> list[Row]:
    """Exact H·g: over six batches, with the graphs kept and without, and of one batch."""
    model, shape, size = model_of(name)
    data, beside = data_of(shape, size, 6), _Beside()
    beside.add(PAPER, folders.paper, lambda folder: peers.paper_products(folder, model, data))
    several = {
        "fb": lambda: forward_backward(model, data),
        "plain": lambda: fp.flow(model, data, needs=("Hg",), progress=False),
        "kept": lambda: fp.flow(model, data, needs=("Hg",), progress=False, max_memory=MEMORY),
    }
    one = {
        "fb": lambda: forward_backward(model, data[:1]),
        "one": lambda: fp.flow(model, data[0], needs=("Hg",), progress=False),
    }
    taken, single = _timed({**several, **beside.works}, rounds, "fb"), _timed(one, max(rounds, 2 * rounds - 1), "fb")
    rows = [
        _row("H·g, six batches", name, PRODUCTS, taken["plain"], beside=beside.said(taken)),
        _row(f"H·g, six batches, max_memory='{MEMORY}'", name, PRODUCTS, taken["kept"]),
        _row("H·g, one batch", name, PRODUCTS_OF_ONE, single["one"]),
    ]
    for kind in ("plain", "kept") if PAPER in taken else ():
        ratio = {**taken[kind], "measured": taken[kind]["measured"] / taken[PAPER]["measured"]}
        rows.append(_row(f"H·g, six batches ({kind})", name, 1.0, ratio, PAPER))
    return rows


def together(name: str, rounds: int) -> list[Row]:
    """The squares of sample gradients, and every measure from one flow, against the dearest alone.

    Without g2_sample, and with it; without the inputs' moments and probes.
    """
    model, shape, size = model_of(name)
    data = data_of(shape, size, 2)
    kinds = {kind for measure in fp.MEASURES for kind in measure_lookup.needs(measure)} - {
        "theta",
        "theta0",
        "generator",
        "g2_sample",
        "x2",
        "diagH",
    }

    def flow(*needs: str) -> Callable[[], object]:
        return lambda: fp.flow(model, data, needs=needs, progress=False)

    works = {
        "fb": lambda: forward_backward(model, data),
        "Hg": flow("Hg"),
        "all": flow(*kinds),
        "g2_sample": flow("g", "g2_sample"),
        "every": flow(*kinds, "g2_sample"),
    }
    taken = _timed(works, rounds, "Hg")
    squares = {**taken["g2_sample"], "measured": taken["g2_sample"]["measured"] / taken["fb"]["measured"]}
    dearest = max(taken["Hg"]["measured"], taken["g2_sample"]["measured"])
    every = {**taken["every"], "measured": taken["every"]["measured"] / dearest}
    return [
        _row("g and squared sample gradients", name, SQUARES.get(name, 1.5), squares),
        _row("all of a flow but g2_sample", name, 1.15, taken["all"], "H·g alone"),
        _row("all of a flow", name, 1.15, every, "the dearest alone"),
    ]


def synaptic(name: str, rounds: int, folders: Folders) -> list[Row]:
    """SynFlow round by round, against as many forward+backwards of one sample."""
    if name not in ("resnet50", "small"):
        return []
    model, shape, _ = model_of(name)
    shape, count = ((3, 224, 224), 5) if name == "resnet50" else (shape, 2)
    sample, beside, left = data_of(shape, 1, 1), _Beside(), ""
    if name == "resnet50":
        share = beside.add(
            SYNAPTIC_FLOW, folders.synaptic_flow, lambda folder: peers.synaptic_flow(folder, model, sample, count)
        )
        left = (
            "" if share is None else f" (in float32, which leaves {share:.0%} of the weights where 10% were asked for)"
        )
    works = {
        "fb": lambda: forward_backward(model, sample * count),
        "synflow": lambda: fp.global_prune(
            copy.deepcopy(model), "synflow", 0.9, rounds=count, example_inputs=sample[0][0], progress=False
        ),
        "gradient": lambda: [fp.flow(model, needs=("gR",), example_inputs=sample[0][0]) for _ in range(count)],
    }
    taken = _timed({**works, **beside.works}, rounds, "fb", warm=False)
    each = f"as many forward+backwards of one sample ({count} rounds timed)"
    return [
        _row("SynFlow, rounds", name, 1.6, taken["synflow"], each, beside.said(taken) + left),
        _row("SynFlow, its gradient alone", name, 1.6, taken["gradient"], each),
    ]


def correlations(name: str) -> dict[str, float]:
    """Spearman's rank correlation of scores in bfloat16 with those in float32, of a million weights of all layers."""
    if name == "trained":
        model, data = trained()
    else:
        model, shape, size = model_of(name)
        data = data_of(shape, size, 4)
    kinds = ["loss_preservation", "fisher", "gradient_norm_preservation", "gradient_norm_increase"]
    exact, rough = (fp.scores(model, kinds, data, progress=False, autocast=dtype) for dtype in (None, torch.bfloat16))
    pairs = {kind: [scores[kind].values() for scores in (exact, rough)] for kind in kinds}
    return {
        kind: spearman(*(laid_out(layers, sum(map(torch.numel, layers))) for layers in pair))
        for kind, pair in pairs.items()
    }


def trained(epochs: int = 8) -> tuple[nn.Module, Batches]:
    """A net that has learnt, and held-out data: its gradients are small, and bfloat16 has the more to lose."""
    digits = importlib.import_module("sklearn.datasets").load_digits()
    images = functional.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, size=16).expand(
        -1, 3, -1, -1
    )
    targets = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = build("resnet20", width=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(images[batch]), targets[batch]).backward()
            optimizer.step()
    held_out = [(images[batch], targets[batch]) for batch in torch.arange(1500, len(targets)).split(64)]
    with torch.no_grad():
        right = sum((model.eval()(x).argmax(1) == y).sum().item() for x, y in held_out) / sum(
            len(y) for _, y in held_out
        )
    print(f"trained: {right:.1%} of the held-out digits are right")
    return model, held_out


if __name__ == "__main__":
    main()
