"""Reads a model: the graph of its operators, with every tensor labelled by the walk that leaves most to remove."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node

from torch_flowprune.channels.tracing.label_propagation import Rule, Site, Walk
from torch_flowprune.channels.tracing.labels import Axes, Solution, Value
from torch_flowprune.channels.tracing.nodes import Traced, is_in_place
from torch_flowprune.channels.tracing.paths import UnrecordableError, paths_of
from torch_flowprune.channels.tracing.recorder import no_tensors_in, recorded
from torch_flowprune.inputs import copied_model, on_host, same_randomness
from torch_flowprune.torch_internals import tree_map_only

_ROUNDS = 10  # walks with different choices; the deepest nesting of choices seen in timm needed 4


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


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares parameters and constants.

    What tracing writes (caches, running statistics) the model never sees.
    """
    shared = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    shared += model.parameters()
    return copied_model(model, {id(t): t for t in shared})


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
        return f"the channels cannot be read off this model: {why}"
    try:
        copied = twin(model).eval()
        with same_randomness(copied), torch.no_grad():
            copied(*tree_map_only(Tensor, torch.clone, args), **tree_map_only(Tensor, torch.clone, dict(kwargs)))
    except Exception as own:  # noqa: BLE001 - the model's own words
        line = next(iter(str(own).splitlines()), "")
        return f"the model does not run on the example inputs: {type(own).__name__}: {line}"
    return f"the channels cannot be read off this model: its code fails when it is watched: {type(why).__name__}: {why}"


def program_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool | None, sizes: Any = None
) -> Traced:
    """As ``torch.export`` gives it. training: None for the model as it is. sizes: dynamic shapes, as it takes them."""
    copied = twin(model) if training is None else twin(model).train(training)
    with torch.random.fork_rng(), warnings.catch_warnings(), _without_stack_traces():
        warnings.simplefilter(
            "ignore"
        )  # export warns of caches that modules fill while traced; the twin is thrown away
        program = torch.export.export(copied, args, dict(kwargs), dynamic_shapes=sizes, strict=False)
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    kinds = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}
    sources = {
        nodes[s.arg.name]: (kinds[s.kind], str(s.target))
        for s in program.graph_signature.input_specs
        if s.kind in kinds
    }
    return Traced(program.graph, sources, program)


@contextmanager
def _without_stack_traces() -> Iterator[None]:
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
