"""Walks the graph that `torch.export` gives of a model and labels every tensor in it.

The walk asks one rule per operator (`rules.RULES`) what happens to the labels. Where a rule has a choice (which
factor of `heads * head_dim` is to be removable), the walk is repeated with other choices until nothing more can be
won.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from inspect import Parameter, signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from torch_flowprune.axes import FIXED, Axes, Solution, Value
from torch_flowprune.nodes import concrete, is_in_place, module_path, operator_name, sharing

__all__ = ["Reading", "Walk", "export", "read"]

Rule = Callable[..., Any]
ROUNDS = 10  # walks with different choices; the deepest nesting of choices seen in timm needed 4


@dataclass
class Site:
    """A place where a rule had to choose, with the options it had and the labels of the one it took."""

    options: int
    taken: int
    labels: Tensor


@dataclass
class Reading:
    """A model's graph(s), with the labels of every tensor and what follows from them."""

    programs: dict[str, ExportedProgram]
    axes: Axes
    solution: Solution
    values: dict[Node, Any]
    counts: dict[tuple[Node, str], Tensor]
    roles: dict[tuple[str, int], str]
    reads_zero: dict[tuple[str, int], bool]
    named: dict[str, Value]
    segments: list[Tensor]
    unknown: dict[str, int]
    unused: tuple[str, ...]


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every tensor: what tracing writes to it (caches) the model never sees."""
    tensors = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    tensors += [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool, sizes: Any = None) -> ExportedProgram:
    """The ATen graph of a model. sizes: dynamic shapes, as `torch.export` takes them."""
    with torch.random.fork_rng(), warnings.catch_warnings(), without_stack_traces():
        warnings.simplefilter("ignore")  # export warns of caches that modules fill while traced; the twin is thrown away
        return torch.export.export(twin(model).train(training), args, dict(kwargs), dynamic_shapes=sizes, strict=False)


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Nobody reads the source line of an operator here, and finding it takes a tenth of an export."""
    config, name = getattr(torch.fx, "config", None), "do_not_emit_stack_traces"
    before = getattr(config, name, None)  # older versions of torch have no such setting
    try:
        if before is not None:
            setattr(config, name, True)
        yield
    finally:
        if before is not None:
            setattr(config, name, before)


@dataclass
class Walk:
    """The state of one pass over the graph; what rules are given as their first argument."""

    choices: Mapping[str, int]
    axes: Axes = field(default_factory=Axes)
    values: dict[Node, Any] = field(default_factory=dict)
    named: dict[str, Value] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    counts: dict[tuple[Node, str], Tensor] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    reads_zero: dict[tuple[str, int], bool] = field(default_factory=dict)
    segments: list[Tensor] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    node: Node | None = None
    prefix: str = ""
    shape: tuple[int, ...] | None = None

    # -- what rules use -------------------------------------------------------------------------------------------

    @property
    def out_shape(self) -> tuple[int, ...]:
        assert self.node is not None
        return self.shape or concrete(self.node.meta["val"].shape)

    def at_shape(self, shape: Sequence[int]) -> Walk:
        """This walk as seen from an intermediate result of the operator, whose shape is not the node's."""
        return replace(self, shape=tuple(shape))

    def why(self, text: str) -> str:
        assert self.node is not None
        path = module_path(self.node)
        return f"{text} ({operator_name(self.node)}{f' in {path}' if path else ''})"

    def fixed(self, shape: Sequence[int]) -> Value:
        return Value(tuple(self.axes.fixed(s) for s in shape), (True,) * len(shape))

    def uniform(self, shape: Sequence[int], zero: bool = False) -> Value:
        """A tensor with the same content everywhere: any positions may go, with whatever it is combined with."""
        return Value(tuple(self.axes.fresh(s) for s in shape), (zero,) * len(shape))

    def join(self, a: Tensor, b: Tensor, text: str = "meets an axis that stays") -> None:
        self.axes.join(a, b, self.why(text))

    def freeze(self, labels: Tensor, text: str) -> None:
        self.axes.freeze(labels, self.why(text))

    def choose(self, labels: Sequence[Tensor]) -> int:
        """Which of several axes (told by their labels) is to be removable, where only one of them can be."""
        assert self.node is not None
        key = f"{self.prefix}{self.node.name}"
        while key in self.sites:
            key += "'"
        taken = self.choices.get(key, 0) % len(labels)
        self.sites[key] = Site(len(labels), taken, labels[taken])
        return taken

    def count(self, name: str, labels: Tensor) -> None:
        """Note a number (of groups, say) that the current operator was given: one label per thing counted."""
        assert self.node is not None
        self.counts[self.node, name] = labels

    def segment(self, labels: Tensor) -> Tensor:
        """Note a part of an axis that becomes a tensor of its own: something of it has to be left."""
        if not self.axes.is_fixed(labels):
            self.segments.append(labels)
        return labels

    def role(self, labels: Tensor, role: str, zero: bool = False) -> None:
        """Note that these positions of parameters produce a unit, or consume one that is (or is not) exactly zero."""
        for block in self.axes.blocks_of(labels):
            if block.kind == "parameter":
                key = (block.name, block.axis)
                if self.roles.get(key) != "producer":
                    self.roles[key] = role
                if role == "consumer":
                    self.reads_zero[key] = zero and self.reads_zero.get(key, True)

    # -- the walk -------------------------------------------------------------------------------------------------

    def run(self, program: ExportedProgram, names: Mapping[str, str], rules: Mapping[str, Rule]) -> None:
        specs = {s.arg.name: s for s in program.graph_signature.input_specs}
        for self.node in program.graph.nodes:
            node = self.node
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node, specs[node.name], names)
            elif node.op == "call_function":
                self.values[node] = self._call(node, rules)
            elif node.op == "output":
                self._freeze_all(node.all_input_nodes, "reaches the model's output")

    def _placeholder(self, node: Node, spec: Any, names: Mapping[str, str]) -> Any:
        if not isinstance(node.meta.get("val"), Tensor):
            return None
        kinds = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}
        if spec.kind not in kinds:
            return self.fixed(self.out_shape)
        if spec.target not in names:  # a constant of the module that is no buffer of it
            return self.fixed(self.out_shape)
        name = names[spec.target]
        if name not in self.named:
            self.named[name] = self.axes.named(name, self.out_shape, kinds[spec.kind])
        return self.named[name]

    def _call(self, node: Node, rules: Mapping[str, Rule]) -> Any:
        if node.target is operator.getitem:
            of, at = cast("tuple[Node, int]", node.args)
            source = self.values[of]
            return source[at] if isinstance(source, (list, tuple)) else source
        rule = rules.get(operator_name(node))
        if rule is None:
            return self._without_rule(node)
        bound = self._bound(rule, node)
        value = rule(self, **bound) if required_by(rule) <= bound.keys() else NotImplemented
        if value is NotImplemented:
            return self._without_rule(node)
        value = self._settled(value, node)
        if is_in_place(node):
            self._mutate(node.args[0], value)
        return value

    def _bound(self, rule: Rule, node: Node) -> dict[str, Any]:
        """The arguments of a call by their schema's names, tensors as values; only those that the rule asks for."""
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        bound = {a.name: a.default_value for a in schema if a.has_default_value()}
        bound |= {a.name: v for a, v in zip(schema, node.args, strict=False)} | node.kwargs
        wanted = parameters_of(rule)
        first = schema[0].name if schema else ""
        bound.setdefault("x", bound.get(first))
        return {k: torch.fx.node.map_arg(bound[k], self.values.__getitem__) for k in wanted if k in bound}

    def _settled(self, value: Any, node: Node) -> Any:
        """A rule's result with what holds for every operator: single positions stay, constants come of constants."""
        if value is None:
            return None
        constant = all(v.constant for n in node.all_input_nodes for v in flat(self.values.get(n)))
        settled = [Value(tuple(self._not_single(d) for d in v.dims), v.zero, constant) for v in flat(value)]
        return settled[0] if isinstance(value, Value) else settled

    def _not_single(self, labels: Tensor) -> Tensor:
        """A dimension of one position can not lose it: broadcasting would take it for something else."""
        if len(labels) != 1 or int(labels[0]) == FIXED:
            return labels
        self.freeze(labels, "is picked by position")
        return self.axes.fixed(1)

    def _without_rule(self, node: Node) -> Any:
        name = operator_name(node)
        self._freeze_all(node.all_input_nodes, "an operator without a rule")
        value = node.meta.get("val")
        if isinstance(value, (Tensor, list, tuple)):
            self.unknown[name] = self.unknown.get(name, 0) + 1
        if isinstance(value, Tensor):
            return self.fixed(concrete(value.shape))
        if isinstance(value, (list, tuple)):
            return [self.fixed(concrete(v.shape)) if isinstance(v, Tensor) else None for v in value]
        return None

    def _freeze_all(self, nodes: Sequence[Node], text: str) -> None:
        for node in nodes:
            for value in flat(self.values.get(node)):
                for labels in value.dims:
                    self.freeze(labels, text)

    def _mutate(self, node: Any, value: Value) -> None:
        """An in-place operator: later readers of the tensor, and of every tensor that shares its memory, see the new content."""
        if not all(zero or self.axes.is_fixed(labels) for labels, zero in zip(value.dims, value.zero, strict=True)):
            for alias in sharing(node):
                held = self.values.get(alias)
                if held is not None:
                    self.values[alias] = [v.without_zero() for v in held] if isinstance(held, (list, tuple)) else held.without_zero()
        self.values[node] = value


def read(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rules: Mapping[str, Rule], sizes: Any = None) -> Reading:
    """Label the model's graph in eval mode, and in train mode too where that uses parameters that eval does not."""
    names = canonical_names(model)
    programs = {"eval": export(model, args, kwargs, False, sizes)}
    unused = unused_parameters(model, programs.values(), names)
    error = ""
    if unused:
        try:
            programs["train"] = export(model, args, kwargs, True)
            unused = unused_parameters(model, programs.values(), names)
        except Exception as e:  # noqa: BLE001 - whatever torch.export raises, what only training reads is then frozen
            error = f"its training graph, which reads further parameters, can not be exported: {type(e).__name__}"
    walk, solution = best_walk(programs, names, rules, error)
    return Reading(
        programs,
        walk.axes,
        solution,
        walk.values,
        walk.counts,
        walk.roles,
        walk.reads_zero,
        walk.named,
        walk.segments,
        walk.unknown,
        unused,
    )


def best_walk(programs: Mapping[str, ExportedProgram], names: Mapping[str, str], rules: Mapping[str, Rule], error: str) -> tuple[Walk, Solution]:
    """Walks with one set of choices after another; the one that leaves most positions of parameters removable."""
    choices: dict[str, int] = {}
    best: tuple[int, Walk, Solution] | None = None
    for _ in range(ROUNDS):
        walk = Walk(dict(choices))
        for prefix, program in programs.items():
            walk.prefix = f"{prefix}:"
            walk.run(program, names, rules)
        if error:
            for value in walk.named.values():
                for labels in value.dims:
                    walk.axes.freeze(labels, error)
        solution = walk.axes.solve()
        won = free_positions(walk.axes, solution)
        if best is None or won > best[0]:
            best = (won, walk, solution)
        if not advance(choices, walk.sites, solution):
            break
    assert best is not None
    return best[1], best[2]


def advance(choices: dict[str, int], sites: Mapping[str, Site], solution: Solution) -> bool:
    """Take the next option where the one taken is frozen: by hard facts first, as others may then recover."""
    hard: list[str] = []
    soft: list[str] = []
    for key, site in sites.items():
        if site.options > 1 and choices.get(key, 0) + 1 < site.options and bool(solution.frozen(site.labels).all()):
            blame = set(solution.root[site.labels].tolist())
            (soft if blame <= solution.soft else hard).append(key)
    for key in hard or soft:
        choices[key] = choices.get(key, 0) + 1
    return bool(hard or soft)


def free_positions(axes: Axes, solution: Solution) -> int:
    return sum(int((~solution.frozen(torch.arange(b.start, b.start + b.size))).sum()) for b in axes.blocks)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor: tied tensors are one."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names[name] = first.setdefault(id(tensor), name)
    return names


def unused_parameters(model: nn.Module, programs: Any, names: Mapping[str, str]) -> tuple[str, ...]:
    used: set[str] = set()
    for program in programs:
        nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.PARAMETER and nodes[spec.arg.name].users:
                used.add(names[spec.target])
    return tuple(n for n, _ in model.named_parameters() if n not in used)


def flat(values: Any) -> list[Value]:
    """The values of a node with one or several outputs."""
    return [v for v in (values if isinstance(values, (list, tuple)) else [values]) if isinstance(v, Value)]


@cache
def required_by(rule: Rule) -> frozenset[str]:
    """What a rule can not do without; an overload of its operator that has no such argument is not the rule's."""
    return frozenset(n for n, p in list(signature(rule).parameters.items())[1:] if p.default is Parameter.empty)


@cache
def parameters_of(rule: Rule) -> tuple[str, ...]:
    return tuple(signature(rule).parameters)[1:]
