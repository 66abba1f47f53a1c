"""One table: operator -> what it does to the labels of its operands. Any other operator freezes what it touches.

A rule names the arguments it needs as the operator's schema does (``x`` is the first one) and returns the result's
``Value``, or ``NotImplemented`` where it cannot tell. Rules never guess: a position may be removed only where the
smaller tensor is proved to hold what the masked one holds elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_flowprune.channels.rules.along import ALONG_RULES
from torch_flowprune.channels.rules.matrix import (
    addmm,
    attention,
    baddbmm,
    bilinear_layer,
    conjugate_product,
    convolution,
    deformable_convolution,
    distances,
    einsum,
    inner_product,
    linear_layer,
    matmul,
    matrix_product,
    matrix_vector,
    outer_product,
    product_by_groups,
    similarity,
    transposed_convolution,
)
from torch_flowprune.channels.rules.pointwise import (
    add,
    addcmul,
    clamp,
    compared,
    copy,
    divide,
    fill,
    filled,
    filled_like,
    glu,
    hardtanh,
    hypotenuse,
    keeps,
    lerp,
    masked_fill,
    moves,
    multiply,
    nothing,
    one_hot,
    positions,
    power,
    prelu,
    quotient_added,
    several_positions,
    sign_copied,
    singular,
    step_functions,
    threshold,
    where,
)
from torch_flowprune.channels.rules.recurrent import RECURRENT_RULES
from torch_flowprune.channels.rules.reductions import (
    averaged,
    batch_norm,
    grid_sample,
    group_norm,
    instance_norm,
    layer_norm,
    log_scan,
    p_norm,
    pairwise_distance,
    pool,
    pool_with_places,
    renorm,
    resample,
    rms_norm,
    scan,
    singular_spread,
    softmax,
    statistic,
    total,
    vector_norm,
    weight_norm,
)
from torch_flowprune.channels.rules.scattering import SCATTER_RULES
from torch_flowprune.channels.rules.slicing import CUT_RULES
from torch_flowprune.channels.rules.views import SHAPE_RULES

_KEEPING = (
    "relu relu6 gelu silu tanh hardswish leaky_relu elu selu celu mish abs neg sign sin tan atan asin sinh asinh erf "
    "expm1 log1p floor ceil round trunc square contiguous clone detach alias lift_fresh_copy lift_fresh to type_as "
    "_to_copy dropout feature_dropout native_dropout positive real conj resolve_conj resolve_neg hardshrink softshrink "
    "nan_to_num deg2rad rrelu erfinv atanh sgn frac imag special_erf"
).split()
_MOVING = (
    "sigmoid hardsigmoid exp cos cosh softplus erfc log_sigmoid logical_not bitwise_not isnan isinf exp2 bernoulli "
    "isfinite signbit sinc i0 alpha_dropout feature_alpha_dropout special_expit"
).split()
_SINGULAR = ("log log2 log10 sqrt rsqrt reciprocal acos acosh logit special_logit lgamma digamma").split()
_COMPARING = (
    "eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor isclose "
    "logaddexp logaddexp2 __and__ __or__ __xor__"
).split()
_POOLS = {f"{kind}{n}d": n for n in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool")}
_POOLS_WITH_PLACES = {
    f"{kind}max_pool{n}d{end}": n for n in (1, 2, 3) for kind, end in (("", "_with_indices"), ("adaptive_", ""))
}
_UPSAMPLES = (
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa"
).split()

RULES: dict[str, Callable[..., Any]] = {
    **SHAPE_RULES,
    **CUT_RULES,
    **ALONG_RULES,
    **SCATTER_RULES,
    **RECURRENT_RULES,
    **dict.fromkeys(_KEEPING, keeps),
    **dict.fromkeys(_MOVING, moves),
    **dict.fromkeys(_SINGULAR, singular),
    **dict.fromkeys(_COMPARING, compared),
    **dict.fromkeys(("add", "sub", "rsub", "subtract"), add),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), add),
    **dict.fromkeys(("mul", "multiply"), multiply),
    **dict.fromkeys(("div", "divide", "true_divide", "floor_divide", "remainder", "fmod", "xlogy", "atan2"), divide),
    **{name: pool(n) for name, n in _POOLS.items()},
    **dict.fromkeys(_UPSAMPLES, resample),
    **{name: pool_with_places(n) for name, n in _POOLS_WITH_PLACES.items()},
    **dict.fromkeys(("mean", "var"), averaged),
    **dict.fromkeys(("nanmean", "amax", "amin", "prod", "all"), statistic),
    **dict.fromkeys(("sum", "nansum", "any", "count_nonzero"), total),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed_convolution),
    **dict.fromkeys(("mm", "bmm"), matrix_product),
    **dict.fromkeys(("arange", "linspace", "scalar_tensor", "eye", "tril_indices", "triu_indices"), positions),
    **dict.fromkeys(("zeros", "new_zeros"), filled(True)),
    **dict.fromkeys(("ones", "full", "new_ones", "new_full", "empty", "new_empty"), filled(False)),
    **dict.fromkeys(("ones_like", "full_like", "empty_like"), filled_like(False)),
    **dict.fromkeys(
        ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_size", "sym_constrain_range"), nothing
    ),
    **dict.fromkeys(("cumsum", "cumprod"), scan),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax"), softmax),
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "zeros_like": filled_like(True),
    "meshgrid": several_positions,
    "one_hot": one_hot,
    "logcumsumexp": log_scan,
    "fill": fill,
    "zero": filled_like(True),
    "linear": linear_layer,
    "matmul": matmul,
    "mv": matrix_vector,
    "_grouped_mm": product_by_groups,
    "dot": inner_product,
    "vdot": conjugate_product,
    "addmm": addmm,
    "baddbmm": baddbmm,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "clamp": clamp,
    "clip": clamp,
    "clamp_min": clamp,
    "clamp_max": clamp,
    "hardtanh": hardtanh,
    "threshold": threshold,
    "pow": power,
    "prelu": prelu,
    "where": where,
    "masked_fill": masked_fill,
    "addcmul": addcmul,
    "lerp": lerp,
    "glu": glu,
    "copy": copy,
    "std": singular_spread,
    "bilinear": bilinear_layer,
    "outer": outer_product,
    "cosine_similarity": similarity,
    "cdist": distances,
    "deform_conv2d": deformable_convolution,
    "heaviside": step_functions,
    "pairwise_distance": pairwise_distance,
    "copysign": sign_copied,
    "hypot": hypotenuse,
    "addcdiv": quotient_added,
    "linalg_vector_norm": vector_norm,
    "norm": p_norm,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "_weight_norm": weight_norm,
    "renorm": renorm,
    "group_norm": group_norm,
    "grid_sampler": grid_sample,
}

PRESERVING = frozenset(
    (
        *_KEEPING,
        *SHAPE_RULES,
        *_POOLS,
        *_UPSAMPLES,
        *"div divide true_divide slice narrow select unbind split chunk split_with_sizes "
        "flip roll index index_select gather unfold im2col col2im channel_shuffle pixel_shuffle pixel_unshuffle mean "
        "sum nansum amax amin cumsum tril triu".split(),
    )
)
"""Operators that make zeros of a first operand of zeros."""
