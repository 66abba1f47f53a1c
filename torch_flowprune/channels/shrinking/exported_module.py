"""An exported graph in place of a module whose own code cannot take the smaller sizes.

Code like ``x.reshape(B, N, C)`` with C read off the module's input has no attribute to set. Its exported graph has: the
numbers in it are rewritten from the labels of the tensors. Inputs may still vary in the sizes that ``torch.export``
finds free.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from torch_flowprune.channels.tracing import Reading, Value, concrete, operator_name
from torch_flowprune.torch_internals import code_of_call, schema_of, tree_map

_TRAINING = {
    "batch_norm": "training",
    "instance_norm": "use_input_stats",
    "dropout": "train",
    "feature_dropout": "train",
}


class ExportedModule(GraphModule):
    """A module's exported graph on resized tensors. Batch norm and dropout follow ``train()`` and ``eval()``.

    What the module's own code does in training alone (stochastic depth, auxiliary heads) is not in it.
    """

    def train(self, mode: bool = True) -> ExportedModule:
        super().train(mode)
        for node in self.graph.nodes:
            flag = _TRAINING.get(operator_name(node)) if node.op == "call_function" else None
            if flag is not None:
                _set_argument(node, flag, mode)
        self.recompile()
        return self

    def __reduce__(self) -> Any:
        """Pickled as torch pickles graph modules, and made an ``ExportedModule`` again."""
        return _revived, super().__reduce__()[:2]


def _revived(make: Callable[..., GraphModule], arguments: tuple[Any, ...]) -> ExportedModule:
    plain = make(*arguments)
    return ExportedModule(plain, plain.graph)


def resized_graph(small: nn.Module, reading: Reading, dead: Tensor, names: Sequence[str]) -> ExportedModule:
    """The exported eval graph on the tensors of ``small``, its sizes rewritten. names: of the forward's arguments."""
    program = reading.traced["eval"].program
    assert program is not None, "a recorded graph has no signature to build a module of"
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    precision = next((p.dtype for p in small.parameters() if p.is_floating_point()), torch.float32)
    root, graph, copies = nn.Module(), Graph(), dict[Node, Node]()
    for node in program.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind is not InputKind.USER_INPUT:
            _hold(root, spec.target, _tensor_of(small, program, spec, precision))
            copies[node] = graph.get_attr(spec.target)
        elif node.op == "output":
            results = node.args[0][len(node.args[0]) - len(program.graph_signature.user_outputs) :]
            graph.output(torch.fx.node.map_arg(list(results), copies.__getitem__))
        elif not _is_of_the_example(node):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "call_function":
                _resize(copies[node], node, reading, dead)
                _in_precision(copies[node], precision)
                _in_any_layout(copies[node])
    spec_in, spec_out = program.call_spec.in_spec, program.call_spec.out_spec
    graph.set_codegen(code_of_call(names, spec_in, spec_out))
    graph.lint()
    return ExportedModule(root, graph).train(small.training)


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


def graft(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """``model`` with another module at a path; the model itself where the path is empty."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


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


def free_sizes(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Dynamic shapes for export: the batch, and the tokens of (batch, token, channel), where the code allows it.

    Not image sizes: of code that cuts windows, export then takes minutes to reason about what divides what.
    """
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {name: tree_map(_free_dimensions, value) for name, value in bound.items()}


def _free_dimensions(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.ndim:
        return None
    return dict.fromkeys(range(2 if value.ndim == 3 else 1), Dim.AUTO)


def argument_names(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """The names of a call's arguments in the module's forward."""
    return [*list(inspect.signature(module.forward).parameters)[: len(args)], *kwargs]


def _tensor_of(small: nn.Module, program: ExportedProgram, spec: Any, precision: torch.dtype) -> Tensor:
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        path, _, name = spec.target.rpartition(".")
        tensor: Tensor = getattr(small.get_submodule(path), name)
        return tensor
    constant: Tensor = program.constants[spec.target]
    return constant.to(precision) if constant.is_floating_point() else constant


def _hold(root: nn.Module, target: str, tensor: Tensor) -> None:
    *path, name = target.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)


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


def _set_argument(node: Node, name: str, value: Any) -> None:
    for i, a in enumerate(schema_of(node.target).arguments):
        if a.name == name and i < len(node.args):
            node.update_arg(i, value)
        elif a.name == name:
            node.update_kwarg(name, value)


# The numbers in a graph.


def _resize(new: Node, node: Node, reading: Reading, dead: Tensor) -> None:
    """Rewrite the numbers that a node was given: each argument in ``RESIZERS`` by its schema's name."""
    resizers = RESIZERS.get(operator_name(node), {})
    schema = schema_of(node.target)
    if not resizers or schema is None:
        return
    for i, argument in enumerate(schema.arguments):
        resizer = resizers.get(argument.name)
        if resizer is None:
            continue
        if argument.name in new.kwargs:
            new.update_kwarg(argument.name, resizer(node, new.kwargs[argument.name], reading, dead))
        elif i < len(new.args):
            new.update_arg(i, resizer(node, new.args[i], reading, dead))


def _count_alive(labels: Tensor, dead: Tensor) -> int:
    return int((~dead[labels]).sum())


def _value_of(node: Node, reading: Reading) -> Value:
    value = reading.values[node]
    assert isinstance(value, Value)
    return value


def _new_shape(node: Node, sizes: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    """Sizes of the result; what does not change (-1, or a size that is free) stays as it is written."""
    dims = _value_of(node, reading).dims
    return [_new_size(n, d, dead) for n, d in zip(sizes, dims[len(dims) - len(sizes) :], strict=True)]


def _new_size(size: Any, labels: Tensor, dead: Tensor) -> Any:
    alive = _count_alive(labels, dead)
    return size if size == -1 or alive == len(labels) else alive


def _new_factors(node: Node, sizes: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    dims = _value_of(node, reading).dims
    dim = int(_argument(node, "dim", 0)) % (len(dims) - len(sizes) + 1)
    return [_new_size(n, d, dead) for n, d in zip(sizes, dims[dim : dim + len(sizes)], strict=True)]


def _new_repeats(node: Node, repeats: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    source, dims = _value_of(node.args[0], reading), _value_of(node, reading).dims  # type: ignore[arg-type]
    shape = [1] * (len(dims) - source.ndim) + list(source.shape)
    return [_new_size(r, d, dead) if n == 1 else r for r, n, d in zip(repeats, shape, dims, strict=True)]


def _new_split(node: Node, split_size: Any, reading: Reading, dead: Tensor) -> Any:
    if not isinstance(split_size, int):
        return _new_splits(node, split_size, reading, dead)
    dim = _argument(node, "dim", 0)
    return _new_size(split_size, reading.values[node][0].dims[dim], dead)


def _new_splits(node: Node, split_sizes: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    dim = _argument(node, "dim", 0)
    return [_new_size(n, v.dims[dim], dead) for n, v in zip(split_sizes, reading.values[node], strict=True)]


def _new_bound(node: Node, bound: int | None, reading: Reading, dead: Tensor) -> int | None:
    """A start or end of a slice: how many positions before it are left."""
    if not isinstance(bound, int):
        return bound
    labels = _value_of(node.args[0], reading).dims[_argument(node, "dim", 0)]  # type: ignore[arg-type]
    if bound < 0:
        return -_count_alive(labels[bound:], dead)
    return bound if bound >= len(labels) else _count_alive(labels[:bound], dead)


def _new_count(name: str) -> Callable[[Node, int, Reading, Tensor], int]:
    def resizer(node: Node, count: int, reading: Reading, dead: Tensor) -> int:
        labels = reading.counts.get((node, name))
        return count if labels is None else _count_alive(labels, dead)

    return resizer


def _argument(node: Node, name: str, default: Any) -> Any:
    for i, a in enumerate(schema_of(node.target).arguments):
        if a.name == name:
            return node.kwargs.get(name, node.args[i] if i < len(node.args) else default)
    return default


Resizer = Callable[[Node, Any, Reading, Tensor], Any]
# the operators whose calls state sizes: which of their arguments, and what becomes of each
RESIZERS: dict[str, dict[str, Resizer]] = {
    **{name: {"size": _new_shape} for name in ("view", "_unsafe_view", "expand", "zeros", "ones", "full", "empty")},
    **{name: {"size": _new_shape} for name in ("new_zeros", "new_ones", "new_full", "new_empty")},
    **{f"{name}{n}d": {"groups": _new_count("groups")} for name in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "reshape": {"shape": _new_shape},
    "unflatten": {"sizes": _new_factors},
    "repeat": {"repeats": _new_repeats},
    "tile": {"dims": _new_repeats},
    "split": {"split_size": _new_split},
    "split_with_sizes": {"split_sizes": _new_splits},
    "slice": {"start": _new_bound, "end": _new_bound},
    "narrow": {"start": _new_bound},
    "group_norm": {"num_groups": _new_count("num_groups")},
}
