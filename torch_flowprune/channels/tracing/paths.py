"""The paths that a forward takes where its code reads numbers off tensors: each is recorded, and all are read as one.

A number that is read may be kept for a log, bake into an operator, or decide which code runs. The forward is recorded
again with another answer in its place: a truth value turned round, a whole number one more and one less, another number
zero and far off on both sides. Where the graph is the same the number guards nothing. Where it is another, what either
couples or freezes holds. Where the code fails on the answer, there is no such path. Whole numbers, and the sizes of
what a mask picks, are taken for sizes, as those of the inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, Node

from torch_flowprune.channels.tracing.nodes import Traced, is_in_place

MOST_READ = 64  # numbers that one forward may read, besides those made of whole numbers that the model holds
_MOST_PATHS = 96  # forwards that are recorded, in all

Answers = Mapping[int, Any]


class UnrecordableError(RuntimeError):
    """What was seen of the forward may not be what another input would show.

    Attributes:
        by_export: whether ``torch.export`` may know better.
    """

    by_export = True


@dataclass(frozen=True)
class Read:
    """A number that the code read off a tensor, and where.

    Attributes:
        is_size: whether it can be no other: kernels that are told another one read past the end of memory.
        is_constant: whether it is made of whole numbers that the model holds.
    """

    node: Node
    value: Any
    place: str
    is_size: bool = False
    is_constant: bool = False

    def may_differ(self, reads: int) -> bool:
        """Whether other answers are tried; a constant is taken as it is where the code reads that many numbers."""
        return not self.is_size and not (self.is_constant and reads > MOST_READ)

    def has_all_its_paths(self, reads: int) -> bool:
        """Whether each answer that there can be is tried: both of a truth value; of numbers, there are more."""
        return isinstance(self.value, bool) and self.may_differ(reads)


Recording = tuple[Traced, Sequence[Read]]


def paths_of(record: Callable[[Answers], Recording]) -> list[Traced]:
    """The graphs of a forward: that of the example first, then those that other answers lead to.

    Raises:
        UnrecordableError: where there are too many to be recorded, or one of them cannot be.
    """
    first, reads = record({})
    found, taken, failed = [first], {str(first.graph)}, dict[str, None]()
    waiting: list[tuple[Answers, Traced, Sequence[Read], int]] = [({}, first, reads, 0)]
    forwards = 1
    while waiting:
        answers, graph, reads, start = waiting.pop()
        guards: set[Node] = set()
        for at in range(start, len(reads)):
            for other in _other_answers(reads[at].value) if reads[at].may_differ(len(reads)) else ():
                forwards += 1
                if forwards > _MOST_PATHS:
                    raise UnrecordableError(f"the code takes too many paths by values, {reads[at].place} among them")
                path = _path(record, {**answers, at: other})
                if path is None:
                    failed[reads[at].place] = None
                if path is None or str(path[0].graph) == str(graph.graph):
                    continue
                guards.add(reads[at].node)
                if str(path[0].graph) not in taken:
                    taken.add(str(path[0].graph))
                    found.append(path[0])
                    waiting.append(({**answers, at: other}, *path, at + 1))
        _mark_unused(graph.graph, {read.node for read in reads[start:]} - guards)
    # on these inputs: on others the code may go on
    return [replace(first, depends=", ".join(filter(None, (first.depends, *failed)))), *found[1:]]


def _path(record: Callable[[Answers], Recording], answers: Answers) -> Recording | None:
    try:
        return record(answers)
    except UnrecordableError:
        raise
    except Exception:  # noqa: BLE001 - the code does not go on with this answer: a check of its own, or a size that fails
        return None


def _other_answers(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, *([value - 1] if value > 1 else [])]
    far = 1e6 * (1.0 + abs(value)) if abs(value) < 1e30 else 1.0
    return [type(value)(other) for other in (0.0, far, -far)]


def _mark_unused(graph: Graph, unused: set[Node]) -> None:
    """Mark what is computed only for numbers that guard nothing: whatever it is, it matters to nobody."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not is_in_place(node):
            node.meta["unused"] = node in unused or (
                bool(node.users) and all(user.meta.get("unused", False) for user in node.users)
            )
