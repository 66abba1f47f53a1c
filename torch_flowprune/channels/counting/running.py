"""What a model runs and holds in one forward pass, read off its graph with sizes in units of a coupling."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from torch_flowprune.channels.costs import Holding, Operand, Operator
from torch_flowprune.channels.counting.ruler import Ruler
from torch_flowprune.channels.tracing import Reading, Value, module_path, operator_name, sharing
from torch_flowprune.torch_internals import schema_of

_COPY = "aten.clone.default"
_SIZED = (
    "repeat",
    "tile",
    "expand_as",
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "arange",
)
"""Operators that are told sizes of their result: they take as long as a copy of it, about."""


def operators_of(reading: Reading, ruler: Ruler) -> tuple[Operator, ...]:
    """All that make a tensor or write to one."""
    return tuple(
        _operator(node, reading, ruler) for node in reading.traced["eval"].graph.nodes if _computes(node, reading)
    )


def _computes(node: Node, reading: Reading) -> bool:
    if (
        node.op != "call_function"
        or node.target is operator.getitem
        or not isinstance(reading.values[node], (Value, list))
    ):
        return False
    schema = schema_of(node.target)  # none of what export puts around a part of the code, as a change of grad mode
    return schema is not None and (_makes_memory(node) or bool(schema.is_mutable))


def _operator(node: Node, reading: Reading, ruler: Ruler) -> Operator:
    name = module_path(node) or operator_name(node)
    schema = schema_of(node.target)
    is_copy = any(argument.alias_info is not None for argument in schema.arguments) and not schema.is_mutable
    within = ruler.within(node)
    if (is_copy or operator_name(node) in _SIZED) and isinstance(reading.values[node], Value):
        return Operator(name, _COPY, (_operand(node, reading, ruler),), {}, within)

    def operand(read: Node) -> Any:
        return _operand(read, reading, ruler)

    def measured(one: Any, argument: str) -> Any:
        if argument == "normalized_shape":
            return [ruler.extent(labels) for labels in reading.values[node].dims[-len(one) :]]
        labels = reading.counts.get((node, argument))
        return torch.fx.node.map_arg(one, operand) if labels is None else ruler.extent(labels)

    names = [argument.name for argument in schema.arguments]
    args = tuple(measured(one, argument) for one, argument in zip(node.args, names, strict=False))
    kwargs = {argument: measured(one, argument) for argument, one in node.kwargs.items()}
    return Operator(name, str(node.target), args, kwargs, within)


def _operand(node: Node, reading: Reading, ruler: Ruler) -> Operand:
    value, seen = reading.values[node], node.meta["val"]
    return Operand(tuple(map(ruler.extent, value.dims)), seen.dtype, _order_of(seen))


def _order_of(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from the outermost in memory inwards; of equal strides (sizes of one, expanded) as they stand."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))


def holdings_of(reading: Reading, ruler: Ruler, model: nn.Module) -> tuple[Holding, ...]:
    """The model's own tensors and the input, all the while; and each result, as long as the model's code holds it.

    Where the graph was not recorded from a forward, a result is held until it is last read.
    """
    nodes = list(reading.traced["eval"].graph.nodes)
    step = {node: i for i, node in enumerate(nodes)}
    named = [
        Holding(_own(reading, ruler, name, tensor), -1, len(nodes), ruler.within(name))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    return (*named, *_results(nodes, step, reading, ruler))


def _results(nodes: Sequence[Node], step: dict[Node, int], reading: Reading, ruler: Ruler) -> Iterator[Holding]:
    for node in nodes:
        if node.op == "placeholder" and node not in reading.traced["eval"].sources and _is_one_tensor(node, reading):
            yield Holding(_operand(node, reading, ruler), -1, len(nodes))
        elif node.op == "call_function" and _is_one_tensor(node, reading) and _makes_memory(node):
            freed = node.meta.get("freed_before")
            until = step[freed] if freed in step else len(nodes) if "fresh" in node.meta else _last_read(node, step)
            yield Holding(_operand(node, reading, ruler), step[node], until, ruler.within(node))


def _is_one_tensor(node: Node, reading: Reading) -> bool:
    return isinstance(reading.values.get(node), Value) and isinstance(node.meta.get("val"), Tensor)


def _makes_memory(node: Node) -> bool:
    """True where the result is in memory of its own: as it was seen, or else as the operator's schema has it."""
    schema = schema_of(node.target)
    aliases = schema is None or any(argument.alias_info is not None for argument in schema.arguments)
    return bool(node.meta.get("fresh", not aliases))


def _last_read(node: Node, step: dict[Node, int]) -> int:
    return 1 + max((step[user] for member in sharing(node) for user in member.users), default=step[node])


def _own(reading: Reading, ruler: Ruler, name: str, tensor: Tensor) -> Operand:
    """A parameter or buffer that the graph does not have keeps its size."""
    value = reading.named.get(name)
    dims = [torch.zeros(size, dtype=torch.long) for size in tensor.shape] if value is None else value.dims
    return Operand(tuple(map(ruler.extent, dims)), tensor.dtype, tuple(range(tensor.ndim)))
