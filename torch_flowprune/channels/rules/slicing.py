"""Rules for operators that cut a tensor up or put one together: cat, split, slice, index, pad, windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torch_flowprune.channels.rules.views import dropped, replaced, spatial, unflatten, unsqueeze
from torch_flowprune.channels.tracing import Value, Walk, concrete


def cat(g: Walk, x: Sequence[Value], dim: int = 0) -> Value:
    x = [v for v in x if v.shape != (0,)] or list(x)  # torch's legacy: an empty vector concatenates with anything
    dim = dim % x[0].ndim
    out = x[0]
    for d in range(out.ndim):
        if d == dim:
            continue
        for v in x[1:]:
            g.join(out.dims[d], v.dims[d])
    zero = [all(v.zero[d] for v in x) for d in range(out.ndim)]
    return Value((*out.dims[:dim], torch.cat([v.dims[dim] for v in x]), *out.dims[dim + 1 :]), tuple(zero))


def stack(g: Walk, x: Sequence[Value], dim: int = 0) -> Value:
    return cat(g, [unsqueeze(g, v, dim) for v in x], dim)


def slice_(g: Walk, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Value:
    if step != 1:
        g.freeze(x.dims[dim], "is read with a stride")
    return replaced(x, dim, g.segment(x.dims[dim][slice(start, end, step)]))


def narrow(g: Walk, x: Value, dim: int, start: int, length: int) -> Value:
    return replaced(x, dim, g.segment(x.dims[dim].narrow(0, start, length)))


def select(g: Walk, x: Value, dim: int) -> Value:
    g.freeze(x.dims[dim], "is picked from by position")
    return dropped(x, [dim])


def unbind(g: Walk, x: Value, dim: int = 0) -> list[Value]:
    return [select(g, x, dim)] * x.shape[dim]


def split(g: Walk, x: Value, split_size: int | Sequence[int], dim: int = 0) -> list[Value]:
    if not isinstance(split_size, int):
        return split_with_sizes(g, x, split_size, dim)
    parts = torch.split(x.dims[dim], split_size)
    return _equal_parts(g, x, dim, parts)


def chunk(g: Walk, x: Value, chunks: int, dim: int = 0) -> list[Value]:
    return _equal_parts(g, x, dim, x.dims[dim].chunk(chunks))


def _equal_parts(g: Walk, x: Value, dim: int, parts: Sequence[Tensor]) -> list[Value]:
    """Parts stay equal in length: position i of every part lives or dies together."""
    for part in parts[1:]:
        if len(part) == len(parts[0]):
            g.join(parts[0], part)
        else:
            g.freeze(x.dims[dim], "is cut into unequal parts by a single length")
    return [replaced(x, dim, g.segment(p)) for p in parts]


def split_with_sizes(g: Walk, x: Value, split_sizes: Sequence[int], dim: int = 0) -> list[Value]:
    return [replaced(x, dim, g.segment(p)) for p in torch.split(x.dims[dim], list(split_sizes))]


def flip(g: Walk, x: Value, dims: Sequence[int]) -> Value:
    for d in dims:
        x = replaced(x, d, x.dims[d].flip(0))
    return x


def roll(g: Walk, x: Value, dims: Sequence[int] = ()) -> Value:
    for d in dims or range(x.ndim):
        g.freeze(x.dims[d], "is rotated by a fixed amount")
    return x


def pad(g: Walk, x: Value, pad: Sequence[int], value: float | None = 0.0) -> Value:
    dims = list(x.dims)
    for i in range(len(pad) // 2):
        d = x.ndim - 1 - i
        if pad[2 * i] or pad[2 * i + 1]:
            g.freeze(x.dims[d], "is padded")
            dims[d] = g.axes.fixed(g.out_shape[d])
    padded = any(pad)
    return Value(tuple(dims), tuple(z and not (padded and value) for z in x.zero))


def index(g: Walk, x: Value, indices: Sequence[Any]) -> Any:
    """Advanced indexing: the indexed dimensions stay, the others are untouched."""
    if len(indices) == 1 and _is_mask(g):
        return _by_mask(g, x, indices[0])
    used = [d for d, i in enumerate(indices) if i is not None]
    extra = max((indices[d].ndim for d in used), default=0)
    if not used or x.ndim - len(used) + extra != len(g.out_shape):
        return NotImplemented
    for d in used:
        g.freeze(x.dims[d], "is indexed")
        for labels in indices[d].dims:
            g.freeze(labels, "is used as an index")
    rest = [d for d in range(x.ndim) if d not in used]
    together = used == list(range(used[0], used[0] + len(used)))
    at = used[0] if together else 0
    before, after = [d for d in rest if d < at], [d for d in rest if d >= at]
    new = [g.axes.fixed(s) for s in g.out_shape[len(before) : len(before) + extra]]
    dims = (*(x.dims[d] for d in before), *new, *(x.dims[d] for d in after))
    return Value(dims, (*(x.zero[d] for d in before), *[True] * extra, *(x.zero[d] for d in after)))


def _is_mask(g: Walk) -> bool:
    assert g.node is not None
    given = g.node.args[1]
    return (
        isinstance(given, (list, tuple))
        and isinstance(given[0], Node)
        and given[0].meta["val"].dtype in (torch.bool, torch.uint8)
    )


def _by_mask(g: Walk, x: Value, mask: Value) -> Value:
    """``x[mask]``: the dimensions of the mask become one."""
    for labels in (*x.dims[: mask.ndim], *mask.dims):
        g.freeze(labels, "is picked from by a mask")
    return Value((g.axes.fixed(g.out_shape[0]), *x.dims[mask.ndim :]), (True, *x.zero[mask.ndim :]))


def index_select(g: Walk, x: Value, dim: int, index: Value) -> Value:
    g.freeze(x.dims[dim], "is indexed")
    for labels in index.dims:
        g.freeze(labels, "is used as an index")
    return replaced(x, dim, g.axes.fixed(g.out_shape[dim]))


def embedding(g: Walk, weight: Value, indices: Value) -> Value:
    g.freeze(weight.dims[0], "is indexed")
    g.role(weight.dims[1], "producer")
    return Value((*indices.dims, weight.dims[1]), (*[False] * indices.ndim, weight.zero[1]))


def embedding_bag(g: Walk, weight: Value, indices: Value) -> list[Value]:
    """Sums, means or maxima of an embedding's rows; the other results say which rows they were."""
    assert g.node is not None
    out = embedding(g, weight, indices)
    shapes = [concrete(v.shape) for v in g.node.meta["val"]]
    bags = Value((g.axes.fixed(shapes[0][0]), out.dims[-1]), (True, out.zero[-1]))
    return [bags, *(g.fixed(shape) for shape in shapes[1:])]


def unfold(g: Walk, x: Value, dimension: int) -> Value:
    g.freeze(x.dims[dimension], "is cut into windows")
    fixed, dimension = g.fixed(g.out_shape), dimension % x.ndim  # of one dimension less than what comes out
    kept = replaced(x, dimension, fixed.dims[dimension])
    return Value((*kept.dims, fixed.dims[-1]), (*kept.zero, True))


def im2col(g: Walk, x: Value, kernel_size: Sequence[int]) -> Value:
    for d in x.dims[-2:]:
        g.freeze(d, "is cut into windows")
    columns = x.dims[-3].repeat_interleave(prod(kernel_size))
    return Value((*x.dims[:-3], columns, g.axes.fixed(g.out_shape[-1])), (*x.zero[:-2], True))


def col2im(g: Walk, x: Value, kernel_size: Sequence[int]) -> Value:
    size = prod(kernel_size)
    channels = unflatten(g, x.dims[-2], [len(x.dims[-2]) // size, size], axis=0)[0]
    g.freeze(x.dims[-1], "is put together from windows")
    fixed = g.fixed(g.out_shape)
    return Value((*x.dims[:-2], channels, *fixed.dims[-2:]), (*x.zero[:-2], x.zero[-2], True, True))


def pixel_shuffle(g: Walk, x: Value, upscale_factor: int) -> Value:
    size = upscale_factor**2
    channels = unflatten(g, x.dims[-3], [len(x.dims[-3]) // size, size], axis=0)[0]
    return spatial(g, replaced(x, -3, channels), 2)


def channel_shuffle(g: Walk, x: Value, groups: int) -> Value:
    """The same channels of every group may go."""
    channels = unflatten(g, x.dims[1], [groups, x.shape[1] // groups], axis=1)[1]
    return replaced(x, 1, channels.repeat_interleave(groups))


def pixel_unshuffle(g: Walk, x: Value, downscale_factor: int) -> Value:
    return spatial(g, replaced(x, -3, x.dims[-3].repeat_interleave(downscale_factor**2)), 2)


CUT_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    "cat": cat,
    "concat": cat,
    "stack": stack,
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "unbind": unbind,
    "split": split,
    "chunk": chunk,
    "split_with_sizes": split_with_sizes,
    "flip": flip,
    "roll": roll,
    "index": index,
    "index_select": index_select,
    "embedding": embedding,
    "unfold": unfold,
    "im2col": im2col,
    "col2im": col2im,
    **dict.fromkeys(("embedding_bag", "_embedding_bag"), embedding_bag),
    "channel_shuffle": channel_shuffle,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
}
