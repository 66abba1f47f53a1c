"""A traced model, and what a node of its graph says of itself.

Its operator, its module, its sizes, and whose memory it shares.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from torch_flowprune.torch_internals import schema_of

LITERAL = "literal"
"""The name, with a number, of a placeholder for numbers that the code writes out."""
# these may hand their operand on as it is, which their schemas do not say
_HANDING_ON = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "type_as")


@dataclass(frozen=True)
class ModuleCall:
    """What a module was called with, and what it gave: one value, or a tuple or list of several.

    A node for each tensor, None for None, and an ellipsis for anything else.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


@dataclass(frozen=True)
class Traced:
    """The ATen operators of one forward.

    Attributes:
        graph: with a placeholder for each tensor from outside.
        sources: placeholders that are state of the model, as (parameter or buffer, name).
        program: what ``torch.export`` gave, where it was asked.
        depends: the statements that read numbers off tensors, where not each of these was tried.
        calls: the tensors in the arguments of each module's first call, None for the rest, where that was recorded.
        runs: that call and its result, as the code has them, where that was recorded.
    """

    graph: Graph
    sources: Mapping[Node, tuple[str, str]]
    program: ExportedProgram | None = None
    depends: str = ""
    calls: Mapping[str, Sequence[Node | None]] = field(default_factory=dict)
    runs: Mapping[str, ModuleCall] = field(default_factory=dict)


def operator_name(node: Node) -> str:
    """``aten.add_.Tensor`` -> ``add``: overloads share a rule, and so do the in-place forms."""
    return _target_name(node.target)


@cache
def _target_name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    name = str(getattr(packet or target, "__name__", target))
    if name.endswith("_") and not name.startswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name


def module_path(node: Node) -> str:
    """The module in whose forward the operator stands; repeated calls of one module share its path."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return str(path).split("@")[0]


def is_tellable_node(node: Node) -> bool:
    """Whether a smaller model can be told what the operator divides by: as recorded, or by a norm of torch's."""
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    return bool(node.meta.get("tellable", "torch.nn.modules." in str(stack[-1][1])))


def concrete(shape: Sequence[Any]) -> tuple[int, ...]:
    """Sizes in the example: of a free size its hint."""
    return tuple(s if isinstance(s, int) else int(s.node.hint) for s in shape)


def is_in_place(node: Node) -> bool:
    """True where the operator writes to its first operand."""
    schema = schema_of(node.target)
    return schema is not None and bool(schema.is_mutable) and bool(node.args)


def _is_view(node: Node) -> bool:
    """True where the result may share its first operand's memory, or is picked from results that do."""
    if node.target is operator.getitem or operator_name(node) in _HANDING_ON:
        return True
    schema = schema_of(node.target)
    return schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None


def handed_on(node: Node) -> Node:
    """Where operators gave the very tensor that they were given (``to``, ``contiguous``): what made it."""
    while "handed_on" in node.meta:
        node = node.meta["handed_on"]
    return node


def sharing(node: Node) -> list[Node]:
    """The nodes whose tensors may share memory with this one's: what it is a view of, and all views of that."""
    while node.op == "call_function" and _is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    nodes = [node]
    for member in nodes:
        readers = [user for user in member.users if user.op == "call_function" and user.args[:1] == (member,)]
        nodes += filter(_is_view, readers)
    return nodes


def idle_nodes(graph: Graph, state: Collection[Node]) -> set[Node]:
    """What is computed for no output: by hooks that look at values, say. They bind nothing.

    Not what reads parameters (state): a head that is idle in eval mode may be trained.
    """
    busy: set[Node] = set()
    for node in reversed(graph.nodes):
        read = node.op == "call_function" and "val" not in node.meta and not node.meta.get("unused")
        sized_by_values = torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())  # and the code reads sizes
        if node.op == "output" or is_in_place(node) or read or sized_by_values:
            busy.add(node)
        if node in busy:
            busy.update(node.all_input_nodes)
    idle = [node for node in graph.nodes if node.op == "call_function" and node not in busy]
    found = set(idle)
    waiting = [node for node in idle if any(source in state for source in node.all_input_nodes)]
    while waiting:
        node = waiting.pop()
        if node in found:
            found.remove(node)
            waiting += [other for other in (*node.users, *node.all_input_nodes) if other in found]
    return found


def is_of_whole_constants(node: Node, sources: Mapping[Node, tuple[str, str]]) -> bool:
    """Whether a value is computed of whole numbers alone that the model holds in buffers, and of sizes of inputs."""
    waiting, seen = [node], {node}
    while waiting:
        one = waiting.pop()
        if one.op == "placeholder":
            held = one in sources or one.name.startswith(LITERAL)
            if not held or one.meta["val"].dtype not in (torch.int64, torch.int32):  # bytes and truth values are flags
                return False
        elif torch.Tag.nondeterministic_seeded in getattr(one.target, "tags", ()):
            return False
        waiting += [other for other in one.all_input_nodes if other not in seen]
        seen.update(one.all_input_nodes)
    return True
