"""The residual branches of a model, read off its graphs: which parameters each owns, and what runs for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch.fx import Node

from torch_flowprune.channels.branches.denominators import divided_by
from torch_flowprune.channels.branches.residual_sums import Region, regions_of
from torch_flowprune.channels.branches.running_graph import RunningGraph
from torch_flowprune.channels.branches.vanishing import zeros_among
from torch_flowprune.channels.groups import Branch
from torch_flowprune.channels.tracing import Reading, Traced


@dataclass(frozen=True, eq=False)
class Owned:
    """A branch in one graph: where it runs, at several places if its layers are called several times.

    Attributes:
        regions: these places.
        parameters: what nothing else reads, name -> its node.
    """

    regions: tuple[Region, ...]
    parameters: Mapping[str, Node]

    @property
    def nodes(self) -> set[Node]:
        return {node for region in self.regions for node in region.nodes}

    @property
    def size(self) -> int:
        return sum(node.meta["val"].numel() for node in self.parameters.values())

    @property
    def operators(self) -> tuple[str, ...]:
        return tuple(sorted(str(node.target) for node in self.nodes if node.op == "call_function"))

    def ends_with(self, graph: RunningGraph, zero: Collection[str]) -> bool:
        """Whether nothing is added once these parameters are zero."""
        inside = sorted((node for node in self.nodes if node.op == "call_function"), key=graph.index.__getitem__)
        sources = [node for node, (_, name) in graph.traced.sources.items() if name in zero]
        vanished = zeros_among(inside, sources)
        return all(region.end in vanished for region in self.regions)


def read_branches(reading: Reading) -> dict[str, tuple[Branch, Owned]]:
    """By name, in the order in which they run; ``Owned`` is of the graph in eval mode.

    A branch inside another is one of its own where it holds most of what the other does; else the other is.
    """
    found = _without_overlaps(_owned_in(RunningGraph(reading.traced["eval"])))
    others = [_Other.of(graph) for mode, graph in reading.traced.items() if mode != "eval"]
    kept = [one for one in found if all(other.agrees(frozenset(one.parameters)) for other in others)]
    names = _branch_names([_layers_of(one) for one in kept])
    branches = (
        Branch(name, tuple(one.parameters), _masked(one), one.operators) for name, one in zip(names, kept, strict=True)
    )
    return {branch.name: (branch, one) for branch, one in zip(branches, kept, strict=True)}


@dataclass(frozen=True)
class _Other:
    """A graph of another mode, or path: what its branches own, and which parameters it reads."""

    branches: set[frozenset[str]]
    read: set[str]

    @classmethod
    def of(cls, graph: Traced) -> _Other:
        read = {name for node, (kind, name) in graph.sources.items() if kind == "parameter" and node.users}
        return cls({frozenset(one.parameters) for one in _owned_in(RunningGraph(graph))}, read)

    def agrees(self, parameters: frozenset[str]) -> bool:
        """Whether a branch of these is one here too, or does not run."""
        return parameters in self.branches or not parameters & self.read


def _owned_in(graph: RunningGraph) -> list[Owned]:
    """All that the zeros of their own parameters end; layers that several branches share are one branch."""
    regions = list(regions_of(graph))
    alone = [Owned((region,), _owned_by(graph, [region])) for region in regions]
    found = [one for one in alone if one.parameters and one.ends_with(graph, one.parameters)]
    rest = [one.regions[0] for one in alone if one not in found]
    for some in _sharing(graph, rest):
        together = Owned(tuple(some), _owned_by(graph, some))
        found += [together] if together.parameters and together.ends_with(graph, together.parameters) else []
    return sorted(found, key=lambda one: graph.index[one.regions[0].total])


def _owned_by(graph: RunningGraph, regions: Sequence[Region]) -> dict[str, Node]:
    """The parameters that nothing but these reads."""
    inside = {node for region in regions for node in region.nodes}
    read = {one for region in regions for one in _parameters_read(graph, region)}
    own = sorted((one for one in read if inside.issuperset(graph.users[one])), key=graph.index.__getitem__)
    return {graph.traced.sources[one][1]: one for one in own}


def _parameters_read(graph: RunningGraph, region: Region) -> set[Node]:
    return {one for node in region.nodes for one in graph.reads[node] if graph.is_parameter(one)}


def _sharing(graph: RunningGraph, regions: Sequence[Region]) -> Iterator[list[Region]]:
    """Regions that read a parameter of each other's, of which there are several."""
    waiting = [(region, _parameters_read(graph, region)) for region in regions]
    while waiting:
        first, read = waiting.pop(0)
        same = [first]
        while more := [pair for pair in waiting if pair[1] & read]:
            waiting = [pair for pair in waiting if not pair[1] & read]
            same += [region for region, _ in more]
            read = read.union(*(own for _, own in more))
        if len(same) > 1:
            yield same


def _without_overlaps(found: Sequence[Owned]) -> list[Owned]:
    """Without overlaps: of a branch and those inside of it whichever holds more of its parameters."""
    kept = list(found)
    for outer in sorted(found, key=lambda one: len(one.nodes)):
        inner = [one for one in kept if one is not outer and one.parameters.keys() & outer.parameters.keys()]
        if outer not in kept or not inner:
            continue
        if sum(one.size for one in inner) > outer.size / 2:
            kept.remove(outer)
        else:
            kept = [one for one in kept if one not in inner]
    return kept


def _masked(one: Owned) -> tuple[str, ...]:
    """All but those that, zero, something would be divided by; those that end the branch in any case."""
    dividing = {name for region in one.regions for name in divided_by(region, one.parameters)}
    return tuple(name for name in one.parameters if name not in dividing)


def _layers_of(one: Owned) -> list[str]:
    """The modules of the parameters that make up most of a branch."""
    wide = [name for name, node in one.parameters.items() if node.meta["val"].ndim > 1]
    return [name.rpartition(".")[0] for name in wide or one.parameters]


def _branch_names(modules: Sequence[Sequence[str]]) -> list[str]:
    """The path that all layers of a branch have in common; its parts, where another branch is under that path too."""
    paths = [_common(some) for some in modules]
    names = []
    for path, some in zip(paths, modules, strict=True):
        under = [other for other in paths if other == path or other.startswith(f"{path}." if path else "")]
        names.append(path if len(under) == 1 and path else _parts(path, some))
    counts, seen = Counter(names), Counter[str]()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = f"{name}#{seen[name]}" if counts[name] > 1 and seen[name] > 1 else name
    return names


def _common(paths: Iterable[str]) -> str:
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _parts(path: str, modules: Sequence[str]) -> str:
    depth = len(path.split(".")) if path else 0
    parts = dict.fromkeys(module.split(".")[depth] for module in modules if module != path)
    return ".".join(filter(None, (path, "+".join(parts)))) or "block"
