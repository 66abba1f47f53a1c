"""What leaving out whole blocks does to latency, beside channels of as many parameters.

    python -m benchmarks.cost.depth --out benchmarks/results/cost/depth.json --docs

A share of the residual branches goes by magnitude; of a second model channels go until as many parameters are left. The
dense model and both smaller ones answer the same input in turn, in inference mode. With one thread it is processor
time, which other work on the machine adds little to. Weights are random: latency does not depend on them, denormal
numbers being flushed to zero.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_flowprune as fp
from benchmarks.common.measure import alternating
from benchmarks.common.page import shown, table, wrapped
from benchmarks.common.record import ROOT, begun, deliver, steady
from benchmarks.cost.latency import QUICK, answer, clock_of, flops, where

COMMAND = "python -m benchmarks.cost.depth"
PAGE = ROOT / "docs" / "guide" / "structured.md"
MARKS = ("<!-- table of python -m benchmarks.cost.depth -->", "<!-- end of the table of depth -->")
LLAMA = "Llama, 8 layers"
MODELS = ("resnet50", "vit_small_patch16_224", LLAMA)
SHARES = (0.25, 0.5)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    steady(options.threads)
    names, rounds = ([QUICK], 3) if options.quick else (options.models, options.rounds)
    settings = {"threads": options.threads, "batch": options.batch, "clock": clock_of(options.threads).__name__}
    found: dict[str, Any] = {**begun(COMMAND, arguments), "settings": settings, "models": {}}
    for name in names:
        found["models"][name] = compared(name, options.batch, rounds, options.threads)
        print(name, json.dumps(found["models"][name]), file=sys.stderr)
    deliver(found, report(found), options.out, PAGE if options.docs else None, MARKS)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Latency without blocks, and with fewer channels.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm models, or 'Llama, 8 layers'")
    parser.add_argument("--batch", type=int, default=1, help="samples that are answered at once")
    parser.add_argument("--rounds", type=int, default=21, help="how often each model answers")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument(
        "--quick", action="store_true", help="a small net, three rounds: shows that everything runs, measures nothing"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/guide/structured.md")
    return parser


class Residual(nn.Module):
    """A small net of four branches, for the tests."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.last(x)


class Logits(nn.Module):
    """A language model as one function of its tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(input_ids=tokens, use_cache=False).logits


def built(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """A model, and a batch for it."""
    torch.manual_seed(0)
    if name == QUICK:
        return Residual().eval(), torch.randn(batch, 8)
    if name == LLAMA:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
        )
        return Logits(LlamaForCausalLM(config)).eval(), torch.randint(0, 1000, (batch, 128))
    import timm

    model = timm.create_model(name).eval()
    return model, torch.randn(batch, *model.default_cfg["input_size"])


def compared(name: str, batch: int, rounds: int, threads: int) -> dict[str, Any]:
    """One model, without a share of its blocks, and with channels of as many parameters left."""
    dense, x = built(name, batch)
    models = {"dense": dense}
    for share in SHARES:
        models[f"{share:.0%} of the blocks"] = shallow = smaller(name, granularity="block", sparsity=share)
        models[f"{share:.0%}: channels"] = smaller(
            name, granularity="channel", scope="layer", at_most={"parameters": parameters_of(shallow)}
        )
    for model in models.values():  # what a first run chooses and lays out is done
        answer(model, x)
    works = {kind: lambda one=one: lambda: answer(one, x) for kind, one in models.items()}
    times = alternating(works, rounds, clock_of(threads))
    return {
        kind: {"parameters": parameters_of(one), "flops": flops(one, x), "seconds": times[kind].to_dict()}
        for kind, one in models.items()
    }


def smaller(name: str, **goal: Any) -> nn.Module:
    model, example = built(name, 2)
    fp.global_prune(model, "magnitude", example_inputs=example, **goal)
    return fp.shrink(model, example, verify=False)  # tests of the package prove that they are equal


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def report(found: dict[str, Any]) -> str:
    head = ["model", "removed", "parameters", "FLOPs", "latency", "ms (spread)"]
    rows = [_row(name, kind, models) for name, models in found["models"].items() for kind in models]
    told = wrapped(where(found, "; medians, the spread of the runs in brackets"))
    return "\n".join([shown(found["command"]), "", told, "", *table(head, rows)])


def _row(name: str, kind: str, models: dict[str, Any]) -> list[str]:
    dense, one = models["dense"], models[kind]
    removed = {"dense": "nothing"}.get(kind, kind.replace(": channels", ": as many parameters in channels"))
    shares = (one[what] / dense[what] for what in ("parameters", "flops"))
    seconds = one["seconds"]
    latency = seconds["median"] / dense["seconds"]["median"]
    return [
        name,
        removed,
        *(f"{share:.0%}" for share in shares),
        f"{latency:.0%}",
        f"{seconds['median'] * 1e3:.3g} ({seconds['spread']:.0%})",
    ]


if __name__ == "__main__":
    main()
