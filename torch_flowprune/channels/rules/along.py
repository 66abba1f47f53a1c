"""Rules for operators that rank, pick or transform along some dimensions, each slice of the others by itself.

The dimensions they work along stay. Of the others any position may go: nothing is read across them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch_flowprune.channels.rules.pointwise import added
from torch_flowprune.channels.rules.reductions import averaged, dims_of, singular_spread, statistic
from torch_flowprune.channels.rules.slicing import cat
from torch_flowprune.channels.rules.views import replaced, spatial
from torch_flowprune.channels.tracing import Value, Walk, concrete


def along(g: Walk, x: Value, dims: Sequence[int]) -> Value:
    """What the operator makes of zeros is zero: of every slice that is gone there are zeros."""
    for d in dims:
        g.freeze(x.dims[d], "is worked along as a whole")
        x = replaced(x, d, g.axes.fixed(g.out_shape[d]))
    return x


def _with_places(values: Value) -> list[Value]:
    """Values, and where they were: an index, of which nothing says that it is zero."""
    return [values, values.without_zero()]


def reduced_with_places(g: Walk, x: Value, dim: Any = None, other: Any = None, keepdim: bool = False) -> Any:
    """max, min, median: of all, along a dimension with places, or of two tensors."""
    if other is not None:
        return added(g, [x, other])
    out = statistic(g, x, dim, keepdim)
    return out if dim is None else _with_places(out)


def picked_with_places(g: Walk, x: Value, dim: int = -1, keepdim: bool = False) -> list[Value]:
    return _with_places(statistic(g, x, dim, keepdim))


def places(g: Walk, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return statistic(g, x, dim, keepdim).without_zero()


def ranked(g: Walk, x: Value, dim: int = -1) -> list[Value]:
    """sort, topk, cummax: as many as there are, or as are asked for."""
    assert g.node is not None
    return _with_places(along(g.at_shape(concrete(g.node.meta["val"][0].shape)), x, [dim]))


def order(g: Walk, x: Value, dim: int = -1) -> Value:
    return along(g, x, [dim]).without_zero()


def extremes(g: Walk, x: Value, dim: Any = None, keepdim: bool = False) -> list[Value]:
    return [statistic(g, x, dim, keepdim)] * 2


def spread_and_mean(g: Walk, x: Value, dim: Any = None, keepdim: bool = False) -> list[Value]:
    return [singular_spread(g, x, dim, keepdim), averaged(g, x, dim, keepdim)]


def variance_and_mean(g: Walk, x: Value, dim: Any = None, keepdim: bool = False) -> list[Value]:
    return [averaged(g, x, dim, keepdim)] * 2


def log_total(g: Walk, x: Value, dim: Any, keepdim: bool = False) -> Value:
    return statistic(g, x, dim, keepdim).without_zero()


def differences(g: Walk, x: Value, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    parts = [part for part in (prepend, x, append) if part is not None]
    shape = [sum(part.shape[d] for part in parts) if d == dim % x.ndim else size for d, size in enumerate(x.shape)]
    return along(g, cat(g.at_shape(shape), parts, dim), [dim])


def fractional_pool(count: int) -> Callable[..., list[Value]]:
    """Where windows begin is drawn for each channel."""

    def rule(g: Walk, x: Value, random_samples: Value) -> list[Value]:
        assert g.node is not None
        g.join(x.dims[-count - 1], random_samples.dims[1])
        return _with_places(spatial(g.at_shape(concrete(g.node.meta["val"][0].shape)), x, count))

    return rule


def in_bins(g: Walk, x: Value) -> Value:
    """How many values fall into each of some bins: zeros do too."""
    for labels in x.dims:
        g.freeze(labels, "is counted")
    return g.fixed(g.out_shape)


def turned(g: Walk, x: Value, k: int = 1, dims: Sequence[int] = (0, 1)) -> Value:
    return along(g, x, dims)


def fourier(g: Walk, x: Value, dim: int = -1) -> Value:
    return along(g, x, [dim])


def fourier_of_several(g: Walk, x: Value, s: Any = None, dim: Any = None) -> Value:
    given = dims_of(x, dim)
    return along(g, x, given if dim is not None or s is None else given[-len(s) :])


def triangle(g: Walk, x: Value) -> Value:
    return along(g, x, [-2, -1])


def parts_as_last(g: Walk, x: Value) -> Value:
    """A complex tensor as two numbers along a new last dimension."""
    return Value((*x.dims, g.axes.fixed(2)), (*x.zero, True))


def parts_of_last(g: Walk, x: Value) -> Value:
    return Value(x.dims[:-1], x.zero[:-1])


_ONE = ("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
_SEVERAL = tuple(f"fft_{kind}{many}" for kind in ("fft", "ifft", "rfft", "irfft") for many in ("2", "n"))

ALONG_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("max", "min", "median", "nanmedian"), reduced_with_places),
    **dict.fromkeys(("mode", "kthvalue"), picked_with_places),
    **dict.fromkeys(("sort", "topk", "cummax", "cummin"), ranked),
    **dict.fromkeys(("argmax", "argmin"), places),
    **dict.fromkeys(_ONE, fourier),
    **dict.fromkeys((*_SEVERAL, "fft_fftshift", "fft_ifftshift"), fourier_of_several),
    **dict.fromkeys(("tril", "triu"), triangle),
    "argsort": order,
    "aminmax": extremes,
    "std_mean": spread_and_mean,
    "var_mean": variance_and_mean,
    "logsumexp": log_total,
    "diff": differences,
    "histc": in_bins,
    **{f"fractional_max_pool{n}d": fractional_pool(n) for n in (2, 3)},
    "rot90": turned,
    "view_as_real": parts_as_last,
    "view_as_complex": parts_of_last,
}
