"""Squares of each sample's gradient, summed over samples, from what meets a parameter in a pass over a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_PAIRED = 6
"""Positions up to which the products of pairs of them, all samples in one product, are fewer than those of samples."""


class SquaredSums:
    """``totals`` take the squares of what is given of each sample, times that sample's factor.

    Attributes:
        size: how many samples the batch has.
        masks: of the parameters whose gradient is 0 where their mask is, by number.
    """

    def __init__(self, totals: Sequence[Tensor], factors: Sequence[float], masks: dict[int, Tensor]) -> None:
        self.totals, self.factors, self.masks, self.size = totals, factors, masks, len(factors)

    def add(self, number: int, gradients: Tensor, index: Any = ...) -> None:
        """Each sample's gradient, of shape ``(sample, *parameter)``, or of a part of the parameter."""
        with self._into(number) as total:
            part = total[index]
            part += torch.tensordot(self._factors(gradients), gradients.square(), 1).reshape(part.shape)

    def add_rows(self, number: int, ids: Tensor, gradients: Tensor) -> None:
        """Rows of a table, ``(sample, position, row)``, and how much of the gradient comes from each."""
        count = len(self.totals[number])
        key = torch.arange(self.size, device=ids.device)[:, None] * count + ids
        key, place = key.reshape(-1).unique(return_inverse=True)
        sums = gradients.new_zeros(len(key), gradients.shape[-1]).index_add_(0, place, gradients.flatten(0, 1))
        with self._into(number) as total:
            total.index_add_(0, key % count, sums.square_() * self._factors(gradients)[key // count, None])

    def add_products(self, number: int, a: Tensor, b: Tensor) -> None:
        """The gradients aᵀb of operands ``(sample, position, feature)``."""
        positions = a.shape[1]
        with self._into(number) as whole:
            total = whole.view(a.shape[-1], b.shape[-1])
            if positions == 1:
                total.addmm_((a[:, 0].square() * self._factors(a)[:, None]).T, b[:, 0].square())
            elif positions <= _PAIRED:
                total.addmm_(*self._pairs(a, b))
            else:
                self._squares(total, lambda i, out: torch.mm(a[i].T, b[i], out=out))

    def add_each(self, number: int, gradient: Callable[[int], Tensor]) -> None:
        """The gradient of each sample, computed one after the other."""
        with self._into(number) as total:
            for i, factor in enumerate(self.factors):
                if factor:
                    value = gradient(i)
                    total.addcmul_(value, value, value=factor)

    def _squares(self, total: Tensor, gradient: Callable[[int, Tensor], Tensor]) -> None:
        out = torch.empty_like(total)
        for i, factor in enumerate(self.factors):
            if factor:
                gradient(i, out)
                total.addcmul_(out, out, value=factor)

    def _pairs(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(Σₚ aₚ bₚ)² is the sum over pairs p ≤ q, those of two positions twice, of aₚ a_q · bₚ b_q."""
        p, q = torch.triu_indices(a.shape[1], a.shape[1], device=a.device)
        times = torch.where(p == q, 1.0, 2.0).to(a) * self._factors(a)[:, None]
        return (a[:, p] * a[:, q] * times[..., None]).flatten(0, 1).T, (b[:, p] * b[:, q]).flatten(0, 1)

    def _factors(self, like: Tensor) -> Tensor:
        return torch.tensor(self.factors, device=like.device, dtype=like.dtype)

    @contextmanager
    def _into(self, number: int) -> Iterator[Tensor]:
        """The total, or what is added to it once it is masked and laid out alike."""
        total, mask = self.totals[number], self.masks.get(number)
        if mask is None and total.is_contiguous():
            yield total
            return
        part = torch.zeros(total.shape, dtype=total.dtype, device=total.device)
        yield part
        total += part if mask is None else part * mask
