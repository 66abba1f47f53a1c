"""Attention over tiles: some heads and queries at a time against all their keys, so that no matrix of all is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

TilePlace: TypeAlias = "tuple[slice, slice, slice]"
"""Heads, queries and keys of a tile."""
AttentionGradients: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor | None]"
"""Those of queries, keys, values, and of a mask that wants one."""

_IN_CACHE, _ON_DEVICE = 2**18, 2**24
_FEWEST_QUERIES = 16


@dataclass(frozen=True)
class Attention:
    """What stays of a call of attention; operands are (head, query or key, element), with all samples' heads in one.

    Attributes:
        scale: What the products of queries and keys are multiplied by.
        causal: Whether a query sees the keys up to its own number alone.
        dropout: The share of the probabilities that is dropped.
        seed: Of the random numbers of a dropout; each tile draws from it anew.
        mask_of: The number of each head's matrix among those of the mask.
        learned: Whether the mask wants a gradient.
    """

    scale: float
    causal: bool = False
    dropout: float = 0.0
    seed: int = 0
    mask_of: Tensor | None = None
    learned: bool = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, and the logarithm of each query's sum: infinite where a query sees no key."""
        out, sums = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(*q.shape[:2], 1)
        for number, at in enumerate(self._tiles(q, k)):
            heads, queries, keys = at
            scores = self._scores(at, q, k, mask)
            if mask is not None and mask.dtype is torch.bool:
                scores.masked_fill_(~self._masked(at, mask), -torch.inf)
            highest = scores.amax(-1, keepdim=True)
            highest.masked_fill_(highest == -torch.inf, 0)
            p = scores.sub_(highest).exp_()
            total = p.sum(-1, keepdim=True)
            if (kept := self._kept(number, p, at)) is not None:
                p.mul_(kept)
            # a query that sees nothing gives 0
            out[heads, queries] = torch.bmm(p, v[heads, keys]).div_(total.masked_fill(total == 0, 1))
            sums[heads, queries] = torch.where(total == 0, torch.inf, highest + total.log())
        return out, sums

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor
    ) -> AttentionGradients:
        """The gradients along ``dy``."""
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dmask = torch.zeros_like(mask) if self.learned and mask is not None else None
        of_rows = (dy * out).sum(-1, keepdim=True)
        for number, at in enumerate(self._tiles(q, k)):
            heads, queries, keys = at
            p, kept = self._probabilities(at, q, k, mask, sums), self._kept(number, dy, at)
            ds = _kept_of(torch.bmm(dy[heads, queries], v[heads, keys].mT), kept)
            ds.sub_(of_rows[heads, queries]).mul_(p)
            dq[heads, queries] = torch.bmm(ds, k[heads, keys]).mul_(self.scale)
            dk[heads, keys].baddbmm_(ds.mT, q[heads, queries], alpha=self.scale)
            dv[heads, keys].baddbmm_(_kept_of(p, kept).mT, dy[heads, queries])
            self._add_to_mask(dmask, at, ds)
        return dq, dk, dv, dmask

    def double_backward(
        self,
        along: AttentionGradients,
        dy: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        out: Tensor,
        sums: Tensor,
    ) -> tuple[Tensor, AttentionGradients]:
        """The gradients of ``⟨along, backward⟩``: of dy, and of the operands."""
        u, w, x, y = along
        ddy, dq, dk, dv = torch.empty_like(dy), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dmask = torch.zeros_like(mask) if self.learned and mask is not None else None
        of_rows = (dy * out).sum(-1, keepdim=True)
        for number, at in enumerate(self._tiles(q, k)):
            heads, queries, keys = at
            p, kept = self._probabilities(at, q, k, mask, sums), self._kept(number, dy, at)
            dy_, q_, u_, k_, v_, w_, x_ = (
                *(t[heads, queries] for t in (dy, q, u)), *(t[heads, keys] for t in (k, v, w, x))
            )  # fmt: skip
            centred = _kept_of(torch.bmm(dy_, v_.mT), kept).sub_(
                of_rows[heads, queries]
            )  # backward has ds = p * centred
            t = torch.bmm(u_, k_.mT).baddbmm_(q_, w_.mT, beta=self.scale, alpha=self.scale)  # what goes along ds
            if y is not None:
                t.add_(self._masked(at, y))
            h = t.mul_(p)
            h.addcmul_(p, h.sum(-1, keepdim=True), value=-1)  # along the probabilities' gradient
            s = (h * centred).addcmul_(p, _kept_of(torch.bmm(dy_, x_.mT), kept))
            s.addcmul_(p, s.sum(-1, keepdim=True), value=-1)  # along the scores
            ds = centred.mul_(p)
            p, h = _kept_of(p, kept), _kept_of(h, kept)
            ddy[heads, queries] = torch.bmm(p, x_).baddbmm_(h, v_)
            dq[heads, queries] = torch.bmm(ds, w_).baddbmm_(s, k_, beta=self.scale, alpha=self.scale)
            dk[heads, keys].baddbmm_(ds.mT, u_, alpha=self.scale).baddbmm_(s.mT, q_, alpha=self.scale)
            dv[heads, keys].baddbmm_(h.mT, dy_)
            self._add_to_mask(dmask, at, s)
        return ddy, (dq, dk, dv, dmask)

    def plain(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The output by whole matrices, which autograd differentiates as often as one likes."""
        whole = slice(0, q.shape[0]), slice(0, q.shape[1]), slice(0, k.shape[1])
        scores = self._scores(whole, q, k, mask)
        if mask is not None and mask.dtype is torch.bool:
            scores = scores.masked_fill(~self._masked(whole, mask), -torch.inf)
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        p = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
        if self.dropout:
            kept = torch.zeros_like(p)
            for number, at in enumerate(self._tiles(q, k)):
                kept[at] = self._kept(number, q, at)  # type: ignore[assignment]
            p = p * kept
        return p @ v

    def _tiles(self, q: Tensor, k: Tensor) -> Iterator[TilePlace]:
        """All queries of several heads where they are few, else some queries of one."""
        heads, queries, keys = *q.shape[:2], k.shape[1]
        room = _IN_CACHE if q.device.type == "cpu" else _ON_DEVICE
        at_once = min(queries, max(_FEWEST_QUERIES, room // max(keys, 1)))
        together = max(1, room // max(at_once * keys, 1))
        for head in range(0, heads, together):
            for query in range(0, queries, at_once):
                end = min(query + at_once, queries)
                seen = min(keys, end) if self.causal else keys
                yield slice(head, min(head + together, heads)), slice(query, end), slice(0, seen)

    def _scores(self, at: TilePlace, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        heads, queries, keys = at
        scores = torch.bmm(q[heads, queries] * self.scale, k[heads, keys].mT)
        if self.causal and keys.stop > queries.start + 1:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(queries.start + 1)
            scores.masked_fill_(later, -torch.inf)
        return scores.add_(self._masked(at, mask)) if mask is not None and mask.is_floating_point() else scores

    def _probabilities(self, at: TilePlace, q: Tensor, k: Tensor, mask: Tensor | None, sums: Tensor) -> Tensor:
        p = self._scores(at, q, k, mask).sub_(sums[at[0], at[1]]).exp_()
        return p.masked_fill_(~self._masked(at, mask), 0) if mask is not None and mask.dtype is torch.bool else p

    def _kept(self, number: int, like: Tensor, at: TilePlace) -> Tensor | None:
        """What dropout multiplies the tile's probabilities by: the same numbers in every pass."""
        if not self.dropout:
            return None
        heads, queries, keys = (part.stop - part.start for part in at)
        drawing = torch.Generator(like.device).manual_seed(self.seed + number)
        kept = like.new_empty(heads, queries, keys).bernoulli_(1 - self.dropout, generator=drawing)
        return kept.div_(1 - self.dropout)

    def _masked(self, at: TilePlace, mask: Tensor) -> Tensor:
        heads, queries, keys = at
        assert self.mask_of is not None
        return self._part(mask, queries, keys).index_select(0, self.mask_of[heads])

    def _add_to_mask(self, total: Tensor | None, at: TilePlace, values: Tensor) -> None:
        if total is not None and self.mask_of is not None:
            heads, queries, keys = at
            part = self._part(total, queries, keys)
            part.index_add_(0, self.mask_of[heads], values.sum_to_size(len(values), *part.shape[1:]))

    @staticmethod
    def _part(mask: Tensor, queries: slice, keys: slice) -> Tensor:
        """Of an axis of one element all of it: it counts for every query, or key (of which a tile has the first)."""
        return mask[:, queries if mask.shape[1] > 1 else slice(None), keys]


def _kept_of(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values * kept
