"""An exported graph in place of a module's own code.

The numbers in it are rewritten from the labels of the tensors. It holds for the one call that was exported, in the
sizes that ``torch.export`` finds free for others, and for two modes: whatever else it is called with is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from torch_flowprune.channels.shrinking.graphs.call_guard import BuiltForError, CallGuard
from torch_flowprune.channels.shrinking.graphs.graph_modes import Modes
from torch_flowprune.channels.shrinking.graphs.graph_sizes import resize, set_argument
from torch_flowprune.channels.tracing import Reading, concrete, module_path, operator_name
from torch_flowprune.torch_internals import tree_map, tree_unflatten

_STATE = (InputKind.PARAMETER, InputKind.BUFFER)
_OF_A_MODULE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")


@dataclass(frozen=True)
class BuiltGraph:
    """A graph, and what it is called with.

    Attributes:
        code: takes what depends on modes, tensors and values, in this order, and gives a list.
        guard: of the values.
        by_mode: a module, and what is told where it is in eval and in train mode.
        tensors: the names of those that it is told.
        counters: the modules whose batches are counted in train mode.
        in_eval: those that have to be in eval mode.
        outputs: how the results nest.
    """

    code: GraphModule
    guard: CallGuard
    by_mode: tuple[tuple[str, Any, Any], ...]
    tensors: tuple[str, ...]
    counters: tuple[str, ...]
    in_eval: tuple[str, ...]
    outputs: Any


class ExportedModule(nn.Module):
    """A module's exported graph on resized tensors, in place of its code.

    The modules inside are the smaller model's own, with their names, masks and modes; their code is not run. Norms and
    dropout follow the mode of the module that they stand in. Where the code does more in train mode than to tell its
    operators so, as stochastic depth does, what does it has to stay in eval mode, or all of it.
    """

    def __init__(self, small: nn.Module, built: BuiltGraph, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in _OF_A_MODULE:
            setattr(self, name, vars(small)[name])
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)
        self.built_graph = built

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        built = self.built_graph
        values = built.guard.values(args, kwargs)
        at = next((path for path in built.in_eval if self.get_submodule(path).training), None)
        if at is not None:
            raise BuiltForError(
                f"{built.guard.where} is the graph of a forward in eval mode, and {at or 'it'} is in train mode: call "
                "its eval(), or shrink without a graph"
            )
        for path in built.counters:
            norm = self.get_submodule(path)
            if norm.training:
                norm.get_buffer("num_batches_tracked").add_(1)
        told = [trained if self.get_submodule(path).training else other for path, other, trained in built.by_mode]
        tensors = [reduce(getattr, name.split("."), self) for name in built.tensors]
        return tree_unflatten(built.code(*told, *tensors, *values), built.outputs)

    def extra_repr(self) -> str:
        return f"the graph of {self.built_graph.guard.where}"


def resized_graph(small: nn.Module, guard: CallGuard, reading: Reading, dead: Tensor, modes: Modes) -> ExportedModule:
    """The exported eval graph on the tensors of ``small``, its sizes rewritten."""
    program = reading.traced["eval"].program
    assert program is not None, "a recorded graph has no signature to build a module of"
    precision = next((p.dtype for p in small.parameters() if p.is_floating_point()), torch.float32)
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    held = [n for n in inputs if specs[n.name].kind is not InputKind.USER_INPUT]
    graph, copies = Graph(), dict[Node, Node]()
    told = {(node, name): values for node, changed in modes.changes.items() for name, values in changed.items()}
    by_mode = {at: graph.placeholder(f"by_mode_{i}") for i, at in enumerate(told)}
    for node in [*held, *(n for n in inputs if n not in held)]:
        copies[node] = graph.placeholder(node.name)
    for node in program.graph.nodes:
        if node.op == "output":
            results = node.args[0][len(node.args[0]) - len(program.graph_signature.user_outputs) :]
            graph.output(torch.fx.node.map_arg(list(results), copies.__getitem__))
        elif node.op != "placeholder" and not _is_of_the_example(node):
            copies[node] = new = graph.node_copy(node, copies.__getitem__)
            resize(new, node, reading, dead)
            _in_precision(new, precision)
            _in_any_layout(new)
            for name in modes.changes.get(node, {}):
                set_argument(new, name, by_mode[node, name])
    graph.lint()
    names = {
        s.target: f"constant_{i}" for i, s in enumerate(specs.values()) if s.kind not in (*_STATE, InputKind.USER_INPUT)
    }
    built = BuiltGraph(
        GraphModule(nn.Module(), graph),
        guard.in_precision(precision),
        tuple((module_path(node), *values) for (node, _), values in told.items()),
        tuple(names.get(specs[n.name].target, specs[n.name].target) for n in held),
        modes.counters,
        modes.in_eval,
        program.call_spec.out_spec,
    )
    return ExportedModule(small, built, {new: _in(program.constants[old], precision) for old, new in names.items()})


def _in(constant: Tensor, precision: torch.dtype) -> Tensor:
    return constant.to(precision) if constant.is_floating_point() else constant


def _is_of_the_example(node: Node) -> bool:
    """Holds for the exported call only: its precision, and caches it filled in buffers of another shape."""
    if operator_name(node) == "_assert_tensor_metadata":
        return True
    target = node.args[0] if operator_name(node) == "copy" and not node.users else None
    return (
        isinstance(target, Node)
        and target.op == "placeholder"
        and concrete(target.meta["val"].shape) != concrete(node.meta["val"].shape)
    )


def recorded_calls(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any], paths: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """The arguments of the first call of each of the modules when the model runs."""
    calls: dict[str, tuple[Any, Any]] = {}

    def record(path: str) -> Callable[..., None]:
        return lambda module, a, k: calls.setdefault(path, (a, k)) and None

    hooks = [model.get_submodule(p).register_forward_pre_hook(record(p), with_kwargs=True) for p in paths]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def canonical_call(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call by name, defaults among them."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def free_sizes(call: inspect.BoundArguments) -> dict[str, Any]:
    """Dynamic shapes for export: the batch, and the tokens of (batch, token, channel), where the code allows it.

    Not image sizes: of code that cuts windows, export then takes minutes to reason about what divides what.
    """
    return {name: tree_map(_free_dimensions, value) for name, value in call.arguments.items()}


def _free_dimensions(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.ndim:
        return None
    return dict.fromkeys(range(2 if value.ndim == 3 else 1), Dim.AUTO)


def _in_precision(node: Node, precision: torch.dtype) -> None:
    """Casts to float32 were written for a float32 model: they go along with the model's precision."""
    if precision is not torch.float32:
        swap = {torch.float32: precision}
        node.args = tuple(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in node.args)
        node.kwargs = {k: swap.get(a, a) if isinstance(a, torch.dtype) else a for k, a in node.kwargs.items()}


def _in_any_layout(node: Node) -> None:
    """A view was exported where this device's kernels allowed one.

    Where others lay out their results differently it takes a copy.
    """
    if node.target is torch.ops.aten.view.default:
        node.target = torch.ops.aten.reshape.default
