"""Sums and means of embeddings as torch's plain operators: of the fused one there is no second derivative."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def bag_of_embeddings(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """Equal to ``functional.embedding_bag`` by sum or mean; None where options change more than the sum."""
    if mode not in ("sum", "mean") or max_norm is not None or scale_grad_by_freq or padding_idx is not None:
        return None
    bags, count = _bags(input, offsets, include_last_offset)
    rows = functional.embedding(input.reshape(-1), weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    total = rows.new_zeros(count, rows.shape[1]).index_add(0, bags, rows)
    if mode == "sum":
        return total
    sizes = torch.bincount(bags, minlength=count).clamp(min=1)
    return total / sizes.unsqueeze(1).to(total.dtype)


def _bags(input: Tensor, offsets: Tensor | None, include_last: bool) -> tuple[Tensor, int]:
    """Which bag each entry is in, and how many there are."""
    places = torch.arange(input.numel(), device=input.device)
    if offsets is None:
        return places // input.shape[1], len(input)
    starts = offsets[:-1] if include_last else offsets
    return torch.searchsorted(starts.contiguous(), places.to(starts.dtype), right=True) - 1, len(starts)
