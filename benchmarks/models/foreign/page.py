"""The part of the coverage page with the models of other libraries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks.common.page import shown, table, wrapped
from benchmarks.models.foreign.life import AMOUNT, EQUAL, LIMIT

MARKS = ("<!-- foreign: begin -->", "<!-- foreign: end -->")
COMMAND = "python -m benchmarks.models.foreign --docs docs/results/coverage.md"
PACKAGES = (
    "diffusers segmentation-models-pytorch torchaudio ultralytics open-clip-torch monai pytorchcv "
    "speechbrain vit-pytorch x-transformers denoising-diffusion-pytorch"
)
STAGES = {
    "prune": "pruned", "shrink": "shrunk", "equal": "equal", "again": "pruned and shrunk again",
    "saved": "saved and loaded", "onnx": "ONNX",
}  # fmt: skip
COLUMNS = ["model", "prunable", "equal", "became", "left", "again", "saved", "ONNX", "seconds"]
HEAD = f"""## Models of other libraries

Small models with random weights, of libraries of the registry and of torch's own modules, each through a whole life in
one process with a limit of {LIMIT} s of processor time: `global_prune(model, "magnitude", {AMOUNT},
granularity="channel", example_inputs=x)`, `shrink`, a step of training, pruned and shrunk again, `save_pruned` and
`load_pruned` into a new model, `export` to ONNX.

- **equal**: the outputs of the masked and the shrunk model, for another batch size and for another resolution or length
  (where the model takes one), differ by less than {EQUAL["float64"]:.0e} of the largest in float64, or
  {EQUAL["float32"]:.0e} in float32 where the model's own code casts to that. Dropout that a model leaves on in eval
  mode is off for both.
- *prunable*: output channels of linear layers and convolutions that belong to a removable group / all of them.
- *became*: how many modules that spell out a size have an attribute set, have a written module in their place, or
  another number in their code. None is replaced by a graph.
- *left*: parameters of the smaller model / of the model. *seconds*: to prune and to shrink, the proof included, on a
  busy machine.
- *dense too*: the unpruned model cannot be exported either."""


def section(data: Mapping[str, Any], known: int) -> str:
    results = {name: one for name, one in data["results"].items() if one.get("stage") != "build"}
    versions = ", ".join(f"{name} {version}" for name, version in data["environment"]["versions"].items())
    parts = [
        HEAD,
        f"{counts(results)} {len(results)} of {known} models were run.",
        shown(f"pip install --no-deps {PACKAGES}") + "\n" + shown(COMMAND),
        f"{versions}; {data['environment']['processor']}, one thread.",
        "\n".join(
            table(["model", "prunable", "equal", "became", "left", "again", "saved", "ONNX", "seconds"], rows(results))
        ),
        "### What failed",
        "\n".join(reasons(results)) or "Nothing.",
    ]
    return wrapped("\n\n".join(parts))


def counts(results: Mapping[str, Any]) -> str:
    passed = Counter(
        stage
        for one in results.values()
        for stage in STAGES
        if stage in one.get("seconds", {}) and stage not in one["errors"]
    )
    said = ", ".join(f"{words} {passed[stage]}" for stage, words in STAGES.items())
    return f"Of {len(results)} models: {said}."


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    return [row(name, one) for name, one in sorted(results.items())]


def row(name: str, one: Mapping[str, Any]) -> list[str]:
    facts, errors, seconds = one.get("facts", {}), one.get("errors", {}), one.get("seconds", {})

    def cell(stage: str) -> str:
        if stage in errors:
            return "**no**"
        return "" if stage not in seconds else "dense too" if stage in facts else "yes"

    took = seconds.get("prune", 0) + seconds.get("shrink", 0)
    share = f"{facts['prunable']:.2f}" if "prunable" in facts else ""
    left = f"{facts['left']:.2f}" if "left" in facts else ""
    equal = cell("equal") or ("**no**" if errors else "")
    return [
        name,
        share,
        equal,
        became(facts.get("became", {})),
        left,
        cell("again"),
        cell("saved"),
        cell("onnx"),
        f"{took:.0f}",
    ]


def became(kinds: Mapping[str, Mapping[str, int]]) -> str:
    return ", ".join(f"{kind} {sum(classes.values())}" for kind, classes in kinds.items()) or "none"


def reasons(results: Mapping[str, Any]) -> list[str]:
    """One line each, as it was raised."""
    out = []
    for name, one in sorted(results.items()):
        for stage, error in one.get("errors", {}).items():
            line = " ".join(error.split())[:260].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
            out.append(f"- {name}, {stage}: {line}")
        if "died" in one:
            out.append(f"- {name}: over the limit in {one.get('stage')} ({one['died']})")
    return out
