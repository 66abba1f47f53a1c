"""Rules for operators that move positions about: reshape, permute, expand.

A dimension that is a product of several can lose positions only along one factor, so that what is left is a product
again.
Which factor that is, where the graph leaves it open, is a choice (``Walk.choose``), outermost factor first: heads
rather than positions within a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torch_flowprune.channels.tracing import Value, Walk, concrete, operator_name


def reshape(g: Walk, x: Value) -> Any:
    """Dimensions are matched in groups of equal product; each group is flattened, then unflattened."""
    if 0 in x.shape:  # of nothing every product is the same
        return NotImplemented
    dims: list[Tensor] = []
    zero: list[bool] = []
    for old, new in _runs_of_equal_product(x.shape, g.out_shape):
        if len(old) == len(new) == 1:
            dims.append(x.dims[old[0]])
            zero.append(x.zero[old[0]])
            continue
        labels, is_zero = _flatten(g, [x.dims[i] for i in old], [x.zero[i] for i in old])
        sizes = [g.out_shape[i] for i in new]
        dims += unflatten(g, labels, sizes)
        zero += [is_zero] * len(sizes)
    return Value(tuple(dims), tuple(zero))


def _runs_of_equal_product(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of runs of dimensions with equal product, as short as can be; dimensions of one position go along."""
    pairs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = list(range(i, min(i + 1, len(old)))), list(range(j, min(j + 1, len(new))))
        while prod(old[k] for k in left) != prod(new[k] for k in right):
            if prod(old[k] for k in left) < prod(new[k] for k in right):
                left.append(left[-1] + 1 if left else i)
            else:
                right.append(right[-1] + 1 if right else j)
        i, j = i + len(left), j + len(right)
        pairs.append((left, right))
    return pairs


def _flatten(g: Walk, dims: Sequence[Tensor], zero: Sequence[bool]) -> tuple[Tensor, bool]:
    """The labels of a row-major product of dimensions, of which one can be removable; the others are frozen."""
    sizes = [len(d) for d in dims]
    free = [i for i, d in enumerate(dims) if not g.axes.is_fixed(d)]
    if not free:
        return g.axes.fixed(prod(sizes)), True
    # axes made by expand belong to no parameter: those with a name are tried first
    free.sort(key=lambda i: not g.axes.is_named(dims[i]))
    kept = free[g.choose([dims[i] for i in free])] if len(free) > 1 else free[0]
    for i in free:
        if i != kept:
            g.freeze(dims[i], "is flattened together with another axis")
    view = [1] * len(sizes)
    view[kept] = sizes[kept]
    return dims[kept].view(view).expand(sizes).reshape(-1), zero[kept]


def unflatten(g: Walk, labels: Tensor, sizes: Sequence[int], axis: int | None = None) -> list[Tensor]:
    """The labels of the factors of a dimension: one factor (``axis``, or chosen) is removable, the others stay."""
    if g.axes.is_fixed(labels):
        return [g.axes.fixed(s) for s in sizes]
    grid = labels.reshape(tuple(sizes))
    options = [i for i, s in enumerate(sizes) if s > 1] if axis is None else [axis]
    if _is_shuffle(g.node) != g.inner:
        options.reverse()
    natural = [i for i in options if _is_repeated(grid, i)]
    kept = natural[0] if natural else options[g.choose([_along(grid, i)[:, 0] for i in options])]
    rows = _along(grid, kept)
    g.join(rows[:, :1].expand_as(rows).reshape(-1), rows.reshape(-1))
    rest = g.why("another factor of the same axis is removable")
    return [rows[:, 0] if i == kept else g.axes.softly_fixed(s, rest) for i, s in enumerate(sizes)]


def _is_shuffle(node: Node | None) -> bool:
    """Factors that are swapped and flattened at once: a number of groups, and the channels of each."""
    shape = concrete(node.all_input_nodes[0].meta["val"].shape) if node is not None else ()
    for name in (("transpose", "permute", "swapaxes"), ("contiguous", "clone"), ("view", "reshape", "flatten")):
        user = next(iter(node.users)) if node is not None and len(node.users) == 1 else None
        if user is not None and operator_name(user) in name:
            node = user
        elif "contiguous" not in name:
            return False
    return node is not None and concrete(node.meta["val"].shape) == shape


def _along(grid: Tensor, axis: int) -> Tensor:
    """The grid as (size of that axis, everything else)."""
    return grid.movedim(axis, 0).reshape(grid.shape[axis], -1)


def _is_repeated(grid: Tensor, axis: int) -> bool:
    rows = _along(grid, axis)
    return bool((rows == rows[:, :1]).all())


def broadcast(g: Walk, values: Sequence[Any], zero: Callable[[list[bool | None]], bool]) -> Value:
    """Operands laid over one another as torch broadcasts them.

    ``zero`` is given, per dimension, each operand's flag (None where it has no such dimension, or one position that is
    repeated) and tells the result's.
    """
    dims, flags = [], []
    for d, size in enumerate(g.out_shape):
        held: list[bool | None] = []
        labels: Tensor | None = None
        for v in values:
            i = d - len(g.out_shape) + v.ndim if isinstance(v, Value) else -1
            if i < 0 or size == 1 or len(v.dims[i]) != size:
                held.append(None)
                continue
            held.append(v.zero[i])
            if labels is None:
                labels = v.dims[i]
            else:
                g.join(labels, v.dims[i])
        dims.append(g.axes.fixed(size) if labels is None else labels)
        flags.append(zero(held))
    return Value(tuple(dims), tuple(flags))


def permute(g: Walk, x: Value, dims: Sequence[int]) -> Value:
    return Value(tuple(x.dims[d] for d in dims), tuple(x.zero[d] for d in dims))


def transpose(g: Walk, x: Value, dim0: int, dim1: int) -> Value:
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(g, x, order)


def swapaxes(g: Walk, x: Value, axis0: int, axis1: int) -> Value:
    return transpose(g, x, axis0, axis1)


def swap_last(g: Walk, x: Value) -> Value:
    return transpose(g, x, -2, -1) if x.ndim > 1 else x


def reverse_all(g: Walk, x: Value) -> Value:
    return permute(g, x, list(range(x.ndim))[::-1])


def movedim(g: Walk, x: Value, source: Any, destination: Any) -> Value:
    # sizes that are all different tell where each dimension went
    marked = torch.empty(tuple(range(2, 2 + x.ndim)), device="meta").movedim(source, destination)
    order = [s - 2 for s in marked.shape]
    return permute(g, x, order)


def expand(g: Walk, x: Value) -> Value:
    return _expanded(g, x, None)


def expand_as(g: Walk, x: Value, other: Value) -> Value:
    return _expanded(g, x, other)


def _expanded(g: Walk, x: Value, like: Value | None) -> Value:
    dims, zero = [], []
    for d, size in enumerate(g.out_shape):
        i = d - len(g.out_shape) + x.ndim
        if i >= 0 and len(x.dims[i]) == size:
            dims.append(x.dims[i])
            zero.append(x.zero[i])
        else:  # the same content repeated: any of it may go, with what it is combined with
            dims.append(like.dims[d] if like is not None else g.axes.fresh(size))
            zero.append(False)
    return Value(tuple(dims), tuple(zero))


def repeat(g: Walk, x: Value, repeats: Sequence[int]) -> Value:
    dims, zero = [], []
    for d, times in enumerate(repeats):
        i = d - len(repeats) + x.ndim
        single = i < 0 or len(x.dims[i]) == 1
        dims.append(g.axes.fresh(times) if single else x.dims[i].repeat(times))
        zero.append(False if single else x.zero[i])
    return Value(tuple(dims), tuple(zero))


def tile(g: Walk, x: Value, dims: Sequence[int]) -> Value:
    return repeat(g, x, [*[1] * (x.ndim - len(dims)), *dims])


def repeat_interleave(g: Walk, x: Value, repeats: Any, dim: int | None = None) -> Any:
    if dim is None or not isinstance(repeats, int):
        return NotImplemented
    return replaced(x, dim, x.dims[dim].repeat_interleave(repeats))


def unsqueeze(g: Walk, x: Value, dim: int) -> Value:
    dim = dim % (x.ndim + 1)
    return Value((*x.dims[:dim], g.axes.fixed(1), *x.dims[dim:]), (*x.zero[:dim], True, *x.zero[dim:]))


def squeeze(g: Walk, x: Value, dim: Any = None) -> Value:
    chosen = range(x.ndim) if dim is None else [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    kept = [d for d in range(x.ndim) if d not in chosen or len(x.dims[d]) != 1]
    return Value(tuple(x.dims[d] for d in kept), tuple(x.zero[d] for d in kept))


def spatial(g: Walk, x: Value, count: int) -> Value:
    """The last ``count`` dimensions are space and stay; the others are untouched."""
    for d in x.dims[x.ndim - count :]:
        g.freeze(d, "is treated as space")
    fixed = g.fixed(g.out_shape)
    return Value((*x.dims[: x.ndim - count], *fixed.dims[x.ndim - count :]), x.zero)


def replaced(x: Value, dim: int, labels: Tensor) -> Value:
    dims = list(x.dims)
    dims[dim] = labels
    return Value(tuple(dims), x.zero)


def dropped(x: Value, dims: Sequence[int]) -> Value:
    gone = {d % x.ndim for d in dims}
    kept = [d for d in range(x.ndim) if d not in gone]
    return Value(tuple(x.dims[d] for d in kept), tuple(x.zero[d] for d in kept))


SHAPE_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("reshape", "view", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"), reshape),
    **dict.fromkeys(("transpose", "swapdims"), transpose),
    **dict.fromkeys(("t", "mT", "matrix_H", "adjoint"), swap_last),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    "swapaxes": swapaxes,
    "numpy_T": reverse_all,
    "permute": permute,
    "expand": expand,
    "expand_as": expand_as,
    "repeat": repeat,
    "tile": tile,
    "repeat_interleave": repeat_interleave,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
}
