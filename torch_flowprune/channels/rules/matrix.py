"""The rules of operators that multiply and sum: linear layers, convolutions, products of matrices, attention.

All are one general operation, ``_contraction``, that joins the dimensions of its operands and sums over some.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from torch_flowprune.channels.rules.pointwise import added
from torch_flowprune.channels.rules.reductions import softmax
from torch_flowprune.channels.rules.views import broadcast, dropped, replaced, spatial, transpose
from torch_flowprune.channels.tracing import Value, Walk

SPATIAL = "is space"


def _contraction(g: Walk, terms: Sequence[tuple[Value, Sequence[Hashable]]], out: Sequence[Hashable]) -> Value:
    """An einsum. Dimensions of one name are joined; a name that is not in ``out`` is summed over.

    A sum may lose the terms of a removed unit only where they are zero in the masked model, so one of the operands
    has to be zero there (a parameter's columns are: they are masked).
    """
    held: dict[Hashable, list[tuple[Value, int]]] = {}
    for value, names in terms:
        for i, name in enumerate(names):
            held.setdefault(name, []).append((value, i))
    for name, places in held.items():
        _join_term(g, [p for p in places if p[0].shape[p[1]] > 1], summed=name not in out)
    dims, zero = [], []
    for name, size in zip(out, g.out_shape, strict=True):
        wide = [(v, i) for v, i in held[name] if v.shape[i] > 1]
        dims.append(wide[0][0].dims[wide[0][1]] if wide else g.axes.fixed(size))
        zero.append(any(v.zero[i] for v, i in wide))
    return Value(tuple(dims), tuple(zero))


def _join_term(g: Walk, places: Sequence[tuple[Value, int]], summed: bool) -> None:
    for k, (value, i) in enumerate(places):
        others = [p for m, p in enumerate(places) if m != k]
        for v, j in others[:1]:
            g.join(value.dims[i], v.dims[j])
        if value.constant:
            zero = all(v.zero[j] for v, j in others)
            g.role(value.dims[i], "consumer" if summed else "producer", zero)
    if summed and places and not any(v.zero[i] for v, i in places):
        g.freeze(places[0][0].dims[places[0][1]], "is summed over where a removed unit is not zero")


def _add_bias(g: Walk, x: Value, bias: Value | None, dim: int) -> Value:
    """A vector added along one dimension: zero there stays zero where the vector is zero, nowhere else."""
    if bias is None:
        return x
    g.join(x.dims[dim], bias.dims[0])
    zero = [False] * x.ndim
    zero[dim] = x.zero[dim] and bias.zero[0]
    return Value(x.dims, tuple(zero))


def linear_layer(g: Walk, x: Value, weight: Value, bias: Value | None = None) -> Value:
    rest = list(range(x.ndim - 1))
    out = _contraction(g, [(x, [*rest, "in"]), (weight, ["out", "in"])], [*rest, "out"])
    return _add_bias(g, out, bias, -1)


def matmul(g: Walk, x: Value, other: Value) -> Value:
    a, b = x, other
    left = [*range(-a.ndim, -2), "n", "k"][-max(a.ndim, 1) :] if a.ndim > 1 else ["k"]
    right = [*range(-b.ndim, -2), "k", "m"] if b.ndim > 1 else ["k"]
    batch = list(range(-max(a.ndim, b.ndim), -2))
    return _contraction(
        g, [(a, left), (b, right)], [*batch, *("n" for _ in [0] if a.ndim > 1), *("m" for _ in [0] if b.ndim > 1)]
    )


def matrix_product(g: Walk, x: Value, mat2: Value) -> Value:
    return matmul(g, x, mat2)


def matrix_vector(g: Walk, x: Value, vec: Value) -> Value:
    return matmul(g, x, vec)


def inner_product(g: Walk, x: Value, tensor: Value) -> Value:
    return matmul(g, x, tensor)


def conjugate_product(g: Walk, x: Value, other: Value) -> Value:
    return matmul(g, x, other)


def addmm(g: Walk, x: Value, mat1: Value, mat2: Value) -> Value:
    return added(g, [x, matmul(g, mat1, mat2)])


def baddbmm(g: Walk, x: Value, batch1: Value, batch2: Value) -> Value:
    return added(g, [x, matmul(g, batch1, batch2)])


def einsum(g: Walk, equation: str, tensors: Sequence[Value]) -> Any:
    equation = equation.replace(" ", "")
    if "..." in equation or "->" not in equation:
        return NotImplemented
    left, out = equation.split("->")
    if any(len(set(names)) != len(names) for names in left.split(",")):
        return NotImplemented
    return _contraction(g, list(zip(tensors, left.split(","), strict=True)), out)


def bilinear_layer(g: Walk, x: Value, input2: Value, weight: Value, bias: Value | None = None) -> Value:
    rest = list(range(x.ndim - 1))
    terms: list[tuple[Value, Sequence[Hashable]]] = [
        (x, [*rest, "a"]),
        (input2, [*rest, "b"]),
        (weight, ["out", "a", "b"]),
    ]
    return _add_bias(g, _contraction(g, terms, [*rest, "out"]), bias, -1)


def outer_product(g: Walk, x: Value, vec2: Value) -> Value:
    return _contraction(g, [(x, ["n"]), (vec2, ["m"])], ["n", "m"])


def similarity(g: Walk, x: Value, x2: Value, dim: int = 1) -> Value:
    """Products and norms along one dimension: what is zero in both adds to none of them."""
    shape = torch.broadcast_shapes(x.shape, x2.shape)
    both = broadcast(g.at_shape(shape), [x, x2], all)
    either = broadcast(g.at_shape(shape), [x, x2], any)
    _may_lose(g, both, dim)
    return dropped(either, [dim])


def distances(g: Walk, x: Value, x2: Value) -> Value:
    """Between all rows of two tensors: what is zero in both adds nothing."""
    for v in (x, x2):
        _may_lose(g, v, -1)
    g.join(x.dims[-1], x2.dims[-1])
    left, right = (Value((*v.dims[:-1], g.axes.fixed(1)), (*[False] * v.ndim,)) for v in (x, x2))
    return broadcast(g, [left, transpose(g, right, -2, -1)], lambda held: False)


def _may_lose(g: Walk, x: Value, dim: int) -> None:
    if not x.zero[dim]:
        g.freeze(x.dims[dim], "is summed over where a removed unit is not zero")


def product_by_groups(g: Walk, x: Value, mat2: Value, offs: Any = None, bias: Any = None) -> Any:
    """Rows in order, each group of them by a matrix of its own, as experts compute."""
    if offs is None or bias is not None or (x.ndim, mat2.ndim) != (2, 3):
        return NotImplemented
    for labels in (x.dims[0], mat2.dims[0]):
        g.freeze(labels, "is cut into groups")
    for labels in mat2.dims[1:]:
        g.align(labels)
    rows = Value((g.axes.fixed(x.shape[0]), x.dims[1]), x.zero, x.constant)
    return _contraction(g, [(rows, ["n", "k"]), (mat2, ["e", "k", "m"])], ["n", "m"])


def deformable_convolution(
    g: Walk,
    x: Value,
    weight: Value,
    offset: Value,
    mask: Value,
    bias: Value | None = None,
    groups: int = 1,
    offset_groups: int = 1,
) -> Any:
    """A convolution that reads where its offsets say, channel by channel."""
    for labels in (*offset.dims, *mask.dims, *(x.dims[1:2] if offset_groups > 1 else ())):
        g.freeze(labels, "is a grid of positions")
    return convolution(g, x, weight, bias, groups)


def convolution(g: Walk, x: Value, weight: Value, bias: Value | None = None, groups: int = 1) -> Any:
    if x.ndim != weight.ndim:
        return NotImplemented
    count = weight.ndim - 2
    for d in weight.dims[2:]:
        g.freeze(d, SPATIAL)
    g.role(weight.dims[0], "producer")
    x = spatial(g, x, count)
    if groups == 1:
        space = list(range(count))
        out = _contraction(
            g, [(x, ["n", "in", *space]), (_replaced_space(g, weight, x), ["out", "in", *space])], ["n", "out", *space]
        )
    else:
        out = _grouped(g, x, weight, groups)
    return _add_bias(g, out, bias, 1)


def _replaced_space(g: Walk, weight: Value, x: Value) -> Value:
    """The weight with its kernel's dimensions laid out as the result's space: both are fixed."""
    return Value((*weight.dims[:2], *x.dims[2:]), (*weight.zero[:2], *x.zero[2:]), weight.constant)


def _grouped(g: Walk, x: Value, weight: Value, groups: int) -> Value:
    """Either whole groups may go, or the same channels of every group."""
    inner, outer = x.dims[1].view(groups, -1), weight.dims[0].view(groups, -1)
    columns = weight.dims[1]
    depthwise = inner.shape[1] == 1
    whole = 0 if depthwise else g.choose([inner[:, 0], columns])
    if whole == 0:
        g.freeze(columns, "whole groups of this convolution are removable")
        for rows in (inner, outer):
            g.join(inner[:, :1].expand_as(rows).reshape(-1), rows.reshape(-1))
        g.count("groups", inner[:, 0])
    else:
        g.role(columns, "consumer", x.zero[1])
        g.join(columns.repeat(groups), inner.reshape(-1))
        g.join(outer[:1].expand_as(outer).reshape(-1), outer.reshape(-1))
    return Value((x.dims[0], weight.dims[0], *x.dims[2:]), (x.zero[0], weight.zero[0], *x.zero[2:]))


def transposed_convolution(g: Walk, x: Value, weight: Value, bias: Value | None = None, groups: int = 1) -> Any:
    if x.ndim != weight.ndim:
        return NotImplemented
    count = weight.ndim - 2
    for d in weight.dims[2:]:
        g.freeze(d, SPATIAL)
    x = spatial(g, x, count)
    if groups > 1:
        out = _grouped_transposed(g, x, weight, groups)
    else:
        space = list(range(count))
        out = _contraction(
            g, [(x, ["n", "in", *space]), (_replaced_space(g, weight, x), ["in", "out", *space])], ["n", "out", *space]
        )
    return _add_bias(g, out, bias, 1)


def _grouped_transposed(g: Walk, x: Value, weight: Value, groups: int) -> Value:
    """Only whole groups may go: the weight's second dimension is shared by all of them."""
    rows = x.dims[1].view(groups, -1)
    g.freeze(weight.dims[1], "whole groups of this convolution are removable")
    g.join(rows[:, :1].expand_as(rows).reshape(-1), rows.reshape(-1))
    g.join(x.dims[1], weight.dims[0])
    g.role(weight.dims[0], "producer")
    g.count("groups", rows[:, 0])
    channels = rows[:, 0].repeat_interleave(g.out_shape[1] // groups)
    return Value((x.dims[0], channels, *x.dims[2:]), (x.zero[0], weight.zero[0], *x.zero[2:]))


def attention(
    g: Walk,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """softmax(query keyᵀ scale + mask) value; heads are a batch dimension, keys shared by several where asked."""
    if scale is None:  # that of the width of a head, whatever is left of it
        g.span(-1, query.dims[-1])
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (replaced(v, -3, v.dims[-3].repeat_interleave(times)) for v in (key, value))
    batch = list(range(-query.ndim, -2))
    shape = (*query.shape[:-1], key.shape[-2])
    logits = _contraction(
        g.at_shape(shape), [(query, [*batch, "n", "d"]), (key, [*batch, "m", "d"])], [*batch, "n", "m"]
    )
    if attn_mask is not None:
        logits = broadcast(g.at_shape(shape), [logits, attn_mask], lambda held: False)
    weights = softmax(g, logits, -1)
    return _contraction(g, [(weights, [*batch, "n", "m"]), (value, [*batch, "m", "e"])], [*batch, "n", "e"])
