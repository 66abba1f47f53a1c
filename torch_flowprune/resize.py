"""Sizes that a model's code and its exported graph state, brought in line with smaller tensors.

Two ways: attributes of the modules (`in_channels`, `num_heads`), found by name for torch's own layers and by value where the
graph shows that an operator of the module was given the old size; or the numbers that stand in the exported graph itself.
Neither is trusted: `shrink` runs the result against the masked model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from torch_flowprune.axes import Value
from torch_flowprune.graph import Reading, flat, module_path, operator_name

__all__ = ["InferenceGraph", "Surgery", "attribute_plans", "resized_graph"]

Attributes = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Surgery:
    """What to do to a model. keep: tensor name -> axis -> (size,) bool. attributes: module path -> attribute -> new value."""

    keep: Mapping[str, Mapping[int, Tensor]]
    attributes: Mapping[str, Mapping[str, Any]]

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        for axis, kept in self.keep.get(name, {}).items():
            tensor = tensor.index_select(axis, kept.nonzero().flatten().to(tensor.device))
        return tensor

    def shape(self, name: str, old: Sequence[int]) -> tuple[int, ...]:
        axes = self.keep.get(name, {})
        return tuple(int(axes[i].sum()) if i in axes else n for i, n in enumerate(old))


# -- attributes of modules -------------------------------------------------------------------------------------------------------


def attribute_plans(model: nn.Module, reading: Reading, dead: Tensor, surgery: Surgery, names: Mapping[str, str]) -> Iterator[Attributes]:
    """Plans to try, likeliest first: torch's own layers are certain, other modules' attributes are matched by value."""
    sure = layer_attributes(model, reading, dead, surgery, names)
    seen: list[Attributes] = []
    for accepts in (is_width, lambda name: True, lambda name: False):
        plan = {path: dict(values) for path, values in sure.items()}
        for path, values in matched_attributes(model, reading, dead, accepts).items():
            plan[path] = {**values, **plan.get(path, {})}
        if plan not in seen:
            seen.append(plan)
            yield plan


def is_width(name: str) -> bool:
    """Names that sizes of channels go by; others (window_size, num_tokens) are matched only if these do not do."""
    return any(part in name for part in ("head", "dim", "chan", "feat", "group", "width", "hidden", "inner", "chs", "planes", "split"))


def layer_attributes(model: nn.Module, reading: Reading, dead: Tensor, surgery: Surgery, names: Mapping[str, str]) -> Attributes:
    groups = {(module_path(n), what): int((~dead[labels]).sum()) for (n, what), labels in reading.counts.items()}
    plan: Attributes = {}
    for path, module in model.named_modules():
        shapes = {}
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            full = names.get(f"{path}.{name}" if path else name, "")
            shapes[name] = surgery.shape(full, tensor.shape) if full in surgery.keep else tuple(tensor.shape)
        changed = any(names.get(f"{path}.{name}" if path else name, "") in surgery.keep for name in shapes)
        count = {what: n for (at, what), n in groups.items() if at == path}
        values = sizes_of(module, shapes, count) if changed else {}
        values = {k: v for k, v in values.items() if hasattr(module, k) and getattr(module, k) != v}
        if values:
            plan[path] = values
    return plan


def sizes_of(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], count: Mapping[str, int]) -> dict[str, Any]:
    """The attributes of a layer that its tensors' shapes determine."""
    weight = shapes.get("weight") or shapes.get("running_mean") or ()
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = count.get("groups", module.groups)
        out, into = (1, 0) if module.transposed else (0, 1)
        sizes = {0: weight[0], 1: weight[1] * groups}
        return {"out_channels": sizes[out], "in_channels": sizes[into], "groups": groups}
    if len(weight) == 1:
        shape = getattr(module, "normalized_shape", None)
        return {"num_features": weight[0], "num_channels": weight[0], **count,
                **({"normalized_shape": type(shape)(weight)} if isinstance(shape, (tuple, list)) and len(shape) == 1 else {})}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight[1]}
    if len(weight) == 2:
        return {"out_features": weight[0], "in_features": weight[1]}
    return {}


def matched_attributes(model: nn.Module, reading: Reading, dead: Tensor, accepts: Callable[[str], bool]) -> Attributes:
    """Integers (and integers in tuples) of a module that equal a size which shrinks in an operator of its forward."""
    plan: Attributes = {}
    for path, sizes in changed_sizes(reading, dead).items():
        module = model.get_submodule(path) if path else model
        for name, value in vars(module).items():
            if name.startswith("_") or not accepts(name):
                continue
            new = matched(value, sizes)
            if new != value:
                plan.setdefault(path, {})[name] = new
    return plan


def matched(value: Any, sizes: Mapping[int, int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return sizes.get(value, value)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list) and value and all(type(v) is int for v in value):
        return type(value)(sizes.get(v, v) for v in value)
    return value


def changed_sizes(reading: Reading, dead: Tensor) -> dict[str, dict[int, int]]:
    """Module path -> old size -> new size, for the dimensions that operators with numbers of their own see in it."""
    sizes: dict[str, dict[int, int]] = {}
    for node, values in reading.values.items():
        if node.op != "call_function" or operator_name(node) not in RESIZERS:
            continue
        given = [v for n in node.all_input_nodes for v in flat(reading.values.get(n))]
        for value in [*flat(values), *given]:
            for labels in value.dims:
                left = int((~dead[labels]).sum())
                if left != len(labels):
                    sizes.setdefault(module_path(node), {}).setdefault(len(labels), left)
    return sizes


# -- the exported graph -----------------------------------------------------------------------------------------------------------


class InferenceGraph(GraphModule):
    """An exported graph in eval mode, for inputs of the shapes it was exported with; it can not be trained as is."""

    def train(self, mode: bool = True) -> InferenceGraph:
        if mode:
            raise RuntimeError("this model was shrunk as an exported inference graph: its batch norms and dropouts are in eval mode")
        super().train(False)
        return self


def resized_graph(small: nn.Module, reading: Reading, dead: Tensor) -> GraphModule:
    """The exported eval graph on the tensors of `small`, with its sizes rewritten."""
    program = reading.programs["eval"]
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    graph, copies = Graph(), {}
    root = nn.Module()
    for node in program.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind is not InputKind.USER_INPUT:
            hold(root, spec.target, tensor_of(small, program, spec))
            copies[node] = graph.get_attr(spec.target)
        elif node.op == "output":
            results = [a for a in node.args[0]][-len(program.graph_signature.user_outputs) :]
            mapped = torch.fx.node.map_arg(tuple(results), copies.__getitem__)
            graph.output(mapped[0] if len(mapped) == 1 else mapped)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "call_function":
                resize(copies[node], node, reading, dead)
    graph.lint()
    return InferenceGraph(root, graph).eval()


def tensor_of(small: nn.Module, program: Any, spec: Any) -> Tensor:
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        path, _, name = spec.target.rpartition(".")
        tensor: Tensor = getattr(small.get_submodule(path), name)
        return tensor
    constant: Tensor = program.constants[spec.target]
    like = next(small.parameters())
    return constant.to(like.dtype) if constant.is_floating_point() else constant


def hold(root: nn.Module, target: str, tensor: Tensor) -> None:
    *path, name = target.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)


def resize(new: Node, node: Node, reading: Reading, dead: Tensor) -> None:
    """Rewrite the numbers that a node was given: each argument of `RESIZERS` by its schema's name."""
    resizers = RESIZERS.get(operator_name(node), {})
    schema = getattr(node.target, "_schema", None)
    if not resizers or schema is None:
        return
    for i, argument in enumerate(schema.arguments):
        resizer = resizers.get(argument.name)
        if resizer is None:
            continue
        if argument.name in node.kwargs:
            new.update_kwarg(argument.name, resizer(node, node.kwargs[argument.name], reading, dead))
        elif i < len(node.args):
            new.update_arg(i, resizer(node, node.args[i], reading, dead))


def left(labels: Tensor, dead: Tensor) -> int:
    return int((~dead[labels]).sum())


def result(node: Node, reading: Reading) -> Value:
    value = reading.values[node]
    assert isinstance(value, Value)
    return value


def new_shape(node: Node, given: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    """Sizes of the result; -1 (infer, or keep) stays as it is written."""
    dims = result(node, reading).dims
    return [g if g == -1 else left(d, dead) for g, d in zip(given, dims[len(dims) - len(given) :])]


def new_factors(node: Node, given: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    dims = result(node, reading).dims
    dim = int(node.args[1]) % (len(dims) - len(given) + 1)  # type: ignore[call-overload]
    return [g if g == -1 else left(d, dead) for g, d in zip(given, dims[dim : dim + len(given)])]


def new_repeats(node: Node, given: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    source, dims = result(node.args[0], reading), result(node, reading).dims  # type: ignore[arg-type]
    shape = [1] * (len(dims) - source.ndim) + list(source.shape)
    return [left(d, dead) if n == 1 else g for g, n, d in zip(given, shape, dims)]


def new_split(node: Node, given: int, reading: Reading, dead: Tensor) -> int:
    dim = argument(node, "dim", 0)
    return left(reading.values[node][0].dims[dim], dead)


def new_splits(node: Node, given: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    dim = argument(node, "dim", 0)
    return [left(v.dims[dim], dead) for v in reading.values[node]]


def new_bound(node: Node, given: int | None, reading: Reading, dead: Tensor) -> int | None:
    """A start or end of a slice: how many positions before it are left."""
    if given is None:
        return None
    labels = result(node.args[0], reading).dims[argument(node, "dim", 0)]  # type: ignore[arg-type]
    if given < 0:
        return -left(labels[given:], dead)
    return given if given >= len(labels) else left(labels[:given], dead)


def new_count(name: str) -> Callable[[Node, int, Reading, Tensor], int]:
    def resizer(node: Node, given: int, reading: Reading, dead: Tensor) -> int:
        labels = reading.counts.get((node, name))
        return given if labels is None else left(labels, dead)

    return resizer


def argument(node: Node, name: str, default: Any) -> Any:
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if a.name == name:
            return node.kwargs.get(name, node.args[i] if i < len(node.args) else default)
    return default


Resizer = Callable[[Node, Any, Reading, Tensor], Any]
RESIZERS: dict[str, dict[str, Resizer]] = {
    **dict.fromkeys(("view", "_unsafe_view", "expand", "zeros", "ones", "full", "empty"), {"size": new_shape}),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), {"size": new_shape}),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"), {"groups": new_count("groups")}),
    "reshape": {"shape": new_shape},
    "unflatten": {"sizes": new_factors},
    "repeat": {"repeats": new_repeats},
    "split": {"split_size": new_split},
    "split_with_sizes": {"split_sizes": new_splits},
    "slice": {"start": new_bound, "end": new_bound},
    "narrow": {"start": new_bound},
    "group_norm": {"num_groups": new_count("num_groups")},
}
