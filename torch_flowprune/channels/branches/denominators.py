"""What a branch divides by, or takes a logarithm of: zeros there would make it infinite, not zero."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch.fx import Node

from torch_flowprune.channels.branches.residual_sums import Region
from torch_flowprune.channels.branches.vanishing import operands_of
from torch_flowprune.channels.tracing import handed_on, operator_name

_OF_FIRST = ("rsqrt", "reciprocal", "log", "log2", "log10", "sqrt", "std", "logit", "acosh", "lgamma", "digamma")
_OF_SECOND = ("div", "divide", "true_divide", "floor_divide", "remainder", "fmod")
_FLOORS = ("clamp_min", "clamp", "maximum")


def divided_by(region: Region, parameters: Mapping[str, Node]) -> set[str]:
    """The parameters of a branch, name -> node, that reach a place where zero has no finite value or slope."""
    reached: set[Node] = set()
    for node in region.nodes:
        if node.op == "call_function":
            reached |= {one for operand in _singular(node) for one in _behind(operand, region.nodes)}
    return {name for name, node in parameters.items() if node in reached}


def _singular(node: Node) -> Iterator[Node]:
    """The operands of an operator that should not be zero, but for those that are held away from it."""
    name, operands = operator_name(node), operands_of(node)
    if name in _OF_FIRST or (name == "pow" and _is_below_one(operands.get("exponent"))):
        asked: Any = operands.get("self", operands.get("input"))
    elif name in _OF_SECOND:
        asked = operands.get("other")
    else:
        return
    if isinstance(asked, Node) and not _is_held_away(handed_on(asked)):
        yield handed_on(asked)


def _is_below_one(exponent: Any) -> bool:
    return not (isinstance(exponent, (int, float)) and exponent >= 1)


def _is_held_away(node: Node) -> bool:
    """By a constant that is added, or a lower bound."""
    while node.op == "call_function" and operator_name(node) in ("expand_as", "expand", "unsqueeze", "view", "reshape"):
        node = handed_on(node.args[0])  # type: ignore[arg-type]
    if node.op != "call_function":
        return False
    name, operands = operator_name(node), operands_of(node)
    if name == "add":
        other = operands["other"]
        return isinstance(other, (int, float)) and other > 0
    return name in _FLOORS and isinstance(operands.get("min"), (int, float)) and operands["min"] > 0


def _behind(node: Node, inside: Collection[Node]) -> set[Node]:
    """What a result is computed from, as far as that is in the branch."""
    seen, waiting = set[Node](), [node]
    while waiting:
        one = waiting.pop()
        if one in inside and one not in seen:
            seen.add(one)
            waiting += map(handed_on, one.all_input_nodes)
    return seen
