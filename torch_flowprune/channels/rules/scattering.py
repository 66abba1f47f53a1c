"""Rules for operators that read or write positions told by an index: gather, scatter, index_add, index_put.

The dimension that is indexed stays; the others go together in the tensor, in the index and in what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from torch_flowprune.channels.rules.slicing import index
from torch_flowprune.channels.rules.views import broadcast, replaced, spatial
from torch_flowprune.channels.tracing import Value, Walk, concrete, operator_name


def _indexed(g: Walk, dim: int, *values: Value) -> None:
    """Nothing may go of the dimension along which an index points, in whichever tensor."""
    for v in values:
        if v.ndim:
            g.freeze(v.dims[dim], "is indexed")


def _side_by_side(g: Walk, values: Sequence[Value], dim: int) -> None:
    """Position i of the other dimensions of all of them is the same slice; of longer ones the rest is left out."""
    for d in range(values[0].ndim):
        if d == dim % values[0].ndim:
            continue
        shortest = min(v.shape[d] for v in values)
        for v in values:
            if v.shape[d] != shortest:
                g.freeze(v.dims[d], "is indexed in part")
        for v in values[1:]:
            g.join(values[0].dims[d][:shortest], v.dims[d][:shortest])


def gather(g: Walk, x: Value, dim: int, index: Value) -> Value:
    _indexed(g, dim, x, index)
    _side_by_side(g, [index, x], dim)
    zero = [x.zero[d] and index.shape[d] == x.shape[d] for d in range(x.ndim)]
    return replaced(Value(index.dims, tuple(zero)), dim, g.axes.fixed(index.shape[dim]))


def take_along_dim(g: Walk, x: Value, indices: Value, dim: int | None = None) -> Any:
    if dim is None:
        return NotImplemented
    _indexed(g, dim, x, indices)
    fixed = (replaced(v, dim, g.axes.fixed(g.out_shape[dim])) for v in (x, indices))
    return broadcast(g, list(fixed), lambda held: bool(held[0]))


def scatter(g: Walk, x: Value, dim: int, index: Value, src: Any = None, value: Any = None) -> Value:
    """The tensor with some positions written or added to; zero where both are."""
    written = src if isinstance(src, Value) else index.with_zero(src == 0 if src is not None else value == 0)
    _indexed(g, dim, x, index, written)
    _side_by_side(g, [x, index, written], dim)
    return x.with_zero([a and b for a, b in zip(x.zero, written.zero, strict=True)])


def index_written(g: Walk, x: Value, dim: int, index: Value, source: Value) -> Value:
    """index_add, index_copy, index_reduce: slices of the source at places of a vector of indices."""
    _indexed(g, dim, x, source)
    _indexed(g, 0, index)
    _side_by_side(g, [x, source], dim)
    return x.with_zero([a and b for a, b in zip(x.zero, source.zero, strict=True)])


def index_filled(g: Walk, x: Value, dim: int, index: Value, value: Any) -> Value:
    _indexed(g, dim, x)
    _indexed(g, 0, index)
    return x if isinstance(value, (int, float)) and value == 0 else x.without_zero()


def index_put(g: Walk, x: Value, indices: Sequence[Any], values: Value) -> Any:
    """``x[indices] = values``: the dimensions that are not indexed go together with those of the values."""
    region = _region(g, x, indices)
    if region is None:
        return NotImplemented
    at = g.at_shape(region)
    read = index(at, x, indices)
    if read is NotImplemented:
        return NotImplemented
    broadcast(at, [read, values], lambda held: False)
    written = [d for d in range(x.ndim) if bool(x.dims[d].any()) and not g.axes.is_fixed(x.dims[d])]
    zero = list(x.zero)
    for d in written:
        zero[d] = x.zero[d] and _writes_zero(read, values, x.dims[d])
    return x.with_zero(zero)


def _writes_zero(read: Value, values: Value, labels: torch.Tensor) -> bool:
    """Whether what is written is zero wherever this dimension of the tensor is gone."""
    for d, of in enumerate(read.dims):
        i = d - read.ndim + values.ndim
        if of is labels:
            return i >= 0 and len(values.dims[i]) == len(labels) and values.zero[i]
    return False


def _region(g: Walk, x: Value, indices: Sequence[Any]) -> tuple[int, ...] | None:
    """The shape that reading at the same places would give."""
    assert g.node is not None
    given = g.node.args[1]
    if not isinstance(given, (list, tuple)):
        return None
    metas = [None if i is None else i.meta["val"] for i in given if i is None or isinstance(i, Node)]
    if any(m is not None and m.dtype in (torch.bool, torch.uint8) for m in metas):
        return None
    whole = torch.empty(x.shape, device="meta")
    return tuple(whole[tuple(slice(None) if m is None else torch.zeros_like(m) for m in metas)].shape)


def masked_scatter(g: Walk, x: Value, mask: Value, source: Value) -> Any:
    """The source is read in its order, a row of the last dimension at each place where the mask is set."""
    assert g.node is not None
    if x.shape[-1] != source.shape[-1] or not _alike_along_last(g.node.args[1]):
        return NotImplemented
    for v in (x, source):
        for labels in v.dims[:-1]:
            g.freeze(labels, "is indexed")
    g.join(x.dims[-1], source.dims[-1])
    if mask.shape[-1] == x.shape[-1]:
        g.join(x.dims[-1], mask.dims[-1])
    return x.with_zero([*x.zero[:-1], x.zero[-1] and source.zero[-1]])


def _alike_along_last(mask: Any) -> bool:
    """Whether a mask says the same of all positions of the last dimension: it has one, or was expanded from one."""
    while isinstance(mask, Node) and operator_name(mask) in ("expand", "expand_as", "to", "_to_copy"):
        mask = mask.args[0]
    return isinstance(mask, Node) and concrete(mask.meta["val"].shape)[-1:] == (1,)


def masked_select(g: Walk, x: Value, mask: Value) -> Value:
    for labels in (*x.dims, *mask.dims):
        g.freeze(labels, "is picked from by a mask")
    return g.fixed(g.out_shape)


def places_of(g: Walk, x: Value) -> Any:
    """nonzero, and ``where`` of a condition alone."""
    assert g.node is not None
    for labels in x.dims:
        g.freeze(labels, "is asked where it is zero")
    value = g.node.meta["val"]
    if isinstance(value, (list, tuple)):
        return [g.fixed(concrete(v.shape)) for v in value]
    return g.fixed(g.out_shape)


def packed_sequence(g: Walk, x: Value, lengths: Value, batch_first: bool) -> list[Value]:
    """Sequences of several lengths as one row of steps."""
    assert g.node is not None
    data, sizes = (concrete(v.shape) for v in g.node.meta["val"])
    for labels in (*x.dims[:2], *lengths.dims):
        g.freeze(labels, "is a sequence that is packed")
    return [Value((g.axes.fixed(data[0]), *x.dims[2:]), (True, *x.zero[2:])), g.fixed(sizes)]


def padded_sequence(g: Walk, x: Value, batch_sizes: Value, padding_value: float = 0.0) -> list[Value]:
    assert g.node is not None
    padded, lengths = (concrete(v.shape) for v in g.node.meta["val"])
    g.freeze(x.dims[0], "is a sequence that is packed")
    fixed = g.fixed(padded[:2])
    out = Value((*fixed.dims, *x.dims[1:]), (*fixed.zero, *x.zero[1:]))
    return [out if padding_value == 0 else out.without_zero(), g.fixed(lengths)]


def regions(g: Walk, x: Value, rois: Value) -> Any:
    """roi_align, roi_pool: boxes of an image's space, channel by channel."""
    assert g.node is not None
    for labels in (x.dims[0], *x.dims[2:], *rois.dims):
        g.freeze(labels, "is cut into regions")
    several = isinstance(g.node.meta["val"], (list, tuple))
    shape = concrete(g.node.meta["val"][0].shape) if several else g.out_shape
    fixed = g.fixed(shape)
    out = Value((fixed.dims[0], x.dims[1], *fixed.dims[2:]), (True, x.zero[1], True, True))
    return [out, out.without_zero()] if several else out


def unpool(count: int) -> Callable[..., Value]:
    """The inverse of a pooling: what was the largest goes back to its place, the rest is zero."""

    def rule(g: Walk, x: Value, indices: Value) -> Value:
        for d in range(x.ndim - count):
            g.join(x.dims[d], indices.dims[d])
        return spatial(g, x, count)

    return rule


SCATTER_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    **dict.fromkeys(("index_add", "index_copy", "index_reduce"), index_written),
    **dict.fromkeys(("nonzero", "nonzero_numpy"), places_of),
    **dict.fromkeys(("index_put", "_unsafe_index_put"), index_put),
    **dict.fromkeys(("roi_align", "roi_pool"), regions),
    **{f"max_unpool{n}d": unpool(n) for n in (2, 3)},  # one of a dimension is called as one of two
    "gather": gather,
    "take_along_dim": take_along_dim,
    "index_fill": index_filled,
    "masked_scatter": masked_scatter,
    "masked_select": masked_select,
    "_pack_padded_sequence": packed_sequence,
    "_pad_packed_sequence": padded_sequence,
}
