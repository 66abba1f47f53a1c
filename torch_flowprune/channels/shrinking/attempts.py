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
from torch_flowprune.channels.shrinking.running_modules import RunningModules
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery, dead_labels, operated
from torch_flowprune.channels.tracing import Reading, canonical_names, program_of, read, twin


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
    def sized(self) -> list[str]:
        """The modules in whose forward a size changes that an operator is told."""
        return [path for path in changed_sizes(self.reading, self.dead) if path]

    @cached_property
    def calls(self) -> dict[str, tuple[Any, Any]]:
        return recorded_calls(twin(self.dense).eval(), self.args, self.kwargs, self.sized)

    def build(self, model: nn.Module, surgery: Surgery, replaced: Collection[str] = ()) -> nn.Module:
        """``model``, a copy of the dense one, after surgery, with the modules at some paths replaced by graphs."""
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
                program = program_of(module, args, kwargs, False, free_sizes(module, args, kwargs))
                reading = read(module, args, kwargs, RULES, program)
            except Exception:  # noqa: BLE001 - code that fixes its sizes: the graph is then for the example's
                reading = read(module, args, kwargs, RULES, program_of(module, args, kwargs, False))
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

    def tried(
        self, surgery: Surgery, replaced: Collection[str] = (), running: RunningModules | None = None
    ) -> Exception | None:
        """What is wrong with the trial's model after surgery; ``running`` is to watch it."""
        try:
            small = self.build(copy.deepcopy(self.trial.model), surgery, replaced)
            if running is not None:
                running.watch(small, self.sized)
            self.trial.check(small)
        except Exception as e:  # noqa: BLE001 - whatever foreign code raises, this surgery does not fit
            return e
        return None

    def replacements(self, surgery: Surgery) -> list[str] | None:
        """Modules to replace by their graphs so that the model passes: found from where it fails, kind by kind."""
        replaced: list[str] = []
        while True:
            more = _outermost([*replaced, *self.blamed(surgery, replaced)])
            if set(more) <= set(replaced):
                return None
            replaced = more
            if self.tried(surgery, replaced) is None:
                return replaced

    def blamed(self, surgery: Surgery, replaced: Collection[str]) -> list[str]:
        """The innermost module that fails of those that state sizes which shrink, and all of its class that do."""
        running = RunningModules()
        self.tried(surgery, replaced, running)
        path = running.paths[-1] if running.paths else ""
        kind = type(self.dense.get_submodule(path))
        return [p for p in self.sized if type(self.dense.get_submodule(p)) is kind] if path else []


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
        error = bench.tried(plan)
        if error is None:
            return bench.build(copy.deepcopy(bench.dense), plan), plan
        errors.append(f"{type(error).__name__}: {first_line(error)}")
    if not graph:
        raise ShrinkError(f"the model's own code does not take the smaller sizes: {errors[0]}")
    replaced = bench.replacements(plans[0])
    if replaced is not None:
        return bench.build(copy.deepcopy(bench.dense), plans[0], replaced), plans[0]
    error = bench.tried(bench.surgery, [""])
    if error is not None:
        raise ShrinkError(
            f"neither the model's code ({errors[0]}) nor its graph ({first_line(error)}) takes the smaller sizes"
        )
    return bench.build(copy.deepcopy(bench.dense), bench.surgery, [""]), bench.surgery
