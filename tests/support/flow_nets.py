"""Small nets that are sharded block by block, and blocks that cannot be run a second time on their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WORDS, WIDTH, LENGTH = 12, 8, 5


class Block(nn.Module):
    """Takes keywords and hands out nested containers, with numbers and nothing among them."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=dropout, batch_first=True)
        self.up, self.drop, self.down = nn.Linear(WIDTH, 18), nn.Dropout(dropout), nn.Linear(18, WIDTH)

    def forward(self, x: Tensor, *, mask: Tensor, info: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        normed = self.norm(x)
        attended, weights = self.attention(normed, normed, normed, attn_mask=mask)
        x = x + attended
        x = x + self.down(self.drop(functional.gelu(self.up(x))))
        return x, {"weights": weights, "more": [x.sum(), 3, None, info.get("scale")]}


class KeepsLosses(Block):
    """Hands a part of the loss out as an attribute."""

    def forward(self, x: Tensor, **words: Any) -> Any:
        found = super().forward(x, **words)
        self.kept = found[0].square().mean()
        return found


class ReadsContext(Block):
    """Reads a tensor that it was not given."""

    context: Any = ()

    def forward(self, x: Tensor, **words: Any) -> Any:
        x, more = super().forward(x, **words)
        return x + sum(self.context), more


class ScalesInput(Block):
    """Writes to what it is given."""

    def forward(self, x: Tensor, **words: Any) -> Any:
        return super().forward(x.mul_(0.5), **words)


class Cache:
    """An object of which nothing is known."""

    def __init__(self) -> None:
        self.last: Any = 0.0


class UsesCache(Block):
    """Reads and writes an object that it is given."""

    def forward(self, x: Tensor, *, info: dict[str, Any], **words: Any) -> Any:
        x, more = super().forward(x + info["cache"].last, info={}, **words)
        info["cache"].last = x * 0.1
        return x, more


class Heads(nn.Module):
    """Attention written out, for tensor parallelism."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, *, mask: Tensor, info: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        normed = self.norm(x)
        parts = (part(normed).unflatten(-1, (-1, 2)).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(*parts, attn_mask=~mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(self.drop(functional.silu(self.up(x)))), {"more": [x.sum(), info]}


class Language(nn.Module):
    """The table is the head's weight too, but for tensor parallelism, which lays the two in ways of their own."""

    def __init__(self, dropout: float = 0.0, block: Any = Block) -> None:
        super().__init__()
        self.table, self.position = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.blocks = nn.ModuleList([block(dropout) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if block is not Heads:
            self.head.weight = self.table.weight

    def embedded(self, ids: Tensor) -> Tensor:
        return self.table(ids) + self.position

    def after(self, x: Tensor) -> Tensor:
        mask, aside = torch.ones(LENGTH, LENGTH).triu(1).bool(), 0.0
        info = {"cache": Cache()} if isinstance(self.blocks[0], UsesCache) else {"scale": 2.0}
        for block in self.blocks:
            y, more = block(x, mask=mask, info=info)
            x, aside = y + 0.1 * x, aside + more["more"][0] * 1e-3
        return self.head(self.norm(x)) + aside

    def forward(self, ids: Tensor) -> Tensor:
        return self.after(self.embedded(ids))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList([nn.LSTM(WIDTH, WIDTH, 2, batch_first=True), nn.GRU(WIDTH, WIDTH)])

    def forward(self, ids: Tensor) -> Tensor:
        x, (_, state) = self.blocks[0](self.table(ids))
        return self.head(self.blocks[1](x)[0]) + state.mean()


class Convolutions(nn.Module):
    """With both kinds of norms, and activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)
        self.blocks = nn.ModuleList([self._block() for _ in range(2)])
        for block in self.blocks:
            block[1].running_mean.uniform_(-0.3, 0.3)
            block[1].running_var.uniform_(0.5, 2)

    @staticmethod
    def _block() -> nn.Module:
        inner = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Hardsigmoid(inplace=True)
        return nn.Sequential(*inner, nn.GroupNorm(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(functional.softplus(x))
        return self.head(x.mean((2, 3)))


def tokens(rank: int, *, batches: int = 2, ignored: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Of each rank other ones, more on later ranks, some of them ignored."""
    draw, found = torch.Generator().manual_seed(rank), []
    for _ in range(batches):
        ids, target = (torch.randint(WORDS, (2 + rank, LENGTH), generator=draw) for _ in range(2))
        left_out = torch.rand(target.shape, generator=draw) < (2.0 if ignored else 0.3)
        found.append((ids, target.masked_fill(left_out, -100)))
    return found


def images(rank: int) -> list[tuple[Tensor, Tensor]]:
    draw, size = torch.Generator().manual_seed(rank), 3 + rank
    return [
        (torch.randn(size, 3, 6, 6, generator=draw).double(), torch.randint(5, (size,), generator=draw))
        for _ in range(2)
    ]
