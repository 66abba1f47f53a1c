"""Attention with a first and a second derivative in memory that grows with the sequence, not with its square."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_flowprune.gradients.operators.attention_tiles import Attention
from torch_flowprune.gradients.operators.bilinear_operators import is_ordinary
from torch_flowprune.torch_internals import in_function_transform, past_modes


def attention_of_long_sequences(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor | None:
    """Attention in tiles where its matrix is larger than its operands and output together; None elsewhere."""
    queries, keys, widths = query.shape[-2:-1], key.shape[-2:-1], (*query.shape[-1:], *value.shape[-1:])
    fits = math.prod(queries + keys) <= (sum(queries) + sum(keys)) * sum(widths)
    return None if fits else tiled_attention(query, key, value, *rest, **options)


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The attention of torch's function; None where that is left to torch, errors among it."""
    query, key, value = map(_as_autocast_has_it, (query, key, value))
    heads = _heads(query, key, value, enable_gqa)
    if heads is None or not _is_for_tiles(heads, attn_mask, dropout_p, is_causal):
        return None
    q, batch, kind = heads[0], heads[0].shape[:-2], query.device.type
    with torch.autocast(kind, enabled=False):
        digits = torch.promote_types(q.dtype, torch.float32)  # as plain attention of fewer digits is computed, too
        flat = [each.to(digits).reshape(-1, *each.shape[-2:]) for each in heads]
        mask, mask_of = _matrices(attn_mask, batch, digits)
        attention = Attention(
            scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
            causal=is_causal,
            dropout=dropout_p,
            seed=int(torch.randint(2**62, ())) if dropout_p else 0,
            mask_of=mask_of,
            learned=mask is not None and mask.requires_grad,
        )
        out = _Attention.apply(attention, *flat, mask)
        return out.view(*batch, *out.shape[-2:]).to(q.dtype)  # type: ignore[no-any-return]


def _as_autocast_has_it(operand: Tensor) -> Tensor:
    """In the digits that autocast, where it is on, has attention in; it leaves float64 alone."""
    kind = operand.device.type
    if not torch.is_autocast_enabled(kind) or not operand.is_floating_point() or operand.dtype is torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(kind))


def _heads(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries, keys and values of all heads, as many of each; None where they do not fit."""
    heads = query, key, value
    if not all(
        is_ordinary(each) and each.layout is torch.strided and each.dim() > 1 and each.numel() for each in heads
    ):
        return None
    if grouped and query.dim() > 2:
        if any(query.shape[-3] % each.shape[-3] for each in heads):
            return None
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    try:
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        return None
    query, key, value = (each.expand(*batch, *each.shape[-2:]) for each in (query, key, value))
    return query, key, value


def _is_for_tiles(heads: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, dropout: float, causal: bool) -> bool:
    """Whether torch's function takes them, and in a way that tiles do."""
    q, k, v = heads
    return (
        q.is_floating_point()
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
        and (q.shape[-1], k.shape[-2]) == (k.shape[-1], v.shape[-2])
        and 0 <= dropout < 1
        and not in_function_transform()
        and (mask is None or (not causal and _is_mask_of(mask, (*q.shape[:-1], k.shape[-2]), q)))
    )


def _is_mask_of(mask: Tensor, shape: tuple[int, ...], q: Tensor) -> bool:
    """Whether it is a mask that needs no more room than the scores."""
    kinds = (torch.bool, torch.float32, q.dtype)
    if not is_ordinary(mask) or mask.layout is not torch.strided or mask.dtype not in kinds or mask.device != q.device:
        return False
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    return 1 < mask.dim() <= len(shape) and all(size in (1, most) for size, most in sizes)


def _matrices(mask: Tensor | None, batch: torch.Size, digits: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A mask's matrices in one axis, and which of them is each head's."""
    if mask is None:
        return None, None
    numbers = torch.arange(math.prod(mask.shape[:-2]), device=mask.device).view(mask.shape[:-2])
    matrices = mask.reshape(-1, *mask.shape[-2:])
    return matrices if mask.dtype is torch.bool else matrices.to(digits), numbers.expand(batch).reshape(-1)


class _Attention(Function):
    """The output, of which tiles of probabilities are made again."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, sums = attention.forward(q, k, v, mask)
        ctx.attention = attention
        ctx.save_for_backward(q, k, v, mask, out, sums)
        return out

    @staticmethod
    @past_modes
    def backward(ctx: Any, saved: Any, dy: Tensor) -> Any:
        return None, *_Gradients.apply(ctx.attention, dy, *saved)


class _Gradients(Function):
    """The derivative of attention, with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, dy: Tensor, *operands: Any) -> Any:
        ctx.attention = attention
        ctx.save_for_backward(dy, *operands)
        return attention.backward(dy, *operands)

    @staticmethod
    @past_modes
    def backward(ctx: Any, saved: Any, *along: Any) -> Any:
        dy, q, k, v, mask, out, sums = saved
        if torch.is_grad_enabled():  # a loss that takes second derivatives itself
            return None, *_differentiable(ctx.attention, along, dy, q, k, v, mask), None, None
        ddy, of_operands = ctx.attention.double_backward(along, dy, q, k, v, mask, out, sums)
        return None, ddy, *of_operands, None, None


def _differentiable(
    attention: Attention, along: tuple[Tensor | None, ...], *operands: Tensor | None
) -> list[Tensor | None]:
    """The same by autograd, which can be differentiated once more, with whole matrices; of dy and the operands.

    Aliases stand for them: they may have been made of one another, dy of the output, by ways that are not attention's.
    """
    wanted = [operand is not None and operand.requires_grad for operand in operands]
    dy, *inputs = aliases = [None if operand is None else operand.view_as(operand) for operand in operands]
    live = [alias for alias, want in zip(aliases, wanted, strict=True) if alias is not None and want]
    out = attention.plain(*inputs)  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, live[wanted[0] :], dy, create_graph=True)
    vectors = [vector for vector, want in zip(along, wanted[1:], strict=True) if want]
    found = iter(torch.autograd.grad(grads, live, vectors, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]
