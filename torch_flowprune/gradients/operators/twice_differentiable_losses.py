"""Losses of torch whose kernels have no second derivative, by plain operators that give the same first one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NEVER = -1e30
"""The logarithm of what does not happen: finite, so that no derivative is 0 times infinity."""


def connectionist_temporal_classification(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """``functional.ctc_loss`` by the recursion over times, in logarithms.

    torch's gradient is the one behind a log-softmax, e^log_probs more than that of the formula: a term that is 0 gives
    it, so that H·g is the derivative of torch's own.
    """
    batched = log_probs.dim() == 3
    log_probs = log_probs if batched else log_probs.unsqueeze(1)
    times, count, _ = log_probs.shape
    device = log_probs.device
    lasting, lengths = _lengths(input_lengths, device), _lengths(target_lengths, device)
    path, extended = _with_blanks(_padded(targets, lengths, count), lengths, blank)
    emitted = log_probs.gather(2, path.expand(times, -1, -1))
    skips = torch.zeros_like(path, dtype=torch.bool)
    skips[:, 2:] = (path[:, 2:] != blank) & (path[:, 2:] != path[:, :-2])
    place = torch.arange(path.shape[1], device=device)
    alpha = torch.where((place < 2) & (place < extended[:, None]), emitted[0], _NEVER)
    for time in range(1, times):
        before = torch.stack([alpha, _shifted(alpha, 1), torch.where(skips, _shifted(alpha, 2), _NEVER)])
        alpha = torch.where((time < lasting)[:, None], before.logsumexp(0) + emitted[time], alpha)
    last = alpha.gather(1, (extended - 1)[:, None])
    but_one = torch.where(lengths[:, None] > 0, alpha.gather(1, (extended - 2).clamp(min=0)[:, None]), _NEVER)
    losses = -torch.cat([last, but_one], 1).logsumexp(1)
    live = torch.arange(times, device=device)[:, None] < lasting
    total = torch.where(live, log_probs.exp().sum(2), 0).sum(0)
    losses = losses + total - total.detach()
    losses = torch.where(losses < -_NEVER / 2, losses, 0.0 if zero_infinity else float("inf"))
    if reduction in ("mean", 1):
        return (losses / lengths.clamp(min=1)).mean()
    return losses.sum() if reduction in ("sum", 2) else losses if batched else losses.squeeze(0)


def _lengths(given: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(given, device=device).long().reshape(-1)


def _padded(targets: Tensor, lengths: Tensor, count: int) -> Tensor:
    """One row a sample: of targets one after the other, as torch takes them too, each sample's own."""
    if targets.dim() == 2:
        return targets.to(lengths.device).long()
    rows = targets.to(lengths.device).long().split(lengths.tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if count else targets.reshape(0, 0)


def _with_blanks(targets: Tensor, lengths: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """A blank before, between and after the labels, and how many both are."""
    rows, width = targets.shape
    path = targets.new_full((rows, 2 * width + 1), blank)
    inside = torch.arange(width, device=targets.device) < lengths[:, None]
    path[:, 1::2] = torch.where(inside, targets, blank)
    return path, 2 * lengths + 1


def _shifted(alpha: Tensor, by: int) -> Tensor:
    padding = torch.nn.functional.pad(alpha, (by, 0), value=_NEVER)
    return padding[:, : alpha.shape[1]]


def margin_of_classes(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor | None:
    """``functional.multi_margin_loss``; None for the settings that torch has given up."""
    if size_average is not None or reduce is not None:
        return None
    rows, labels = torch.atleast_2d(input), target.reshape(-1, 1)
    over = (margin - rows.gather(1, labels) + rows).clamp(min=0) ** p
    if weight is not None:
        over = over * weight[labels]
    others = torch.ones_like(rows, dtype=torch.bool).scatter(1, labels, value=False)
    return _over_rows(torch.where(others, over, 0).sum(1) / rows.shape[1], reduction, input.dim() == 1)


def margin_of_labels(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor | None:
    """``functional.multilabel_margin_loss``; None for the settings that torch has given up."""
    if size_average is not None or reduce is not None:
        return None
    rows, labels = torch.atleast_2d(input), torch.atleast_2d(target)
    meant = (labels < 0).cumsum(1) == 0  # up to the first that is negative
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    chosen = chosen.scatter_add(1, labels.clamp(min=0), meant) if meant.numel() else chosen
    over = (1 - rows.gather(1, labels.clamp(min=0))[:, :, None] + rows[:, None, :]).clamp(min=0)
    counted = meant[:, :, None] & ~chosen[:, None, :]
    return _over_rows(torch.where(counted, over, 0).sum((1, 2)) / rows.shape[1], reduction, input.dim() == 1)


def _over_rows(losses: Tensor, reduction: str, single: bool) -> Tensor:
    if reduction == "none":
        return losses.squeeze(0) if single else losses
    return losses.mean() if reduction == "mean" else losses.sum()
