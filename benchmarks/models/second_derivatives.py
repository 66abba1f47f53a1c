"""Second derivatives of every operator that the models of the families call, each held against differences.

    python -m benchmarks.models.second_derivatives [--only REGEX] [--out FILE.json] [--docs PAGE.md]

Each model runs forward once in every mode, and each kind of call that a gradient passes (a function of torch, with its
options, the number of axes and the layouts of its tensors) is put through ``gradgradcheck`` in float64: as torch has
it, and as the sweeps of H·g run it. Then H·g of the whole model is held against a difference of gradients, which looks
at functions written in Python too. What is done is kept (``--work``), so that a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm import tqdm

import torch_flowprune as fp
from benchmarks.common.measure import environment
from benchmarks.common.page import shown, table, wrapped
from benchmarks.common.record import RESULTS, steady
from benchmarks.models import zoo
from torch_flowprune.gradients.operators import twice_differentiable
from torch_flowprune.inputs.data.objective import Objective

COMMAND = "python -m benchmarks.models.second_derivatives"
KINDS = 6
"""Of calls of one function that are checked."""
LARGEST = 30_000
"""Numbers in the tensors of a call that is checked."""
STATES = ("ok", "missing", "wrong", "not checked")
_WIDER = dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double)
MADE = "made/operators/others"
FAMILIES = RESULTS / "models" / "families.json"


class Calls(TorchFunctionMode):
    """Hands on each call that a gradient may pass, with its tensors as they are before it."""

    def __init__(self, note: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, form = tree_flatten((args, kwargs or {}))
        if torch.is_grad_enabled() and any(_is_differentiable(leaf) for leaf in leaves):
            kept = [_copied(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            result = func(*args, **(kwargs or {}))
            if any(_is_differentiable(leaf) for leaf in tree_flatten(result)[0]):
                self.note(func, (kept, form))
            return result
        return func(*args, **(kwargs or {}))


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()


def _copied(tensor: Tensor) -> Tensor:
    """In the same layout."""
    if tensor.numel() > LARGEST:
        return tensor
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    return copy.requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else copy


def kind_of(leaves: list[Any]) -> str:
    """What a second derivative may depend on: options, numbers of axes, layouts, and whether there is one sample."""
    return " ".join(_told(leaf) for leaf in leaves)


def _told(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)[:40] if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf).__name__
    layout = "contiguous" if leaf.is_contiguous() else "expanded" if 0 in leaf.stride() else "strided"
    one = " of one" if leaf.dim() and len(leaf) == 1 else ""
    return f"{leaf.dim()} axes {layout}{one}{' grad' if leaf.requires_grad else ''}"


def state_of(func: Any, leaves: list[Any], form: Any, *, ours: bool) -> tuple[str, str]:
    """One of :data:`STATES` and what torch says: tried at the values met, then near them, where they lie on a kink."""
    said = ""
    for shift in (None, "times", "plus"):
        torch.manual_seed(0)
        values = [_shifted(leaf, shift) for leaf in leaves]
        live = [i for i, value in enumerate(values) if _is_differentiable(value)]
        try:
            with warnings.catch_warnings(), _without_whole_jacobians():
                warnings.simplefilter("ignore")
                torch.autograd.gradgradcheck(
                    _as_function(func, values, live, form, ours=ours), [values[i] for i in live], fast_mode=True
                )
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            if _is_missing(error):
                return "missing", said
            if "mismatch" not in said.lower():
                return "not checked", said
        else:
            return "ok", ""
    return "wrong", said


@contextmanager
def _without_whole_jacobians() -> Iterator[None]:
    """A check along one direction that fails would be made again of all numbers by all, for a longer text."""
    checks = sys.modules["torch.autograd.gradcheck"]
    name = "_run_slow_mode_and_get_error"
    whole = getattr(checks, name)
    setattr(checks, name, lambda *_, **__: "Jacobian mismatch along a random direction")
    try:
        yield
    finally:
        setattr(checks, name, whole)


def _is_missing(error: Exception) -> bool:
    said = str(error)
    return isinstance(error, (RuntimeError, NotImplementedError)) and any(
        text in said for text in ("derivative for", "double backward", "once_differentiable")
    )


def _shifted(leaf: Any, shift: str | None) -> Any:
    if not isinstance(leaf, Tensor):
        return torch.float64 if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf
    value = leaf.detach().double() if leaf.is_floating_point() else leaf.clone()
    if leaf.requires_grad and shift:
        noise = torch.randn_like(value) / 100
        value = value * (1 + noise) if shift == "times" else value + noise
    return value.requires_grad_(leaf.requires_grad)


def _as_function(func: Any, values: list[Any], live: list[int], form: Any, *, ours: bool) -> Callable[..., Any]:
    def function(*operands: Tensor) -> Any:
        given = [value.clone() if isinstance(value, Tensor) else value for value in values]
        for i, operand in zip(live, operands, strict=True):
            given[i] = operand.clone()  # in its layout: what is written in place is a copy
        args, kwargs = tree_unflatten(given, form)
        torch.manual_seed(1)
        with twice_differentiable() if ours else nullcontext():
            result = _WIDER.get(func, func)(*args, **kwargs)
        outputs = [leaf for leaf in tree_flatten(result)[0] if _is_differentiable(leaf)]
        return tuple(outputs)

    return function


# ------------------------------------------------------------------------------------------------- the models


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    steady(1)
    found = json.loads(options.work.read_text()) if options.work.exists() else {"functions": {}, "models": {}}
    chosen = [key for key in keys() if re.search(options.only, key)][: options.first]
    pending = [key for key in chosen if key not in found["models"]]
    for key in tqdm(pending, desc="models", unit="model"):
        found["models"][key] = _model(key, found["functions"])
        _write(options.work, json.dumps(found, indent=1) + "\n")
    result = {"environment": environment(), "listed": len(keys()), **found}
    _write(options.out, json.dumps(result, indent=1) + "\n")
    if options.docs:
        _write(options.docs, page(result))
    print(summary(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="only the models whose source/family/name matches")
    parser.add_argument("--first", type=int, default=None, help="only so many models, the quickest")
    parser.add_argument("--work", type=Path, default=Path("build/second_derivatives.json"), help="what is done so far")
    out = RESULTS / "models" / "second_derivatives.json"
    parser.add_argument("--out", type=Path, default=out, help="the results as JSON")
    parser.add_argument("--docs", type=Path, default=None, help="write the page with the table there")
    return parser


def keys() -> list[str]:
    """The families' table, the quickest first, and more language models."""
    rows = sorted(json.loads(FAMILIES.read_text())["results"], key=lambda row: float(row["seconds"]))
    return [MADE, *(f"transformers/{kind}/{kind}" for kind in zoo.MORE_TRANSFORMERS), *(row["key"] for row in rows)]


class _Made(nn.Module):
    """Operators that users have beside those of the libraries' models."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.kernel = nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 6, 3, padding=1))
        self.bag, self.rows = nn.EmbeddingBag(6, 6, mode="mean"), nn.Bilinear(6, 6, 6)
        self.gates, self.norm = nn.Hardsigmoid(inplace=True), nn.InstanceNorm1d(6, affine=True)
        self.recurrent, self.attention = nn.GRU(6, 6, batch_first=True), nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[0] * 4).view(-1, 4) % 6
        h = self.norm(self.kernel(self.first(x).mT)).mT
        h = self.gates(h + self.bag(ids).unsqueeze(1)) * functional.mish(h) + self.rows(h, h.flip(1))
        h = self.recurrent(functional.normalize(h, dim=-1))[0]
        h = self.attention(h, h, h, need_weights=False)[0] + torch.cdist(h, x.tanh()).mean(-1, keepdim=True)
        return self.out(functional.celu(h).logsumexp(1)) + self._losses(h) / 100

    def _losses(self, h: Tensor) -> Tensor:
        """Whose kernels have no second derivative."""
        times, labels = h.log_softmax(-1).transpose(0, 1), torch.tensor([[1, 2], [3, 3]])
        said = functional.ctc_loss(times, labels, (5, 5), (2, 2))
        margins = functional.multi_margin_loss(h[:, 0], labels[:, 0], p=2)
        return (
            said
            + margins
            + functional.multilabel_margin_loss(h[:, 1].square(), torch.tensor([[1, 2, -1, 0, 0, 0]] * 2))
        )


def _made() -> zoo.Subject:
    zoo.seed(0)
    batches = [(torch.randn(2, 5, 6), torch.arange(2)) for _ in range(2)]
    return zoo.Subject(_Made(), batches, Objective())


def _model(key: str, functions: dict[str, Any]) -> dict[str, Any]:
    """Its calls checked; and H·g against a difference."""
    try:
        subject = _made() if key == MADE else zoo.build(key)
    except zoo.CannotRun as error:
        return {"status": "cannot run", "said": str(error)[:200]}
    pending: list[tuple[str, str, Any, Any]] = []

    def note(func: Any, call: Any) -> None:
        leaves, _ = call
        name, kind = resolve_name(func) or getattr(func, "__qualname__", repr(func)), kind_of(leaves)
        known = functions.setdefault(name, {"kinds": {}, "models": []})
        if key not in known["models"]:
            known["models"].append(key)
        small = sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)) <= LARGEST
        if small and kind not in known["kinds"] and len(known["kinds"]) < KINDS:
            known["kinds"][kind] = {}
            pending.append((name, kind, func, call))

    for mode in dict.fromkeys((subject.mode, "train")):
        with _as_it_was(subject.model, training=mode == "train"), Calls(note):
            subject.objective(subject.model, subject.batches[0])
    for name, kind, func, (leaves, form) in pending:
        for ours in (False, True):
            state, said = state_of(func, leaves, form, ours=ours)
            functions[name]["kinds"][kind]["here" if ours else "torch"] = {"state": state, "said": said}
    return _whole(subject)


def _whole(subject: zoo.Subject) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fp.flow(
                subject.model, subject.batches, closure=subject.objective, mode=subject.mode, check=True, batch_size=2
            )
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            return {"status": "out of memory" if "allocate memory" in said else "refused", "said": said}
    said = [str(warning.message) for warning in caught if "H·g is not the change of g" in str(warning.message)]
    return {"status": "differs", "said": said[0][:300]} if said else {"status": "ok", "said": ""}


@contextmanager
def _as_it_was(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    zoo.seed(0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    if not training:
        model.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(state[name])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------- the page


def summary(result: dict[str, Any]) -> str:
    """How many calls are in which state, and how many models."""
    calls = [call for one in result["functions"].values() for call in one["kinds"].values()]
    by = {side: Counter(call[side]["state"] for call in calls) for side in ("torch", "here")}
    models = Counter(one["status"] for one in result["models"].values())
    counted = [", ".join(f"{count[state]} {state}" for state in STATES if count[state]) for count in by.values()]
    ends = ", ".join(f"{count} {status}" for status, count in models.most_common())
    return (
        f"{len(result['functions'])} functions in {len(calls)} kinds of calls: in torch {counted[0]}; here "
        f"{counted[1]}. H·g of {len(result['models'])} models: {ends}"
    )


def page(result: dict[str, Any]) -> str:
    """The page of the documentation."""
    faulty = {name: one for name, one in result["functions"].items() if _states(one, "torch") - {"ok"}}
    rows = [
        [f"`{name}`", str(len(one["models"])), _cell(one, "torch"), _cell(one, "here"), _done(one)]
        for name, one in sorted(faulty.items())
    ]
    sound = sorted(result["functions"].keys() - faulty.keys())
    models = [
        f"- `{key}`: {one['status']}: {_line(one['said'])}"
        for key, one in result["models"].items()
        if one["status"] != "ok"
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["environment"]["versions"].items())
    return wrapped(
        _PAGE.format(
            summary=summary(result),
            run=f"{len(result['models'])} of {result['listed']} listed models were run; the command goes on there.",
            command=shown(f"{COMMAND} --docs docs/results/second_derivatives.md"),
            versions=versions,
            rows="\n".join(table(["function", "models", "in torch", "here", "what is done"], rows)),
            said=_all_said(faulty),
            models="\n".join(models) or "None.",
            count=len(sound),
            sound=", ".join(f"`{name}`" for name in sound),
        )
    )


def _states(one: dict[str, Any], side: str) -> set[str]:
    return {call[side]["state"] for call in one["kinds"].values()}


def _cell(one: dict[str, Any], side: str) -> str:
    counts = Counter(call[side]["state"] for call in one["kinds"].values())
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def _done(one: dict[str, Any]) -> str:
    """Told from the two sides."""
    before, after = _states(one, "torch") - {"ok"}, _states(one, "here")
    if "wrong" in after:
        return "**nothing: wrong**"
    if "missing" in after:
        return "H·g is refused, and says so"
    if "not checked" in after:
        return "not checked, for what is said below"
    return f"an equal form takes its place ({' and '.join(sorted(before))} in torch)"


def _all_said(faulty: dict[str, Any]) -> str:
    lines = [
        f"- `{name}` ({kind}), {side}: {call[side]['state']}: {_line(call[side]['said'])}"
        for name, one in sorted(faulty.items())
        for kind, call in one["kinds"].items()
        for side in ("torch", "here")
        if call[side]["state"] != "ok"
    ]
    return "\n".join(lines) or "Nothing."


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


_PAGE = """# Second derivatives

H·g is a derivative of a gradient, so that each operator of a model is differentiated twice. torch has a second
derivative of most; of some it has none, and of a few it has a wrong one, which no error tells. Every function of torch
that a model calls where a gradient passes (timm's modules, torchvision's, language models of transformers, and a net
of operators that these leave out, in eval and in train mode) was held against differences, by
`torch.autograd.gradgradcheck` in float64, at the values, options and layouts that the models call it with: a few kinds
of calls a function.

**{summary}.**

{run}

{command}

{versions}.

## What is not right in torch, and what is done

A function is in this table where torch's second derivative of at least one kind of call is missing, wrong or could
not be checked. "Here" is the same call as the sweeps of H·g run it.

{rows}

What each said:

{said}

## Whole models

H·g of each model, as `fp.flow` gives it, was held against a central difference of gradients along g (`check=True`), in
float64 on two samples. Functions written in Python (`torch.autograd.Function`) are looked at by this too. Those where
it differed, was refused, or took more memory than it was given (9 to 12 GB):

{models}

## What is right

{count} functions, in every kind of call: {sound}.
"""


if __name__ == "__main__":
    main()
