"""One model through a whole life: pruned, shrunk, compared, trained, pruned again, saved, exported, compiled."""

from __future__ import annotations

import io
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

import torch_flowprune as fp
from benchmarks.models.coverage.models import randomised
from benchmarks.models.coverage.replaced import became
from benchmarks.models.coverage.trial import Casts
from benchmarks.models.foreign.case import CASES, Case
from torch_flowprune.inputs import copied_model

AMOUNT = 0.4
LIMIT = 120  # seconds of processor time
EQUAL = {"float64": 1e-8, "float32": 1e-4}


class Life:
    """Each stage is a method; what raises ends it, unless the rest can be told without."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        self.dense = randomised(case.make()).eval()
        self.model = copied_model(self.dense)
        self.x = case.inputs(2, case.sizes[0])
        self.facts: dict[str, Any] = {"parameters": count(self.dense)}

    def stages(self, chosen: str) -> Iterator[dict[str, Any]]:
        found: dict[str, Any] = {"seconds": {}, "facts": self.facts, "errors": {}}
        for stage in (
            self.runs,
            self.prune,
            self.shrink,
            self.equal,
            self.step,
            self.again,
            self.saved,
            self.onnx,
            self.compiled,
        ):
            name = stage.__name__
            if not re.search(chosen, name):
                continue
            found["stage"] = name
            yield found
            start = time.perf_counter()
            try:
                stage()
            except Exception as error:
                found["errors"][name] = f"{type(error).__name__}: {error}"[:400]
            found["seconds"][name] = round(time.perf_counter() - start, 2)
            yield found
            if name in found["errors"] and name in ("runs", "prune", "shrink"):
                break
        found["stage"] = "done"
        yield found

    def runs(self) -> None:
        """What the dense model itself cannot is no fault of a pruned one."""
        leaves(self.dense, self.x)

    def prune(self) -> None:
        self.facts["prunable"] = round(fp.couple(self.model, self.x).share(), 4)
        report = fp.global_prune(self.model, "magnitude", AMOUNT, granularity="channel", example_inputs=self.x)
        self.facts["pruned"] = report.pruned / max(report.units, 1)

    def shrink(self) -> None:
        self.small = fp.shrink(self.model, self.x)
        self.facts |= {"left": count(self.small) / count(self.dense), "became": became(self.dense, self.small)}

    def equal(self) -> None:
        self.facts["difference"], self.facts["precision"] = compared(self.model, self.small, self.case)

    def step(self) -> None:
        self.trained = copied_model(self.small).train()
        try:
            train(self.trained, self.x)
        except Exception as error:
            try:
                train(copied_model(self.dense).train(), self.x)
            except Exception:
                self.facts["step"] = f"not of the dense model either: {error}"[:200]
                self.trained = copied_model(self.small)
            else:
                raise
        self.trained.eval()

    def again(self) -> None:
        fp.global_prune(self.trained, "magnitude", AMOUNT, granularity="channel", example_inputs=self.x)
        smaller = fp.shrink(self.trained, self.x)
        self.facts["left again"] = count(smaller) / count(self.dense)
        compared(self.trained, smaller, self.case)

    def saved(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            fp.save_pruned(self.small, Path(folder) / "small.safetensors")
            back = fp.load_pruned(randomised(self.case.make()).eval(), Path(folder) / "small.safetensors")
        same(leaves(self.small, self.x), leaves(back, self.x), 1e-5)

    def onnx(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                fp.export(self.small, self.x, Path(folder) / "small.onnx")
            except Exception as error:
                try:
                    fp.export(self.dense, self.x, Path(folder) / "dense.onnx")
                except Exception:
                    self.facts["onnx"] = f"not of the dense model either: {type(error).__name__}: {error}"[:200]
                else:
                    raise

    def compiled(self) -> None:
        expected = leaves(self.small, self.x)
        try:
            same(expected, leaves(torch.compile(copied_model(self.small), backend="eager"), self.x), 1e-4)
        except Exception as error:
            try:
                leaves(torch.compile(copied_model(self.dense), backend="eager"), self.x)
            except Exception:
                self.facts["compiled"] = f"not of the dense model either: {error}"[:200]
            else:
                raise


def life(name: str, chosen: str) -> Iterator[dict[str, Any]]:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # compilers print graphs there
    sys.stdout = io.StringIO()
    try:
        lived = Life(CASES[name])
    except Exception as error:
        yield {"stage": "build", "errors": {"build": f"{type(error).__name__}: {error}"[:600]}}
        return
    yield from lived.stages(chosen)


def called(model: nn.Module, x: Any) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def leaves(model: nn.Module, x: Any) -> list[Tensor]:
    """Tensors among the outputs, in order, whatever holds them."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return tensors(called(model, x))


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return [t for v in vars(value).values() for t in tensors(v)] if is_dataclass(value) else []


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def cast(x: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, x)


def compared(model: nn.Module, small: nn.Module, case: Case) -> tuple[float, str]:
    """At another batch size, and another resolution or length, in float64 where the model's own code can."""
    worst, precision = 0.0, "float64"
    for batch, size in ((3, case.sizes[0]), (2, case.sizes[1])):
        x = case.inputs(batch, size)
        error, how = difference(model, small, x)
        worst, precision = max(worst, error), min(precision, how)
        if not error < EQUAL[how]:
            raise AssertionError(f"differs by {error:.2g} ({how}) on a batch of {batch} of size {size}")
    return worst, precision


def difference(model: nn.Module, small: nn.Module, x: Any) -> tuple[float, str]:
    for dtype in (torch.float64, torch.float32):
        a, b = (copied_model(m).to(dtype) for m in (model, small))
        try:
            with Casts() as casts, without_dropout():
                expected = leaves(a, cast(x, dtype))
        except Exception:
            if dtype is torch.float32:
                raise
            continue
        with without_dropout():
            found = leaves(b, cast(x, dtype))
        return same(expected, found, float("inf")), "float32" if casts.found or dtype is torch.float32 else "float64"
    raise AssertionError


def same(expected: list[Tensor], found: list[Tensor], tolerance: float) -> float:
    """The largest difference, of the largest value."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise AssertionError(f"shapes {[tuple(t.shape) for t in expected]} and {[tuple(t.shape) for t in found]}")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() and not torch.equal(a, b):
            worst = max(worst, off_by(a.double(), b.double()))
    if not worst <= tolerance:
        raise AssertionError(f"outputs differ by {worst:.2g}")
    return worst


def off_by(a: Tensor, b: Tensor) -> float:
    """Of the largest finite value; infinite where only one of the two is finite."""
    both = a.isfinite() & b.isfinite()
    if (a.isfinite() != b.isfinite()).any():
        return float("inf")
    return ((a - b)[both].abs().max() / a[both].abs().max().clamp(min=1e-12)).item() if both.any() else 0.0


@contextmanager
def without_dropout() -> Iterator[None]:
    """Some models leave it on in eval mode; with fewer channels it draws others."""
    with patch.object(functional, "dropout", lambda x, *_, **__: x):
        yield


def train(model: nn.Module, x: Any) -> None:
    """One step on the mean square of what comes out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    found = [t for t in tensors(called(model, x)) if t.requires_grad]
    torch.stack([t.float().square().mean() for t in found]).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
