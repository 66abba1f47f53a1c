"""A recorded graph as branches are read off it: without operators that hand on the tensor that they are given."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush

from torch import Tensor
from torch.fx import Node

from torch_flowprune.channels.tracing import Traced, handed_on, is_in_place, operator_name, sharing

_OF_SIZES_ALONE = tuple(f"{kind}_like" for kind in ("zeros", "ones", "full", "empty")) + tuple(
    f"new_{kind}" for kind in ("zeros", "ones", "full", "empty")
)
"""Operators that read of a tensor how large it is."""


@dataclass(frozen=True, eq=False)
class RunningGraph:
    """What reads what.

    Attributes:
        traced: the graph that was recorded.
    """

    traced: Traced

    @cached_property
    def nodes(self) -> list[Node]:
        """All but those that hand on, in the order in which they run; what comes from outside first."""
        return [node for node in self.traced.graph.nodes if "handed_on" not in node.meta]

    @cached_property
    def index(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def reads(self) -> dict[Node, list[Node]]:
        return {
            node: []
            if operator_name(node) in _OF_SIZES_ALONE
            else list(dict.fromkeys(map(handed_on, node.all_input_nodes)))
            for node in self.nodes
        }

    @cached_property
    def users(self) -> dict[Node, list[Node]]:
        """What is written to a part of a tensor is read by whoever reads that; what nobody reads reads nothing."""
        users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in reversed(self.nodes):
            if users[node] or node.op != "call_function" or "val" not in node.meta:
                readers = dict.fromkeys(self.reads[node], node)
            else:
                written = self._written_by(node)
                readers = dict.fromkeys(set(self.reads[node]) - set(written), written[0]) if written else {}
            for one, reader in readers.items():
                users[one].append(reader)
        return users

    def _written_by(self, node: Node) -> list[Node]:
        """What shares the memory that an operator writes to, the whole of it first; nothing where it writes to none."""
        if not is_in_place(node) or not isinstance(first := node.args[0], Node):
            return []
        return list(dict.fromkeys(map(handed_on, sharing(first))))

    def is_parameter(self, node: Node) -> bool:
        return self.traced.sources.get(node, ("", ""))[0] == "parameter"

    def is_state(self, node: Node) -> bool:
        """A parameter or buffer."""
        return node in self.traced.sources

    def feeding(self, end: Node) -> frozenset[Node]:
        """What runs for the sake of this result alone, and the parameters that only that reads; with the result."""
        inside, waiting, seen = {end}, [-self.index[one] for one in self.reads[end]], set[int]()
        heapify(waiting)
        while waiting:
            at = -heappop(waiting)
            node = self.nodes[at]
            if at in seen or not all(user in inside for user in self.users[node]):
                continue
            seen.add(at)
            if node.op == "call_function" or self.is_parameter(node):
                inside.add(node)
                for one in self.reads[node]:
                    heappush(waiting, -self.index[one])
        return frozenset(inside)

    def read_from_outside(self, inside: Collection[Node]) -> set[Node]:
        """What is computed elsewhere, or given, and read here."""
        return {one for node in inside for one in self.reads[node] if one not in inside and not self.is_state(one)}

    def writes_outside(self, inside: Collection[Node]) -> bool:
        """Whether an operator among these writes to memory that others see."""
        writers = (node for node in inside if node.op == "call_function" and is_in_place(node))
        written = (
            handed_on(one) for node in writers if isinstance(first := node.args[0], Node) for one in sharing(first)
        )
        return any(one not in inside for one in written)

    def comes_of(self, nodes: Iterable[Node], origins: Collection[Node]) -> bool:
        """Whether these are computed from any of the origins, or are one."""
        first = min(self.index[one] for one in origins)
        waiting, seen = list(nodes), set[Node]()
        while waiting:
            node = waiting.pop()
            if node in origins:
                return True
            if node not in seen and self.index[node] > first:
                seen.add(node)
                waiting += self.reads[node]
        return False


def shape_of(node: Node) -> tuple[int, ...] | None:
    """Of the tensor that a node stands for; None where it stands for something else."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None
