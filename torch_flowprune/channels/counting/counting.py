"""What a model costs once its dead channels are gone, counted before anything is removed.

The labels of the graph tell how many positions of a dimension belong to which unit, so the products of the smaller
model follow from which units stay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from torch_flowprune.channels.costs import Costs, Kept, Term
from torch_flowprune.channels.counting.ruler import Dims, Ruler
from torch_flowprune.channels.counting.running import holdings_of, operators_of
from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.tracing import Reading, Value, module_path, operator_name
from torch_flowprune.inputs import on_host
from torch_flowprune.torch_internals import schema_of


@on_host()
def costs_of(reading: Reading, coupling: Coupling, model: nn.Module, kept: Kept) -> Costs:
    """The costs of the model that was read; ``kept`` are the units its masks leave.

    FLOPs are counted as ``torch.utils.flop_counter`` does it: two for each multiply-add of convolutions, matrix
    products, attention and recurrent layers, in one forward pass in eval mode on the inputs that the model was read
    with; nothing for elementwise operators.
    """
    ruler = Ruler(reading, coupling)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    parameters = tuple(
        ruler.term(name, _dims_of_parameter(reading.named.get(name), value), of=name)
        for name, value in model.named_parameters()
    )
    flops = tuple(_operations(reading, ruler))
    return Costs(parameters, flops, kept, operators_of(reading, ruler), holdings_of(reading, ruler, model), device)


def _dims_of_parameter(value: Value | None, parameter: Tensor) -> Dims:
    """A parameter that the graph does not have keeps its size."""
    return [torch.zeros(size, dtype=torch.long) for size in parameter.shape] if value is None else value.dims


def _operations(reading: Reading, ruler: Ruler) -> Iterator[Term]:
    for node in reading.traced["eval"].graph.nodes:
        count = _COUNTED.get(operator_name(node)) if node.op == "call_function" else None
        if count is not None:
            for dims in count(reading.values[node], _operands_of(node, reading)):
                yield ruler.term(module_path(node) or operator_name(node), dims, 2, node)


# -- what an operator runs over ------------------------------------------


def _operands_of(node: Node, reading: Reading) -> list[Any]:
    """In the order of the schema, tensors as values."""
    schema = schema_of(node.target).arguments
    operands = [*node.args, *(node.kwargs.get(one.name) for one in schema[len(node.args) :])]
    return [torch.fx.node.map_arg(one, reading.values.__getitem__) for one in operands]


def _dims_of_convolution(out: Value, given: Sequence[Any]) -> list[Dims]:
    """Every output position reads the kernel over the channels of its group."""
    return [[*out.dims, *given[1].dims[1:]]]


def _dims_of_transposed_convolution(_out: Value, given: Sequence[Any]) -> list[Dims]:
    """Every input position is written through the kernel."""
    return [[*given[0].dims, *given[1].dims[1:]]]


def _dims_of_matrix_product(first: int) -> Callable[[Value, Sequence[Any]], list[Dims]]:
    """A matrix product whose left operand is argument ``first``."""
    return lambda out, given: [[*out.dims, given[first].dims[-1]]]


def _dims_of_attention(out: Value, given: Sequence[Any]) -> list[Dims]:
    """Each query by each key, then each weight by each value."""
    query, key = given[:2]
    return [[*query.dims, key.dims[-2]], [*out.dims, key.dims[-2]]]


def _dims_of_einsum(_out: Value, given: Sequence[Any]) -> list[Dims]:
    """Two operands or more: every index once."""
    equation, operands = given[0].replace(" ", ""), given[1]
    if len(operands) < 2:
        return []
    dims: dict[Hashable, Tensor] = {}
    for names, value in zip(equation.split("->")[0].split(","), operands, strict=True):
        for name, labels in zip(_indices(names, value.ndim), value.dims, strict=True):
            dims[name] = max(dims.get(name, labels), labels, key=len)
    return [list(dims.values())]


def _dims_of_recurrent(_out: Value, given: Sequence[Any]) -> list[Dims]:
    """Every weight at every position of the sequence: of all layers, gates and directions, and projections."""
    lists = [one for one in given if isinstance(one, (list, tuple))]
    return [[*given[0].dims[:-1], *weight.dims] for one in lists for weight in one if weight.ndim == 2]


def _dims_of_cell(_out: Value, given: Sequence[Any]) -> list[Dims]:
    """The weights of the input and of the state, once a sample."""
    return [[*given[0].dims[:-1], *weight.dims] for weight in given[2:4]]


def _indices(names: str, ndim: int) -> list[Hashable]:
    left, dots, right = names.partition("...")
    return [*left, *range(len(left) + len(right) - ndim, 0), *right] if dots else list(names)


_COUNTED: dict[str, Callable[[Value, Sequence[Any]], list[Dims]]] = {
    **{f"conv{n}d": _dims_of_convolution for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _dims_of_transposed_convolution for n in (1, 2, 3)},
    **dict.fromkeys(("linear", "matmul", "mm", "bmm"), _dims_of_matrix_product(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _dims_of_matrix_product(1)),
    "scaled_dot_product_attention": _dims_of_attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _dims_of_recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _dims_of_cell),
    "einsum": _dims_of_einsum,
}
