"""Multi-head attention whose heads are fewer or narrower than its input: what torch's own class cannot state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, cat, nn
from torch.nn import functional

from torch_flowprune.channels.shrinking.surgery import ShrinkError
from torch_flowprune.torch_internals import SAME_WIDTHS


class NarrowAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with any number and width of heads: same arguments, same parameter names.

    It supports everything that torch's class does (masks of both kinds, causal, weights, time or batch first, unbatched
    inputs), except for nested tensors. It does not use torch's fused inference kernel, which does not support such
    sizes. The returned weights are those of the remaining heads. A mask per head may also have all heads of the dense
    model.

    Attributes:
        embed_dim, kdim, vdim: the widths of its inputs.
        num_heads, head_dim, value_dim: the number of heads, and their width in queries and keys, and in values.
        scale: the factor of query-key products; the dense model's, whatever is left of a head.
        dense_heads, kept_heads: how many heads the dense model had, and which of them are kept.

    :func:`~torch_flowprune.shrink` puts it in the place of torch's class, which cannot have such sizes.

    >>> import torch, torch_flowprune as fp
    >>> layer, x = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)
    >>> options = dict(granularity="channel", allocation="layer", example_inputs=x)
    >>> report = fp.global_prune(layer, sparsity=0.5, **options)
    >>> fp.shrink(layer, x).self_attn.num_heads
    1
    """

    value_dim: int
    scale: float
    dense_heads: int
    kept_heads: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.MultiheadAttention, kept: Mapping[str, Mapping[int, Tensor]]) -> NarrowAttention:
        """Convert a module whose tensors have been cut; it shares these tensors.

        Args:
            module: with smaller tensors.
            kept: name of a tensor -> axis -> (size,) bool, the positions that it still has.

        Raises:
            ShrinkError: if its heads are left with different widths.
        """
        new = cls.__new__(cls)
        vars(new).update(vars(module))
        heads, width = module.num_heads, module.head_dim
        values = getattr(module, "value_dim", width)
        queries, keys, of_values = _rows_left(module, kept, (heads * width, heads * width, heads * values))
        alive, new.head_dim = _heads_of(queries & keys if bool((queries == keys).all()) else queries, heads)
        alive_too, new.value_dim = _heads_of(of_values, heads)
        if alive != alive_too or not torch.equal(queries, keys):
            raise ShrinkError("queries, keys and values of an attention keep different heads")
        before = getattr(module, "kept_heads", tuple(range(heads)))
        new.scale = getattr(module, "scale", width**-0.5)
        new.dense_heads = getattr(module, "dense_heads", heads)
        new.num_heads, new.kept_heads = len(alive), tuple(before[head] for head in alive)
        setattr(new, SAME_WIDTHS, False)
        new.embed_dim, new.kdim, new.vdim = (weight.shape[1] for weight in new._weights())
        new.out_proj.out_features, new.out_proj.in_features = new.out_proj.weight.shape
        return new

    def _weights(self) -> Sequence[Tensor]:
        """Of queries, keys and values."""
        together: Any = self.in_proj_weight  # None, for all that torch's annotation says
        if together is None:
            return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return tuple(together.split(self._widths()))

    def _widths(self) -> list[int]:
        inner = self.num_heads * self.head_dim
        return [inner, inner, self.num_heads * self.value_dim]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The same as that of ``nn.MultiheadAttention``."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal= describes attn_mask=: expected attn_mask too, got None")
        batched = query.dim() == 3
        q, k, v = (self._batch_first(x, batched) for x in self._projected(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (cat([x, bias.expand(len(x), 1, -1)], 1) for x, bias in ((k, self.bias_k), (v, self.bias_v)))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in (k, v))
        out, weights = self._attended(q, k, v, self._mask(key_padding_mask, attn_mask, q, k), need_weights)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return (out if self.batch_first else out.transpose(0, 1)) if batched else out[0], weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        together: Any = self.in_proj_weight
        if together is not None and query is key and key is value:
            return tuple(functional.linear(query, together, self.in_proj_bias).split(self._widths(), -1))
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.split(self._widths())
        return tuple(map(functional.linear, (query, key, value), self._weights(), biases))

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        rate = self.dropout if self.training else 0.0
        if not need_weights:
            return functional.scaled_dot_product_attention(q, k, v, mask, rate, scale=self.scale), None
        scores = q * self.scale @ k.transpose(-2, -1)
        weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), rate, bool(rate))
        return weights @ v, weights

    def _mask(self, padding: Tensor | None, attention: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added, (batch, heads, queries, keys) or what broadcasts to it."""
        batch, heads, _, keys = *q.shape[:3], k.shape[2]
        masks = []
        if padding is not None:
            masks.append(padding.reshape(batch, 1, 1, -1))
        if attention is not None:
            if attention.dim() == 3:
                attention = attention.unflatten(0, (batch, -1))
                if attention.shape[1] not in (1, heads):
                    attention = attention[:, list(self.kept_heads)]
            masks.append(attention)
        added = [_added(mask, q.dtype) for mask in masks]
        added = [functional.pad(mask, (0, keys - mask.shape[-1])) for mask in added]
        return sum(added[1:], added[0]) if added else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of truth values says what to leave out; one of numbers is added as it is."""
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _rows_left(module: nn.MultiheadAttention, kept: Mapping[str, Any], sizes: Sequence[int]) -> Sequence[Tensor]:
    """Which rows of queries, keys and values are left."""
    together: Any = module.in_proj_weight
    if together is not None:
        return tuple(_rows_of(kept, "in_proj_weight", sum(sizes)).split(list(sizes)))
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return [_rows_of(kept, name, size) for name, size in zip(names, sizes, strict=True)]


def _rows_of(kept: Mapping[str, Any], name: str, size: int) -> Tensor:
    left: Tensor = kept.get(name, {}).get(0, torch.ones(size, dtype=torch.bool))
    return left


def _heads_of(rows: Tensor, heads: int) -> tuple[list[int], int]:
    """Which heads have anything left, and how much: as much as one another."""
    counts = rows.view(heads, -1).sum(1).tolist()
    alive = [head for head, count in enumerate(counts) if count]
    if len({counts[head] for head in alive}) != 1:
        raise ShrinkError(
            f"the heads of an attention are left with widths {counts}: expected one width for all of them"
        )
    return alive, counts[alive[0]]
