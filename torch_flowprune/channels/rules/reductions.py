"""Rules for operators that reduce, normalise or pool: what statistics are taken over stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch_flowprune.channels.rules.pointwise import singular
from torch_flowprune.channels.rules.views import dropped, replaced, spatial, unflatten
from torch_flowprune.channels.tracing import Value, Walk, concrete

_STATISTICS = "is a dimension that statistics are taken over: removing a channel changes them, masking it does not"


def dims_of(x: Value, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(x.ndim))
    return [d % max(x.ndim, 1) for d in ([dim] if isinstance(dim, int) else dim)]


def _kept_or_dropped(g: Walk, x: Value, dims: Sequence[int], keepdim: bool) -> Value:
    if not keepdim:
        return dropped(x, dims)
    for d in dims:
        x = replaced(x, d, g.axes.fixed(1))
    return x


def statistic(g: Walk, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """Mean, maximum: what is reduced stays; a row of zeros gives zero."""
    dims = dims_of(x, dim)
    for d in dims:
        g.freeze(x.dims[d], _STATISTICS)
    return _kept_or_dropped(g, x, dims, keepdim)


def averaged(g: Walk, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """Mean, variance: of one dimension positions that are zero may go, where the sum goes on being divided by all."""
    dims = dims_of(x, dim)
    _may_span(g, x, dims)
    return _kept_or_dropped(g, x, dims, keepdim)


def _may_span(g: Walk, x: Value, dims: Sequence[int]) -> None:
    """Of the dimensions that statistics are taken over, one may lose positions that are zero: these add nothing."""
    free = [d for d in dims if x.zero[d] and not g.axes.is_fixed(x.dims[d])]
    for d in dims:
        if d not in free[-1:]:
            g.freeze(x.dims[d], _STATISTICS)
    for d in free[-1:]:
        g.span(d - x.ndim, x.dims[d])


def singular_spread(g: Walk, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """A deviation, which has no slope where all is equal. A variance has one, and is a statistic like others."""
    return singular(g, averaged(g, x, dim, keepdim))


def total(g: Walk, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """Sum and norm: terms that are zero may go."""
    dims = dims_of(x, dim)
    for d in dims:
        if not x.zero[d]:
            g.freeze(x.dims[d], "is summed over where a removed unit is not zero")
    return _kept_or_dropped(g, x, dims, keepdim)


def vector_norm(g: Walk, x: Value, ord: float = 2, dim: Any = None, keepdim: bool = False) -> Value:
    return total(g, x, dim, keepdim) if ord >= 1 else statistic(g, x, dim, keepdim)


def p_norm(g: Walk, x: Value, p: float = 2, dim: Any = None, keepdim: bool = False) -> Value:
    return vector_norm(g, x, 2 if p is None else p, dim, keepdim)


def pairwise_distance(g: Walk, x: Value, x2: Value) -> Value:
    for v in (x, x2):
        g.freeze(v.dims[-1], "is added a small number to, channel by channel")
    for labels in (*x.dims, *x2.dims):
        g.freeze(labels, "is a row of distances")
    return g.fixed(g.out_shape)


def scan(g: Walk, x: Value, dim: int) -> Value:
    g.freeze(x.dims[dim], "is scanned in order")
    return x


def log_scan(g: Walk, x: Value, dim: int) -> Value:
    return scan(g, x, dim).without_zero()


def softmax(g: Walk, x: Value, dim: int) -> Value:
    g.freeze(x.dims[dim], _STATISTICS)
    return x.without_zero()


def _affine(g: Walk, x: Value, dim: int, weight: Value | None, bias: Value | None) -> Value:
    """A scale and a shift along one dimension; zero where both are."""
    for v in (weight, bias):
        if v is not None:
            g.join(x.dims[dim], v.dims[0])
    zero = [False] * x.ndim
    zero[dim] = weight is not None and weight.zero[0] and (bias is None or bias.zero[0])
    return Value(x.dims, tuple(zero))


def batch_norm(
    g: Walk, x: Value, weight: Value | None, bias: Value | None, running_mean: Value | None, running_var: Value | None
) -> Value:
    """Each channel by itself; in training over all other dimensions, which therefore stay."""
    for d, labels in enumerate(x.dims):
        if d != 1:
            g.freeze(labels, _STATISTICS)
    for v in (running_mean, running_var):
        if v is not None:
            g.join(x.dims[1], v.dims[0])
    return _affine(g, x, 1, weight, bias)


def instance_norm(
    g: Walk, x: Value, weight: Value | None, bias: Value | None, running_mean: Value | None, running_var: Value | None
) -> Value:
    return batch_norm(g, x, weight, bias, running_mean, running_var)


def group_norm(g: Walk, x: Value, num_groups: int, weight: Value | None = None, bias: Value | None = None) -> Value:
    """Statistics over a group's channels and space: whole groups may go, or of a single one what is zero."""
    for labels in x.dims[2:]:
        g.freeze(labels, _STATISTICS)
    if num_groups == 1:
        _may_span(g, x, [1])
        return _affine(g, x, 1, weight, bias)
    groups = unflatten(g, x.dims[1], [num_groups, x.shape[1] // num_groups], axis=0)[0]
    g.count("num_groups", groups)
    return _affine(g, x, 1, weight, bias)


def layer_norm(
    g: Walk, x: Value, normalized_shape: Sequence[int], weight: Value | None = None, bias: Value | None = None
) -> Value:
    """A row of zeros is normalised to zeros, which the shift moves; a channel that is zero to what the mean takes."""
    out = _normalised(g, x, len(normalized_shape), weight, bias)
    own = weight is not None and weight.zero[-1] and (bias is None or bias.zero[-1])
    return out.with_zero([*((False,) * (x.ndim - 1) if bias is not None else x.zero[:-1]), own])


def rms_norm(g: Walk, x: Value, normalized_shape: Sequence[int], weight: Value | None = None) -> Value:
    """Without a mean zeros stay zeros."""
    out = _normalised(g, x, len(normalized_shape), weight, None)
    return out.with_zero([*x.zero[:-1], x.zero[-1] or (weight is not None and weight.zero[-1])])


def _normalised(g: Walk, x: Value, last: int, weight: Value | None, bias: Value | None) -> Value:
    """Over the last dimension channels that are zero may go; over several of them all stay."""
    if last == 1:
        _may_span(g, x, [x.ndim - 1])
        for v in (weight, bias):
            if v is not None:
                g.join(x.dims[-1], v.dims[0])
        return x
    for v in (x, weight, bias):
        for labels in v.dims[v.ndim - last :] if v is not None else ():
            g.freeze(labels, _STATISTICS)
    return x


def weight_norm(walk: Walk, x: Value, g: Value, dim: int = 0) -> Value:
    """A direction over its norm, each row of it times a length (for a dim of -1, all of it times one).

    A row whose length is zero is zero whatever its direction, which is divided by its norm and must not be zero too.
    """
    rows = set() if dim == -1 else {dim % x.ndim}
    for d, labels in enumerate(x.dims):
        if d in rows:
            walk.join(labels, g.dims[d])
            walk.role(labels, "direction")
        else:
            _in_norms(walk, x, d)
    of = [g if d in rows else x for d in range(x.ndim)]
    return Value(tuple(v.dims[d] for d, v in enumerate(of)), tuple(v.zero[d] for d, v in enumerate(of)))


def renorm(walk: Walk, x: Value, p: float, dim: int, maxnorm: float) -> Value:
    """Slices along a dimension, each of them scaled down to a largest norm."""
    for d in range(x.ndim):
        if d != dim % x.ndim:
            _in_norms(walk, x, d)
    return x


def _in_norms(walk: Walk, x: Value, d: int) -> None:
    if x.zero[d]:
        walk.role(x.dims[d], "consumer")  # masked, so that norms are those of what is left
    else:
        walk.freeze(x.dims[d], "is summed over where a removed unit is not zero")


def pool(count: int) -> Callable[..., Value]:
    def rule(g: Walk, x: Value) -> Value:
        return spatial(g, x, count)

    return rule


def pool_with_places(count: int) -> Callable[..., list[Value]]:
    """The largest of a window, and where it was."""

    def rule(g: Walk, x: Value) -> list[Value]:
        assert g.node is not None
        out = spatial(g.at_shape(concrete(g.node.meta["val"][0].shape)), x, count)
        return [out, out.without_zero()]

    return rule


def resample(g: Walk, x: Value) -> Value:
    return spatial(g, x, x.ndim - 2)


def grid_sample(g: Walk, x: Value, grid: Value) -> Value:
    for labels in grid.dims:
        g.freeze(labels, "is a grid of positions")
    return spatial(g, x, x.ndim - 2)
