"""Which modules nothing is left of once some branches are gone, and what has to stand in their places."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from typing import Any

from torch import nn
from torch.fx import Node

from torch_flowprune.channels.branches import Owned, RunningGraph, SumOf, is_sum, shape_of, sum_of, zeros_among
from torch_flowprune.channels.shrinking.removed_branches.stand_in import VALUE, Argument, StandInSpec
from torch_flowprune.channels.tracing import ModuleCall, handed_on, is_in_place, module_path, operator_name

_RESHAPING = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")


@dataclass(frozen=True)
class Style:
    """A way to take branches out.

    Attributes:
        whole: whether modules that then give what they are given are taken out in whole.
        exact: whether every module that is taken out gives a tensor of the shape that it gave; else those in the
            middle of a branch hand on what they are given, which saves the work on larger ones.
    """

    whole: bool
    exact: bool


STYLES = (Style(True, False), Style(True, True), Style(False, False), Style(False, True))


@dataclass(eq=False)
class Vacancies:
    """The places of modules that go with some branches."""

    model: nn.Module
    graph: RunningGraph
    branches: Sequence[Owned]
    zero: Collection[str]
    style: Style
    found: dict[str, StandInSpec] = field(default_factory=dict)
    places: dict[str, bool] = field(default_factory=dict)

    def standings(self) -> dict[str, StandInSpec] | None:
        """Module path -> what stands there; None where a branch would not add zero then."""
        self._visit("", self.model)
        return self.found if all(map(self._ends, self.branches)) else None

    @cached_property
    def gone(self) -> set[str]:
        return {name for one in self.branches for name in one.parameters}

    @cached_property
    def inside(self) -> set[Node]:
        return {node for one in self.branches for node in one.nodes}

    @cached_property
    def sums(self) -> dict[Node, SumOf]:
        """By the nodes of a sum, those of removed branches."""
        regions = [region for one in self.branches for region in one.regions]
        found = {region.total: sum_of(self.graph, region.total) for region in regions}
        return {node: one for one in found.values() for node in one.nodes}

    @cached_property
    def vanished(self) -> set[Node]:
        """What is zero as it is: of branches that went before."""
        return zeros_among([node for node in self.graph.nodes if node.op == "call_function"], ())

    @cached_property
    def ends(self) -> set[Node]:
        return {region.end for one in self.branches for region in one.regions}

    def _visit(self, path: str, module: nn.Module) -> None:
        standing = self._standing_of(path, module) if path else None
        if standing is not None:
            self.found[path] = replace(standing, names=_names_of(module))
            return
        for name, child in module.named_children():
            self._visit(f"{path}.{name}" if path else name, child)

    def _standing_of(self, path: str, module: nn.Module) -> StandInSpec | None:
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        run = self.graph.traced.runs.get(path)
        if run is None or not own or not own <= self.gone:
            return None
        if self._is_in_branch(path):
            return self._of_branch(path, run)
        under = [node for node in self._under(path) if self.graph.users[node]]
        is_list = type(module).forward is nn.Sequential.forward  # which others count and index
        return self._of_block(run, under) if self.style.whole and not is_list else None

    def _of_block(self, run: ModuleCall, under: Sequence[Node]) -> StandInSpec | None:
        """Of a module that hands on what it is given."""
        value = _tensor_given(run.result)
        if value is None:
            return None
        chain = list(self._chain(value))
        arguments = {handed_on(node): argument for argument, node in reversed(_tensors_taken(run))}
        reads = next(
            (arguments[node] for node in chain if node in arguments and shape_of(node) == shape_of(value)), None
        )
        known = {*self.inside, *chain, *self.sums, *self.vanished}
        if reads is None or not all(node in known for node in under):
            return None
        return _formed(run, reads, None, self.graph, under)

    def _chain(self, node: Node) -> Iterator[Node]:
        """A tensor, and those that it is equal to once the branches are gone, entry by entry in order."""
        while True:
            node = handed_on(node)
            yield node
            if (left := self._left_of(node)) is not None:
                node = left
            elif node.op == "call_function" and operator_name(node) in (*_RESHAPING, "contiguous", "clone", "alias"):
                node = self.graph.reads[node][0]
            elif (before := self._rectified(node)) is not None:
                node = before
            else:
                return

    def _rectified(self, node: Node) -> Node | None:
        """What a rectifier is given, where one gave that already."""
        if node.op != "call_function" or operator_name(node) != "relu":
            return None
        given = self.graph.reads[node][0]
        last = given
        while (left := self._left_of(last)) is not None:
            last = handed_on(left)
        return given if last.op == "call_function" and operator_name(last) == "relu" else None

    def _left_of(self, node: Node) -> Node | None:
        """Of a sum what is left of it, where that is one tensor as it was."""
        total = self.sums.get(node) or (sum_of(self.graph, node) if is_sum(node) else None)
        if total is None or not total.is_plain:
            return None
        rest = [one for one in total.addends if one not in self.ends and one not in self.vanished]
        return rest[0] if len(rest) == 1 else None

    def _of_branch(self, path: str, run: ModuleCall) -> StandInSpec | None:
        """Of a module that is in a branch."""
        value = _tensor_given(run.result)
        source = next(((at, node) for at, node in _tensors_taken(run) if _is_of_numbers(node)), None)
        if value is None or source is None or (shape := shape_of(value)) is None:
            return None
        given = shape_of(source[1]) or ()
        last = self._is_last(path)
        if last or self.style.exact or (handed_on(source[1]) not in self.inside and self._is_overwritten):
            if len(given) != len(shape):
                return None
            sizes = {i - len(shape): n for i, (n, m) in enumerate(zip(shape, given, strict=True)) if n != m}
            return _formed(run, source[0], sizes, self.graph, self._under(path))
        return _formed(run, source[0], None, self.graph, self._under(path))

    def _under(self, path: str) -> list[Node]:
        return [node for node in self.graph.nodes if _is_under(node, path)]

    @cached_property
    def _is_overwritten(self) -> bool:
        """Whether code of a branch writes in place, which would reach what is handed on."""
        return any(node.op == "call_function" and is_in_place(node) for node in self.inside)

    def _is_last(self, path: str) -> bool:
        """Whether what a module gives reaches the end of its branch past no other module with parameters."""
        waiting = [region.end for one in self.branches for region in one.regions]
        seen = set[Node]()
        while waiting:
            node = waiting.pop()
            if node in seen or node not in self.inside:
                continue
            seen.add(node)
            if _is_under(node, path):
                return True
            if not self._is_in_branch(module_path(node) if node.op == "call_function" else ""):
                waiting += self.graph.reads[node]
        return False

    def _is_in_branch(self, path: str) -> bool:
        """Whether a module has parameters, and is in branches with all that runs in it."""
        if path not in self.places:
            own = [f"{path}.{name}" for name, _ in self.model.get_submodule(path).named_parameters()] if path else []
            live = (node for node in self._under(path) if self.graph.users[node])
            self.places[path] = bool(own) and self.gone.issuperset(own) and all(node in self.inside for node in live)
        return self.places[path]

    def _ends(self, one: Owned) -> bool:
        """Whether a branch adds zero with these in the places of its modules."""
        values = [node for path in self.found for node in self._given_by(path) if self.found[path].sizes is not None]
        zero = [node for node, (_, name) in self.graph.traced.sources.items() if name in self.zero]
        inside = [node for node in self.graph.nodes if node in one.nodes and self._runs(node)]
        known = zeros_among(inside, [*values, *zero])
        return all(region.end in known or self._is_taken(region.total) for region in one.regions)

    def _given_by(self, path: str) -> list[Node]:
        """What code outside of a module reads of it, at each of its calls."""
        under = set(self._under(path))
        return [node for node in under if not under.issuperset(self.graph.users[node])]

    def _runs(self, node: Node) -> bool:
        return node.op == "call_function" and not self._is_taken(node)

    def _is_taken(self, node: Node) -> bool:
        return any(_is_under(node, path) for path in self.found)


def _is_under(node: Node, path: str) -> bool:
    at = module_path(node) if node.op == "call_function" else ""
    return at == path or at.startswith(f"{path}.")


def _names_of(module: nn.Module) -> tuple[str, ...]:
    """The arguments that a module's code takes by position; none where it takes any number."""
    try:
        parameters = list(signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return ()
    by_position = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return () if any(one.kind is one.VAR_POSITIONAL for one in parameters) else tuple(by_position)


def _tensor_given(result: Any) -> Node | None:
    """The tensor that a module gives, the first of several."""
    if isinstance(result, (tuple, list)) and result:
        result = result[0]
    return handed_on(result) if isinstance(result, Node) else None


def _tensors_taken(run: ModuleCall) -> list[tuple[Argument, Node]]:
    named: list[tuple[Argument, Any]] = [*enumerate(run.args), *run.kwargs.items()]
    return [(argument, value) for argument, value in named if isinstance(value, Node)]


def _is_of_numbers(node: Node) -> bool:
    return bool(node.meta["val"].is_floating_point())


def _formed(
    run: ModuleCall, reads: Argument, sizes: dict[int, int] | None, graph: RunningGraph, under: Collection[Node]
) -> StandInSpec | None:
    """In the form that the module's code gave; None where more of it is read than the first tensor."""
    if isinstance(run.result, Node):
        return StandInSpec(reads, sizes)
    arguments, seen = {node: argument for argument, node in reversed(_tensors_taken(run))}, set(under)
    gives: list[Argument | None] = [VALUE]
    for part in run.result[1:]:
        if isinstance(part, Node) and part in arguments:
            gives.append(arguments[part])
        elif part is None or (isinstance(part, Node) and set(graph.users[handed_on(part)]) <= seen):
            gives.append(None)
        else:
            return None
    return StandInSpec(reads, sizes, tuple(gives), isinstance(run.result, list))
