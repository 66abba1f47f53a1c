"""Walks the graph of a model's operators and labels every tensor in it.

The walk asks one rule per operator (``rules.RULES``) what happens to the labels. Where a rule has a choice (which
factor of ``heads * head_dim`` is to be removable), it notes the place: ``labelled_graph`` walks again with
another choice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from inspect import Parameter, signature
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from torch_flowprune.channels.tracing.labels import FIXED, Axes, Value
from torch_flowprune.channels.tracing.nodes import (
    Traced,
    concrete,
    idle_nodes,
    is_in_place,
    is_tellable_node,
    module_path,
    operator_name,
    sharing,
)
from torch_flowprune.torch_internals import schema_of

Rule = Callable[..., Any]


@dataclass
class Site:
    """A place where a rule had to choose, with the options it had and the labels of the one it took."""

    options: int
    taken: int
    labels: Tensor


@dataclass
class Walk:
    """The state of one pass over the graph; what rules are given as their first argument.

    Attributes:
        choices: which option to take at a site, where it is not the first.
        inner: whether of two factors of a dimension (heads, and the width of each) the inner one is the first option.
    """

    choices: Mapping[str, int]
    axes: Axes = field(default_factory=Axes)
    values: dict[Node, Any] = field(default_factory=dict)
    named: dict[str, Value] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    counts: dict[tuple[Node, str], Tensor] = field(default_factory=dict)
    spans: dict[Node, tuple[int, Tensor]] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    reads_zero: dict[tuple[str, int], bool] = field(default_factory=dict)
    segments: list[Tensor] = field(default_factory=list)
    aligned: list[tuple[Tensor, int]] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    inner: bool = False
    node: Node | None = None
    prefix: str = ""
    shape: tuple[int, ...] | None = None

    # What rules use.

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
        if labels.any():  # FIXED is 0
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

    def span(self, dim: int, labels: Tensor) -> None:
        """Note what the current operator divides by: the positions of a dimension of its first operand.

        Where the code cannot be told of the dense size they stay.
        """
        assert self.node is not None
        if not is_tellable_node(self.node):
            self.freeze(labels, "is divided by in code that cannot be told another number")
        elif not self.axes.is_fixed(labels):
            self.spans[self.node] = dim, labels

    def segment(self, labels: Tensor) -> Tensor:
        """Note a part of an axis that becomes a tensor of its own: something of it has to be left."""
        if not self.axes.is_fixed(labels):
            self.segments.append(labels)
        return labels

    def align(self, labels: Tensor) -> None:
        """Note an axis whose length in bytes the current operator's kernel takes in multiples of 16 alone."""
        assert self.node is not None
        if not self.axes.is_fixed(labels):
            self.aligned.append((labels, 16 // self.node.meta["val"].element_size()))

    def role(self, labels: Tensor, role: str, zero: bool = False) -> None:
        """Note that these positions of parameters produce a unit, or consume one that is (or is not) exactly zero."""
        for block in self.axes.blocks_of(labels):
            if block.kind == "parameter":
                key = (block.name, block.axis)
                if self.roles.get(key) != "producer":
                    self.roles[key] = role
                if role == "consumer":
                    self.reads_zero[key] = zero and self.reads_zero.get(key, True)

    # The walk.

    def run(self, traced: Traced, names: Mapping[str, str], rules: Mapping[str, Rule]) -> None:
        idle = idle_nodes(traced.graph, traced.sources)
        for self.node in traced.graph.nodes:
            node = self.node
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node, traced.sources.get(node), names)
            elif node in idle and node.target is not operator.getitem:
                self.values[node] = self._fixed_like(node.meta.get("val"))
            elif node.op == "call_function":
                self.values[node] = self._call(node, rules)
            elif node.op == "output":
                self._freeze_all(node.all_input_nodes, "reaches the model's output")

    def _placeholder(self, node: Node, source: tuple[str, str] | None, names: Mapping[str, str]) -> Any:
        if not isinstance(node.meta.get("val"), Tensor):
            return None
        if source is None or source[1] not in names:  # an input, or a constant of the module that is no buffer of it
            return self.fixed(self.out_shape)
        kind, name = source[0], names[source[1]]
        if name not in self.named:
            self.named[name] = self.axes.named(name, self.out_shape, kind)
        return self.named[name]

    def _call(self, node: Node, rules: Mapping[str, Rule]) -> Any:
        if node.target is operator.getitem:
            of, at = cast("tuple[Node, int]", node.args)
            source = self.values[of]
            return source[at] if isinstance(source, (list, tuple)) else source
        if node.meta.get("unused") and getattr(node.meta.get("val"), "shape", None) == ():
            return self.fixed(())  # a number for a log: taken of however many positions
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
        schema = schema_of(node.target).arguments
        bound = {a.name: a.default_value for a in schema if a.has_default_value()}
        bound |= {a.name: v for a, v in zip(schema, node.args, strict=False)} | node.kwargs
        wanted = _asked_by(rule)
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
        """A dimension of one position cannot lose it: broadcasting would take it for something else."""
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
        return self._fixed_like(value)

    def _fixed_like(self, value: Any) -> Any:
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
        """An in-place operator.

        Later readers of the tensor, and of every tensor that shares its memory, see the new content.
        """
        if not all(zero or self.axes.is_fixed(labels) for labels, zero in zip(value.dims, value.zero, strict=True)):
            for alias in sharing(node):
                held = self.values.get(alias)
                if held is not None:
                    self.values[alias] = (
                        [v.without_zero() for v in held] if isinstance(held, (list, tuple)) else held.without_zero()
                    )
        self.values[node] = value


def flat(values: Any) -> list[Value]:
    """The values of a node with one or several outputs."""
    return [v for v in (values if isinstance(values, (list, tuple)) else [values]) if isinstance(v, Value)]


@cache
def required_by(rule: Rule) -> frozenset[str]:
    """What a rule cannot do without; an overload of its operator that has no such argument is not the rule's."""
    return frozenset(n for n, p in list(signature(rule).parameters.items())[1:] if p.default is Parameter.empty)


@cache
def _asked_by(rule: Rule) -> tuple[str, ...]:
    """The names of a rule's arguments, but for the walk."""
    return tuple(signature(rule).parameters)[1:]
