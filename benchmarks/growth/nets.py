"""Nets that grow in one direction, and data for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def tensors(count: int, weights: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """That many linear layers with so many weights in all."""
    torch.manual_seed(0)
    side = max(2, round((weights / count) ** 0.5))
    return nn.ModuleList(nn.Linear(side, side, bias=False, dtype=dtype) for _ in range(count))


def two_shapes(count: int, weights: int) -> nn.Module:
    """Layers of two shapes in turn."""
    torch.manual_seed(0)
    side = max(2, round((weights / count / 1.5) ** 0.5))
    return nn.ModuleList(nn.Linear(side * (1 + number % 2), side, bias=False) for number in range(count))


class Experts(nn.Module):
    """Many narrow layers, all of which an input goes through."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) * 1e-2
        return x[:, :10]


class Residual(nn.Module):
    """Residual blocks of two convolutions."""

    def __init__(self, blocks: int, channels: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Concatenating(nn.Module):
    """Each layer reads what all before it made, as in DenseNet."""

    def __init__(self, layers: int, growth: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(growth * (number + 1)),
                nn.ReLU(),
                nn.Conv2d(growth * (number + 1), growth, 3, padding=1, bias=False),
            )
            for number in range(layers)
        )
        self.head = nn.Linear(growth * (layers + 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        made = [self.stem(x)]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)))
        return self.head(torch.cat(made, 1).mean((2, 3)))


class Block(nn.Module):
    """Causal attention and two layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Decoder(nn.Module):
    """A small language model for sequences of a length."""

    def __init__(self, tokens: int, words: int = 200, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, 2) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, words, bias=False))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.words(ids) + self.places)).transpose(1, 2)


def images(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 8, 8), torch.arange(count) % 10


def rows(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 32), torch.arange(count) % 10


def ids(samples: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randint(200, (samples, tokens)), torch.randint(200, (samples, tokens))
