"""What a masked model computes over all of a dimension, computed from the positions that are left of it.

A mean over channels is divided by their number, masked or not; where they are gone, by the number that there was. Each
function here takes the dimension and its dense size first, and else what torch's function of its name takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_HALF = (torch.float16, torch.bfloat16)


def mean_over(dim: int, dense: int, /, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Zeros add nothing to the sum."""
    return torch.mean(input, *args, **kwargs) * (input.shape[dim] / dense)


def var_mean_over(
    dim: int, dense: int, /, input: Tensor, of: Any = None, unbiased: bool = True, keepdim: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The squared distances of zeros from the mean are the mean's square."""
    if isinstance(of, bool):
        of, unbiased = None, of
    of, keepdim = kwargs.get("dim", of), kwargs.get("keepdim", keepdim)
    correction = kwargs.get("correction", int(kwargs.get("unbiased", unbiased)))
    correction = 1 if correction is None else correction
    dims = list(range(input.ndim)) if of is None else [of] if isinstance(of, int) else list(of)
    var, mean = torch.var_mean(input, dims, correction=0, keepdim=keepdim)
    left = input.shape[dim] / dense
    count = 1
    for d in dims:
        count *= dense if d % input.ndim == dim % input.ndim else input.shape[d]
    spread = (var + mean.square() * (1 - left)) * left
    return spread * (count / max(count - correction, 0)) if correction else spread, mean * left


def var_over(dim: int, dense: int, /, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As ``torch.var``."""
    return var_mean_over(dim, dense, input, *args, **kwargs)[0]


def std_over(dim: int, dense: int, /, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As ``torch.std``."""
    return var_over(dim, dense, input, *args, **kwargs).sqrt()


def std_mean_over(dim: int, dense: int, /, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """As ``torch.std_mean``."""
    var, mean = var_mean_over(dim, dense, input, *args, **kwargs)
    return var.sqrt(), mean


def layer_norm_over(
    dim: int,
    dense: int,
    /,
    input: Tensor,
    normalized_shape: Sequence[int],  # noqa: ARG001 - what is left of the dimension has the size that it has
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """As ``torch.nn.functional.layer_norm`` over the last dimension."""
    return _over_zeros(dim, dense, input, (-1,), weight, bias, eps)


def group_norm_over(
    dim: int,
    dense: int,
    /,
    input: Tensor,
    num_groups: int,  # noqa: ARG001 - one
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """As ``torch.nn.functional.group_norm`` of one group."""
    column = [-1] + [1] * (input.ndim - 2)
    shaped = [None if v is None else v.reshape(column) for v in (weight, bias)]
    return _over_zeros(dim, dense, input, tuple(range(1, input.ndim)), shaped[0], shaped[1], eps)


def _over_zeros(
    dim: int,
    dense: int,
    x: Tensor,
    of: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """In float32 at least, as torch's kernels do it.

    The variance is the mean of x (x - mean), of which zeros are zero.
    """
    wide, left = x.float() if x.dtype in _HALF else x, x.shape[dim] / dense
    centred = wide - wide.mean(of, keepdim=True) * left
    var = (wide * centred).mean(of, keepdim=True).clamp_min(0) * left
    out = centred * (var + eps).rsqrt()
    if weight is not None and bias is not None:
        out = torch.addcmul(bias, out, weight)
    else:
        out = out if weight is None else out * weight
        out = out if bias is None else out + bias
    return out if torch.is_autocast_enabled(x.device.type) else out.to(x.dtype)


def rms_norm_over(
    dim: int,
    dense: int,
    /,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Exactly an RMS norm of what is left, with another ``eps`` and a scale."""
    left = input.shape[dim] / dense
    if eps is None:
        eps = torch.finfo(torch.float32 if input.dtype in _HALF else input.dtype).eps
    out = functional.rms_norm(input, normalized_shape, None if weight is None else weight * left**-0.5, eps / left)
    return out * left**-0.5 if weight is None else out


def scaled_dot_product_attention_over(dim: int, dense: int, /, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG001 - the last
    """The default scale is that of the dense width of a head."""
    return functional.scaled_dot_product_attention(query, *args, **{**kwargs, "scale": dense**-0.5})


def forward_over(dim: int, dense: int, /, norm: Any, input: Tensor) -> Tensor:
    """As the forward of torch's own norms."""
    if isinstance(norm, nn.LayerNorm):
        return layer_norm_over(dim, dense, input, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    if isinstance(norm, nn.RMSNorm):
        return rms_norm_over(dim, dense, input, norm.normalized_shape, norm.weight, norm.eps)
    return group_norm_over(dim, dense, input, norm.num_groups, norm.weight, norm.bias, norm.eps)


OVER: dict[str, Callable[..., Any]] = {
    f.__name__.removesuffix("_over"): f
    for f in (
        mean_over,
        var_mean_over,
        var_over,
        std_over,
        std_mean_over,
        layer_norm_over,
        group_norm_over,
        rms_norm_over,
        scaled_dot_product_attention_over,
        forward_over,
    )
}
"""By the name of the function in whose place each is called."""
