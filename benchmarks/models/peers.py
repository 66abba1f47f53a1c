"""Half of the channels of small nets, by this package, by Torch-Pruning and by torch.nn.utils.prune, side by side.

    python -m benchmarks.models.peers [--out FILE.json] [--docs docs/results/how_it_compares.md]

Torch-Pruning has to be installed where this runs. Each net is built anew for each library.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

import torch_flowprune as fp
from benchmarks.common.measure import environment
from benchmarks.common.page import shown, table, wrapped
from benchmarks.common.record import RESULTS, steady
from benchmarks.models.situations import SITUATIONS, built

COMMAND = "python -m benchmarks.models.peers"
SHARE = 0.5
OUTPUTS = ("out", "more")
"""Layers that the user reads, told to those who have to be told."""


def this_package(name: str) -> dict[str, Any]:
    """Equal where the small model gives what the masked one gives, at another batch size too, and trains."""
    net, inputs = built(name)
    before, example = _count(net), inputs if len(inputs) > 1 else inputs[0]
    fp.global_prune(net, "magnitude", SHARE, granularity="channel", example_inputs=example)
    small = fp.shrink(net, example)
    for given in (inputs, tuple(torch.cat([x, x[:1]]) for x in inputs)):
        _check_near(tree_leaves(net(*given)), tree_leaves(small(*given)))
    _train(small, inputs)
    return {"state": "equal", "removed": 1 - _count(small) / before}


def torch_pruning(name: str) -> dict[str, Any]:
    """By the recipe of its README: it promises a model that runs, which is what is tried."""
    tp = importlib.import_module("torch_pruning")
    net, inputs = built(name)
    before, shapes = _count(net), [one.shape for one in tree_leaves(net(*inputs))]
    ignored = [getattr(net, layer) for layer in OUTPUTS if hasattr(net, layer)]
    importance = tp.importance.GroupMagnitudeImportance()
    words = {"pruning_ratio": SHARE, "ignored_layers": ignored, "global_pruning": True}
    tp.pruner.BasePruner(net, inputs, importance, **words).step()
    if [one.shape for one in tree_leaves(net(*inputs))] != shapes:
        raise ValueError("outputs of another shape")
    _train(net, inputs)
    removed = 1 - _count(net) / before
    return {"state": "runs" if removed > 0.01 else "nothing removed", "removed": removed}


def torchs_prune(name: str) -> dict[str, Any]:
    """Rows of every layer by their norm: they are zero and stay there."""
    net, inputs = built(name)
    before = _count(net)
    for key, layer in net.named_modules():
        if key not in OUTPUTS and isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            prune.ln_structured(layer, "weight", SHARE, 2, 0)
            prune.remove(layer, "weight")
    net(*inputs)
    _train(net, inputs)
    return {"state": "runs", "removed": 1 - _count(net) / before}


LIBRARIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "this package": this_package,
    "Torch-Pruning": torch_pruning,
    "torch.nn.utils.prune": torchs_prune,
}


def tried(library: str, name: str) -> dict[str, Any]:
    """What became of one net, an error too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LIBRARIES[library](name)
    except Exception as error:
        refused = library == "this package" and isinstance(error, (fp.ShrinkError, ValueError))
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        return {"state": "refused" if refused else "error", "said": said}


def _count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _train(net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    net.train()
    torch.stack([one.square().mean() for one in tree_leaves(net(*inputs))]).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()


def _check_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
            raise AssertionError(f"outputs differ by {(a - b).abs().max():.1e}")


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    steady(1)
    names = [name for name in SITUATIONS if options.only in name]
    results = {name: {library: tried(library, name) for library in LIBRARIES} for name in names}
    peer = importlib.metadata.version("torch-pruning")
    record = {"environment": environment(), "torch_pruning": peer, "results": results}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.docs:
        options.docs.write_text(page(record), encoding="utf-8")
    for library, counts in summary(results).items():
        print(f"{library}: {', '.join(f'{count} {state}' for state, count in counts.items())}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only the nets whose name has this in it")
    parser.add_argument("--out", type=Path, default=RESULTS / "models" / "peers.json", help="the results as JSON")
    parser.add_argument("--docs", type=Path, default=None, help="write the page there")
    return parser


def summary(results: dict[str, Any]) -> dict[str, Counter[str]]:
    """How many nets came to which end, by library."""
    return {library: Counter(row[library]["state"] for row in results.values()) for library in LIBRARIES}


def page(record: dict[str, Any]) -> str:
    """The page of the documentation."""
    results = record["results"]
    rows = [[name, *(_cell(row[library]) for library in LIBRARIES)] for name, row in results.items()]
    said = [
        f"- {name}, {library}: {row[library]['said']}".replace("<", "&lt;").replace("|", "\\|")
        for name, row in results.items()
        for library in LIBRARIES
        if "said" in row[library]
    ]
    counts = [
        f"{library}: {', '.join(f'{count} {state}' for state, count in one.most_common())}"
        for library, one in summary(results).items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in record["environment"]["versions"].items())
    return wrapped(
        _PAGE.format(
            count=len(results),
            counts=". ".join(counts),
            command=shown(f"{COMMAND} --docs docs/results/how_it_compares.md"),
            versions=f"{versions}, torch-pruning {record['torch_pruning']}",
            ahead=_ahead(results, "this package", "Torch-Pruning"),
            behind=_ahead(results, "Torch-Pruning", "this package"),
            rows="\n".join(table(["net", *LIBRARIES], rows)),
            said="\n".join(said) or "Nothing.",
        )
    )


def _ahead(results: dict[str, Any], one: str, other: str) -> str:
    """The nets of which one removes more than the other by five points, or that it alone gets through."""
    shares = {name: [row[library].get("removed", 0.0) for library in (one, other)] for name, row in results.items()}
    found = [f"{name} ({a:.0%}, {b:.0%})" for name, (a, b) in shares.items() if a > b + 0.05]
    return ", ".join(found) or "none"


def _cell(outcome: dict[str, Any]) -> str:
    if "said" in outcome:
        return f"**{outcome['state']}**"
    return f"{outcome['state']}, {outcome['removed']:.0%} removed"


_PAGE = """# How it compares

This page compares libraries only on what was measured here, side by side. Other libraries are good at things that are
not on this page.

## Which networks can be pruned

{count} small networks, each with one thing in it that a library must understand to remove channels. Half of the
channels were requested, by magnitude, in one call. The only information about the network was which layers give the
outputs. *Equal* means that the smaller model computes what the masked one computes, also for another batch size, and
trains. *Runs* means that the result has outputs of the right shapes, and trains: Torch-Pruning has no masked model to
be equal to, and torch's own pruning sets rows to zero and removes nothing. Torch-Pruning can be told about attention
heads and positions by hand; here no library was. The authors of this package wrote the networks for this page.

{counts}.

{command}

{versions}.

{rows}

The table shows the fraction of a network that was removed. It depends on what each library counts as half: this package
removes half of all removable units, the lowest over all layers.

This package is ahead by more than five points (its fraction, Torch-Pruning's; 0 for an error) on: {ahead}.

Torch-Pruning is ahead by more than five points (its fraction, this package's) on: {behind}. In these runs, this package
kept channels that pass a layer norm, a mean over channels, or a sum with channels that cannot be removed, as zeros
would not be equal to removal there. Torch-Pruning removes them, and the result computes something else until it is
trained.

The errors and refusals:

{said}

## Other comparisons

- Whole models: [coverage](coverage.md) has every tested architecture of timm and torchvision, beside Torch-Pruning:
  which run, which are equal, and how long reading the model takes.
- Masks: [the host page](../explanation/host.md#what-carries-the-mask) has what happens to a mask when a model is
  copied, averaged, pickled, loaded, cast, compiled or trained, for this package's masks, torch's and two other ways to
  carry one, and the cost of a training step with each. There torch's masks are faster.
- Scoring: `benchmarks/README.md` has the times of scoring sweeps beside the code of the paper, Torch-Pruning's Taylor
  scores and the loop of the Synaptic Flow repository.

## What was not measured

Accuracy after fine-tuning beside another library's at the same cost, the quantisation and distillation that other
libraries include, and GPUs.
"""


if __name__ == "__main__":
    main()
