"""What the attempts at one smaller model share: the model, what is to go, and how it is built and held against it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import BoundArguments
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from torch_flowprune.channels.rules import RULES
from torch_flowprune.channels.shrinking.graphs import (
    CallGuard,
    Modes,
    canonical_call,
    free_sizes,
    graft,
    guard_of,
    modes_of,
    recorded_calls,
    resized_graph,
)
from torch_flowprune.channels.shrinking.module_sizes import (
    Attributes,
    attribute_plans,
    changed_attributes,
    changed_sizes,
    layer_attributes,
)
from torch_flowprune.channels.shrinking.own_code import Edits, RunningModules, SetRight, ToldNumbers, told_numbers
from torch_flowprune.channels.shrinking.proof import (
    Trial,
    holds_nothing,
    tolerance_of,
    training,
)
from torch_flowprune.channels.shrinking.surgery import Surgery, dead_labels, operated
from torch_flowprune.channels.shrinking.written import written, written_paths
from torch_flowprune.channels.tracing import Reading, Value, canonical_names, program_of, read, twin
from torch_flowprune.inputs import copied_model, forget_caches, tree_leaves


@dataclass
class Bench:
    """What the attempts at one shrinking share.

    Attributes:
        whole: the dense model, with all of its hooks.
        dense: the same without hooks that only look on, which the attempts are made with.
        reading: its labels.
        surgery: what is to go.
        args, kwargs: what it is called with.
        masks: what is masked.
        graphs: of modules, as far as they were made.
    """

    whole: nn.Module
    dense: nn.Module
    reading: Reading
    surgery: Surgery
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    masks: Mapping[str, Tensor]
    graphs: dict[str, tuple[CallGuard, Reading, Tensor, Modes]] = field(default_factory=dict)

    @cached_property
    def trial(self) -> Trial:
        return Trial(self.dense, self.masks, self.surgery, self.args, self.kwargs, tolerance_of(self.reading))

    @cached_property
    def dead(self) -> Tensor:
        return dead_labels(self.reading, self.surgery)

    @cached_property
    def plans(self) -> list[Attributes]:
        """What modules' attributes may be, likeliest first."""
        plans = attribute_plans(self.dense, self.reading, self.dead, self.sure)
        without = [{p: values for p, values in plan.items() if p not in self.paths_written} for plan in plans]
        return [plan for i, plan in enumerate(without) if plan not in without[:i]]

    @cached_property
    def sure(self) -> Attributes:
        """What attributes of torch's own layers have to be: nothing in these is found by its value."""
        return layer_attributes(self.dense, self.reading, self.dead, self.surgery, canonical_names(self.dense))

    @cached_property
    def sized(self) -> list[str]:
        """The modules in whose forward a size changes that an operator is told."""
        return [path for path in changed_sizes(self.reading, self.dead) if path]

    @cached_property
    def calls(self) -> dict[str, tuple[Any, Any]]:
        return recorded_calls(twin(self.dense).eval(), self.args, self.kwargs, self.sized)

    def build(self, model: nn.Module, surgery: Surgery, replaced: Collection[str] = ()) -> nn.Module:
        """``model``, a copy of the dense one, after surgery, with the modules at some paths replaced by graphs."""
        small = written(operated(model, surgery), surgery)
        forget_caches(small)
        for path in replaced:
            module = small.get_submodule(path)
            small = graft(small, path, resized_graph(module, *self.graph_of(path)))
        return small

    def made(self, surgery: Surgery, replaced: Collection[str] = ()) -> tuple[nn.Module, Surgery]:
        """What an attempt that passed gives: the whole model after surgery."""
        return self.build(copied_model(self.whole), surgery, replaced), surgery

    def graph_of(self, path: str) -> tuple[CallGuard, Reading, Tensor, Modes]:
        """The labelled graph of a module of the dense model: its call, what is dead in it, what train mode changes."""
        if path not in self.graphs:
            module = self.dense.get_submodule(path)
            call = canonical_call(module, *self.call_of(path))
            try:
                sizes = free_sizes(call)
                traced = program_of(module, call.args, call.kwargs, False, sizes)
                reading = read(module, call.args, call.kwargs, RULES, traced)
            except Exception:  # noqa: BLE001 - code that fixes its sizes: the graph is then for the example's
                sizes, traced = None, program_of(module, call.args, call.kwargs, False)
                reading = read(module, call.args, call.kwargs, RULES, traced)
            assert traced.program is not None
            keep = {
                n.removeprefix(f"{path}."): k
                for n, k in self.surgery.keep.items()
                if n.startswith(f"{path}." if path else "")
            }
            where = f"{type(module).__name__} at {path!r}" if path else type(module).__name__
            guard = guard_of(where, call, traced.program, self.shapes_of(path, call))
            dead = dead_labels(reading, Surgery(keep, {}))
            self.graphs[path] = (guard, reading, dead, _modes_between(module, call, traced.program, sizes))
        return self.graphs[path]

    def call_of(self, path: str) -> tuple[Any, Any]:
        """The arguments of a module's first call in the dense model."""
        return self.calls[path] if path else (self.args, dict(self.kwargs))

    def shapes_of(self, path: str, call: BoundArguments) -> list[tuple[int, ...] | None]:
        """Of the values that a module of the smaller model is called with; None for what is no tensor, or not known."""
        nodes = self.reading.traced["eval"].calls.get(path, ())
        held = dict(zip(map(id, tree_leaves(self.call_of(path))), nodes, strict=False))
        values = [self.reading.values.get(held.get(id(leaf))) for leaf in tree_leaves(dict(call.arguments))]  # type: ignore[arg-type]
        return [
            tuple(int((~self.dead[labels]).sum()) for labels in value.dims) if isinstance(value, Value) else None
            for value in values
        ]

    def tried(
        self,
        surgery: Surgery,
        replaced: Collection[str] = (),
        running: RunningModules | None = None,
        watched: Collection[str] | None = None,
    ) -> Exception | None:
        """What is wrong with the trial's model after surgery; ``running`` is to watch it, or some of its modules."""
        try:
            small = self.build(copied_model(self.trial.model), surgery, replaced)
            if running is not None:
                running.watch(small, self.sized if watched is None else watched)
            self.trial.check(small, thorough=bool(replaced) or self.is_new(surgery))
        except Exception as e:  # noqa: BLE001 - whatever foreign code raises, this surgery does not fit
            return e
        return None

    def is_new(self, surgery: Surgery) -> bool:
        """Whether anything was set or put in place that torch's own layers do not tell the size of."""
        return surgery.attributes != changed_attributes(self.dense, self.sure) or bool(
            self.paths_written or surgery.code
        )

    @cached_property
    def paths_written(self) -> list[str]:
        return written_paths(self.dense, self.surgery)

    @cached_property
    def told(self) -> ToldNumbers | None:
        """What the code has to tell its operators; None where it runs otherwise than when it was read."""
        return self._told_of(None)

    def _told_of(self, only: Collection[str] | None) -> ToldNumbers | None:
        with suppress(Exception):  # whatever foreign code raises when it is compiled anew and watched
            return told_numbers(twin(self.dense), self.reading, self.dead, self.args, self.kwargs, only)
        return None

    def in_own_code(self, plan: Surgery, shares: bool) -> Iterator[Surgery]:
        """A plan with further attributes set, where code reads sizes off them, and numbers in the code besides.

        shares: whether the code says which share of a number is left, for numbers in which the batch's size is.
        """
        if self.told is None:
            return
        plans = [plan]
        if more := self.set_right(plan, shares=False).attributes():
            paths = {**plan.attributes, **more}
            attributes = {path: {**plan.attributes.get(path, {}), **more.get(path, {})} for path in paths}
            plans.insert(0, replace(plan, attributes=attributes))
        for one in plans:
            yield one.with_code(self.set_right(one, shares).code())

    @cached_property
    def spans(self) -> Mapping[str, Edits]:
        """What the code has to say where it divides by a number of channels that changes, outside of torch's norms."""
        own = [path for path in self.surgery.spans if path not in self.paths_written]
        told = self._told_of(own) if own else None
        return {} if told is None else told.span_edits()

    def set_right(self, plan: Surgery, shares: bool) -> SetRight:
        """The plan's model, run with the numbers in its code set right."""
        assert self.told is not None
        small = self.build(copied_model(self.trial.model), plan)
        watched = SetRight(small, self.told, shares)
        with suppress(Exception):  # what cannot be set right: then the trial says so
            self.trial.run(small)
        return watched

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

    def blamed(
        self, surgery: Surgery, replaced: Collection[str] = (), watched: Collection[str] | None = None
    ) -> list[str]:
        """The innermost module that fails of those that state sizes which shrink (``watched``), and its whole class."""
        among, running = self.sized if watched is None else watched, RunningModules()
        self.tried(surgery, replaced, running, among)
        path = running.paths[-1] if running.paths else ""
        kind = type(self.dense.get_submodule(path))
        return [p for p in among if type(self.dense.get_submodule(p)) is kind] if path else []


def _modes_between(module: nn.Module, call: BoundArguments, evaluated: ExportedProgram, sizes: Any) -> Modes:
    """What train mode changes: in all of a module, or else with what holds nothing left in eval mode."""
    quiet = tuple(path for path, m in module.named_modules() if path and holds_nothing(m))
    for mode, in_eval in ((nn.Module.train, ()), (training, quiet)):
        with suppress(Exception):  # whatever export says of this mode: there is no graph of it
            trained = program_of(mode(twin(module)), call.args, call.kwargs, None, sizes).program
            if trained is not None and (found := modes_of(evaluated, trained)) is not None:
                return replace(found, in_eval=in_eval)
    return Modes(in_eval=tuple(path for path, _ in module.named_modules()))


def _outermost(paths: Sequence[str]) -> list[str]:
    """Without repeats, and without paths inside others."""
    return [p for p in dict.fromkeys(paths) if not any(p.startswith(f"{q}.") for q in paths)]
