"""What a forward does otherwise in train mode: two graphs of it, laid side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from torch_flowprune.channels.tracing import operator_name
from torch_flowprune.torch_internals import schema_of

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Modes:
    """The difference that modes make.

    Attributes:
        changes: node of the eval graph -> name of an argument -> its values in eval and in train mode.
        counters: the modules whose batches are counted in train mode.
        in_eval: the modules that have to stay in eval mode.
    """

    changes: Mapping[Node, Mapping[str, tuple[Any, Any]]] = field(default_factory=dict)
    counters: tuple[str, ...] = ()
    in_eval: tuple[str, ...] = ()


def modes_of(evaluated: ExportedProgram, trained: ExportedProgram) -> Modes | None:
    """None where the two graphs differ in more than what operators are told."""
    ours, theirs = _by_target(evaluated), _by_target(trained)
    counting = [node for node in _calls(trained) if _counter_of(node, theirs)]
    calls = [node for node in _calls(trained) if node not in counting]
    if len(calls) != len(list(_calls(evaluated))):
        return None
    by_name = {name: node for node, name in ours.items()}
    pairs = {node: by_name[name] for node, name in theirs.items() if name in by_name}
    changes: dict[Node, dict[str, tuple[Any, Any]]] = {}
    for node, other in zip(_calls(evaluated), calls, strict=True):
        pairs[other] = node
        changed = _changed(node, other, pairs)
        if changed is None:
            return None
        if changed:
            changes[node] = changed
    return Modes(changes, tuple(dict.fromkeys(_counter_of(node, theirs).rpartition(".")[0] for node in counting)))


def _by_target(program: ExportedProgram) -> dict[Node, str]:
    """The placeholders, by what they stand for."""
    targets = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.kind is not InputKind.USER_INPUT}
    return {n: str(targets.get(n.name) or n.name) for n in program.graph.nodes if n.op == "placeholder"}


def _calls(program: ExportedProgram) -> Iterator[Node]:
    return (node for node in program.graph.nodes if node.op == "call_function")


def _counter_of(node: Node, named: Mapping[Node, str]) -> str:
    """The counter of batches that an operator adds one to."""
    first = node.args[0] if operator_name(node) == "add" and node.args else None
    name = named.get(first, "") if isinstance(first, Node) else ""
    return name if name.endswith(_COUNTER) and not node.users else ""


def _changed(node: Node, other: Node, pairs: Mapping[Node, Node]) -> dict[str, tuple[Any, Any]] | None:
    """What the second is told otherwise; None where it is another operator, or told of other tensors."""
    if node.target != other.target or (schema_of(node.target) is None and node.args[1:] != other.args[1:]):
        return None
    ours, theirs = _arguments_by_name(node), _arguments_by_name(other)
    changed: dict[str, tuple[Any, Any]] = {}
    for name, one in ours.items():
        two = theirs[name]
        if torch.fx.node.map_arg(two, lambda n: pairs.get(n, n)) != one:
            if _nodes_in(one) or _nodes_in(two):
                return None
            changed[name] = (one, two)
    return changed


def _arguments_by_name(node: Node) -> dict[str, Any]:
    """The arguments of a call by name; the operator of what has no schema picks one of several results."""
    schema = schema_of(node.target)
    if schema is None:
        return {"source": node.args[0]}
    told = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
    return told | {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | node.kwargs


def _nodes_in(value: Any) -> Sequence[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(value, found.append)
    return found
