"""The ways to build a smaller model, tried in turn: its own code, some modules as graphs, all of it as one graph."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from torch_flowprune.channels.rules import RULES
from torch_flowprune.channels.shrinking.equivalence import Trial, first_line
from torch_flowprune.channels.shrinking.exported_module import (
    argument_names,
    free_sizes,
    graft,
    recorded_calls,
    resized_graph,
)
from torch_flowprune.channels.shrinking.module_sizes import attribute_plans, changed_sizes
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery, dead_labels, operated
from torch_flowprune.channels.tracing import Reading, canonical_names, export, read, twin


@dataclass
class Bench:
    """What the attempts at one shrinking share: the dense model, its labels, what is to go, and the trial to pass."""

    dense: nn.Module
    reading: Reading
    surgery: Surgery
    trial: Trial
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    graphs: dict[str, tuple[Reading, Tensor, list[str]]] = field(default_factory=dict)

    @cached_property
    def dead(self) -> Tensor:
        return dead_labels(self.reading, self.surgery)

    @cached_property
    def calls(self) -> dict[str, tuple[Any, Any]]:
        paths = [p for p in changed_sizes(self.reading, self.dead) if p]
        return recorded_calls(twin(self.dense).eval(), self.args, self.kwargs, paths)

    def build(self, model: nn.Module, surgery: Surgery, replaced: Collection[str] = ()) -> nn.Module:
        """`model`, a copy of the dense one, after surgery, with the modules at some paths replaced by their graphs."""
        small = operated(model, surgery)
        for path in replaced:
            module = small.get_submodule(path)
            small = graft(small, path, resized_graph(module, *self.graph_of(path)))
        return small

    def graph_of(self, path: str) -> tuple[Reading, Tensor, list[str]]:
        """The labelled graph of one module of the dense model, and what is dead in it."""
        if path not in self.graphs:
            module = self.dense.get_submodule(path)
            args, kwargs = self.calls[path] if path else (self.args, self.kwargs)
            try:
                reading = read(
                    module, args, kwargs, RULES, export(module, args, kwargs, False, free_sizes(module, args, kwargs))
                )
            except Exception:  # noqa: BLE001 - code that fixes its sizes: the graph is then for the example's
                reading = read(module, args, kwargs, RULES, export(module, args, kwargs, False))
            keep = {
                n.removeprefix(f"{path}."): k
                for n, k in self.surgery.keep.items()
                if n.startswith(f"{path}." if path else "")
            }
            self.graphs[path] = (
                reading,
                dead_labels(reading, Surgery(keep, {})),
                argument_names(module, args, kwargs),
            )
        return self.graphs[path]

    def tried(self, surgery: Surgery, replaced: Collection[str] = ()) -> tuple[Exception | None, nn.Module]:
        """The trial's model after surgery, and what is wrong with it."""
        small = self.trial.model
        try:
            small = self.build(copy.deepcopy(self.trial.model), surgery, replaced)
            self.trial.check(small)
        except Exception as e:  # noqa: BLE001 - whatever foreign code raises, this surgery does not fit
            return e, small
        return None, small

    def replacements(self, surgery: Surgery) -> list[str] | None:
        """Modules to replace by their graphs so that the model passes: found from where it fails, kind by kind."""
        replaced: list[str] = []
        while True:
            error, small = self.tried(surgery, replaced)
            if error is None:
                return replaced
            more = _outermost([*replaced, *self.blamed(error, small)])
            if set(more) <= set(replaced):
                return None
            replaced = more

    def blamed(self, error: BaseException, small: nn.Module) -> list[str]:
        """The innermost module in the traceback that states sizes which shrink, and all of its class that do."""
        modules = dict(small.named_modules())
        sized = {p: modules[p] for p in changed_sizes(self.reading, self.dead) if p in modules and p}
        paths = {id(m): p for p, m in sized.items()}
        found = None
        trace = error.__traceback__
        while trace is not None:
            found = paths.get(id(trace.tb_frame.f_locals.get("self")), found)
            trace = trace.tb_next
        return [p for p, m in sized.items() if type(m) is type(sized[found])] if found else []


def _outermost(paths: Sequence[str]) -> list[str]:
    """Without repeats, and without paths inside others."""
    return [p for p in dict.fromkeys(paths) if not any(p.startswith(f"{q}.") for q in paths)]


def attempt(bench: Bench, graph: bool) -> tuple[nn.Module, Surgery]:
    """The first way that passes: the modules' own code, then some modules as graphs, then all of the model as one."""
    names = canonical_names(bench.dense)
    plans = [
        replace(bench.surgery, attributes=a)
        for a in attribute_plans(bench.dense, bench.reading, bench.dead, bench.surgery, names)
    ]
    errors = []
    for plan in plans:
        error, _ = bench.tried(plan)
        if error is None:
            return bench.build(copy.deepcopy(bench.dense), plan), plan
        errors.append(f"{type(error).__name__}: {first_line(error)}")
    if not graph:
        raise ShrinkError(f"the model's own code does not take the smaller sizes: {errors[0]}")
    replaced = bench.replacements(plans[0])
    if replaced is not None:
        return bench.build(copy.deepcopy(bench.dense), plans[0], replaced), plans[0]
    error, _ = bench.tried(bench.surgery, [""])
    if error is not None:
        raise ShrinkError(
            f"neither the model's code ({errors[0]}) nor its graph ({first_line(error)}) takes the smaller sizes"
        )
    return bench.build(copy.deepcopy(bench.dense), bench.surgery, [""]), bench.surgery
