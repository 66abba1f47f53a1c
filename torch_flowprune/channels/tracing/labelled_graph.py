"""Reads a model: the graph of its operators, with every tensor labelled by the walk that leaves most to remove."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from torch_flowprune.channels.tracing.exported_program import program_of, twin
from torch_flowprune.channels.tracing.label_propagation import Rule, Site, Walk
from torch_flowprune.channels.tracing.labels import Axes, Solution, Value
from torch_flowprune.channels.tracing.nodes import Traced, is_in_place
from torch_flowprune.channels.tracing.paths import UnrecordableError, paths_of
from torch_flowprune.channels.tracing.recorder import no_tensors_in, recorded
from torch_flowprune.inputs import on_host, same_randomness
from torch_flowprune.torch_internals import tree_map_only

_ROUNDS = 10  # walks with different choices; the deepest nesting of choices seen in timm needed 4

_A_PART = "a part of it, the backbone say, can be read, pruned and shrunk by itself, on inputs of its own"


@dataclass
class Reading:
    """A model's graph(s), with the labels of every tensor and what follows from them.

    Attributes:
        unread: what is wrong with a training graph that reads further parameters; empty where nothing is.
        counts: operator and argument -> one label for each thing that the argument counts.
        spans: operator -> the dimension of its first operand whose positions it divides by, and their labels.
        aligned: axes of which kernels take multiples of a number of positions alone, and the number.
    """

    traced: dict[str, Traced]
    unread: str
    axes: Axes
    solution: Solution
    values: dict[Node, Any]
    counts: dict[tuple[Node, str], Tensor]
    spans: dict[Node, tuple[int, Tensor]]
    roles: dict[tuple[str, int], str]
    reads_zero: dict[tuple[str, int], bool]
    named: dict[str, Value]
    segments: list[Tensor]
    aligned: list[tuple[Tensor, int]]
    unknown: dict[str, int]
    unused: tuple[str, ...]


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> list[Traced]:
    """Recorded, path by path; what cannot be recorded, ``torch.export`` may know how to read.

    Raises:
        UnrecordableError: where neither reads it, or the model does not run on these inputs.
    """
    try:
        return paths_of(lambda answers: recorded(twin(model), args, kwargs, training, answers))
    except Exception as why:
        if not getattr(why, "by_export", True):  # an export would take what it holds for a constant
            raise UnrecordableError(f"the channels cannot be read off this model: {why}") from why
        try:
            return [program_of(model, args, kwargs, training)]
        except Exception as error:  # noqa: BLE001 - what torch.export says is of itself, not of the model
            raise UnrecordableError(_said_of(model, args, kwargs, why, error)) from why


def _said_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], why: Exception, error: Exception
) -> str:
    """What is wrong with a model that neither way can read, in a line."""
    if opaque := re.search(r"Found <class '(?:\w+\.)*(\w+)'> in output", str(error)):
        return no_tensors_in(opaque[1])
    if isinstance(why, UnrecordableError):
        return f"the channels cannot be read off this model: {why}; {_A_PART}"
    try:
        copied = twin(model).eval()
        with same_randomness(copied), torch.no_grad():
            copied(*tree_map_only(Tensor, torch.clone, args), **tree_map_only(Tensor, torch.clone, dict(kwargs)))
    except Exception as own:  # noqa: BLE001 - the model's own words
        line = next(iter(str(own).splitlines()), "")
        return f"the model does not run on the example inputs: {type(own).__name__}: {line}"
    return f"the channels cannot be read off this model: its code fails when it is watched: {type(why).__name__}: {why}"


def read(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rules: Mapping[str, Rule],
    evaluated: Traced | None = None,
) -> Reading:
    """Label the graph in eval mode (``evaluated``, if at hand), and in train mode where that makes more of parameters.

    Those that eval mode does not read, and those of heads that it computes and gives to nobody.
    """
    names = canonical_names(model)
    traced = _by_path("eval", [evaluated] if evaluated else trace(model, args, kwargs, False))
    unused = _unused_parameters(model, traced.values(), names)
    error = ""
    if unused or _lead_nowhere(traced.values()):
        try:
            traced |= _by_path("train", trace(model, args, kwargs, True))
            unused = _unused_parameters(model, traced.values(), names)
        except Exception as e:  # noqa: BLE001 - whatever the training forward raises, what only training reads is then frozen
            error = f"its training graph, which reads further parameters, cannot be read: {type(e).__name__}"
    _check_all_read(model, traced, unused)
    return _labelled(traced, names, rules, error, unused)


def relabelled(reading: Reading, model: nn.Module, rules: Mapping[str, Rule]) -> Reading:
    """The same graphs, where of two factors of a dimension the inner one may lose positions: narrower heads."""
    return _labelled(reading.traced, canonical_names(model), rules, reading.unread, reading.unused, inner=True)


def _labelled(
    traced: dict[str, Traced],
    names: Mapping[str, str],
    rules: Mapping[str, Rule],
    error: str,
    unused: tuple[str, ...],
    *,
    inner: bool = False,
) -> Reading:
    walk, solution = _best_walk(traced, names, rules, error, inner)
    return Reading(
        traced,
        error,
        walk.axes,
        solution,
        walk.values,
        walk.counts,
        walk.spans,
        walk.roles,
        walk.reads_zero,
        walk.named,
        walk.segments,
        walk.aligned,
        walk.unknown,
        unused,
    )


def _by_path(mode: str, graphs: Sequence[Traced]) -> dict[str, Traced]:
    """The graphs of one mode: that of the example under the mode's name, other paths with a number."""
    return {f"{mode} {number}" if number else mode: graph for number, graph in enumerate(graphs)}


def _check_all_read(model: nn.Module, traced: Mapping[str, Traced], unused: Sequence[str]) -> None:
    """Where values decide what runs, a layer that did not run may run on other inputs, on channels that were cut."""
    depends = next((graph.depends for graph in traced.values() if graph.depends), "")
    layers = [name for name, p in model.named_parameters() if name in unused and p.ndim > 1]
    if depends and layers:
        raise UnrecordableError(
            f"values decide what runs ({depends}), and {layers[0]} and {len(layers) - 1} more did not run: give "
            "example_inputs on which all layers run"
        )


@on_host()
def _best_walk(
    traced: Mapping[str, Traced], names: Mapping[str, str], rules: Mapping[str, Rule], error: str, inner: bool
) -> tuple[Walk, Solution]:
    """Walks with one set of choices after another; the one that leaves most positions of parameters removable."""
    choices: dict[str, int] = {}
    best: tuple[int, Walk, Solution] | None = None
    for _ in range(_ROUNDS):
        walk = Walk(dict(choices), inner=inner)
        for prefix, graph in traced.items():
            walk.prefix = f"{prefix}:"
            walk.run(graph, names, rules)
        if error:
            for value in walk.named.values():
                for labels in value.dims:
                    walk.axes.freeze(labels, error)
        solution = walk.axes.solve()
        won = _free_positions(walk.axes, solution)
        if best is None or won > best[0]:
            best = (won, walk, solution)
        if not _advance(choices, walk.sites, solution):
            break
    assert best is not None
    return best[1], best[2]


def _advance(choices: dict[str, int], sites: Mapping[str, Site], solution: Solution) -> bool:
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


def _free_positions(axes: Axes, solution: Solution) -> int:
    """How many positions of parameters can be removed."""
    return int((~solution.frozen(axes.places()[2])).sum())


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor: tied tensors are one."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names[name] = first.setdefault(id(tensor), name)
    return names


def _lead_nowhere(traced: Iterable[Traced]) -> bool:
    """Whether parameters are read for what no output is made of; what is written somewhere is not followed further."""
    read, heard = set[str](), set[str]()
    for graph in traced:
        leads: dict[Node, bool] = {}
        for node in reversed(graph.graph.nodes):
            leads[node] = (
                node.op == "output"
                or (node.op == "call_function" and is_in_place(node))
                or any(leads[user] for user in node.users)
            )
        named = {node: name for node, (kind, name) in graph.sources.items() if kind == "parameter" and node.users}
        read.update(named.values())
        heard.update(name for node, name in named.items() if leads[node])
    return not read <= heard


def _unused_parameters(model: nn.Module, traced: Iterable[Traced], names: Mapping[str, str]) -> tuple[str, ...]:
    """Parameters that no graph reads."""
    used = {
        names[name]
        for graph in traced
        for node, (kind, name) in graph.sources.items()
        if kind == "parameter" and node.users
    }
    return tuple(n for n, _ in model.named_parameters() if n not in used)
