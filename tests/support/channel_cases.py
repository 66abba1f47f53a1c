"""Tiny networks, one per kind of coupling, and the oracle that removes channels from them one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from torch_flowprune.channels.coupling import couple
from torch_flowprune.channels.group_masks import channel_masks
from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.shrinking.proof.equivalence import relative_error
from torch_flowprune.channels.shrinking.removal import shrink

Model = nn.Module


class Fn(nn.Module):
    """Named layers (and sizes), and a function of them and the input."""

    def __init__(self, forward: Callable[..., Tensor], **layers: object) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.f = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


class Attention(nn.Module):
    """Multi-head self-attention as it is commonly written; kv_heads < heads shares keys and values."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        fused: bool = False,
        kv_heads: int | None = None,
        own_scale: bool = False,
        manual: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.kv_heads = heads, head_dim, kv_heads or heads
        self.attn_dim = heads * head_dim
        self.fused, self.manual = fused, manual
        self.scale = head_dim**-0.5 if own_scale or manual else None
        if fused:
            self.qkv = nn.Linear(width, 3 * self.attn_dim)
        else:
            self.q = nn.Linear(width, self.attn_dim)
            self.k = nn.Linear(width, self.kv_heads * head_dim)
            self.v = nn.Linear(width, self.kv_heads * head_dim)
        self.proj = nn.Linear(self.attn_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).view(b, n, self.num_heads, -1).transpose(1, 2)
            k = self.k(x).view(b, n, self.kv_heads, -1).transpose(1, 2)
            v = self.v(x).view(b, n, self.kv_heads, -1).transpose(1, 2)
        if self.manual:
            y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=self.kv_heads != self.num_heads)
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)) + torch.tanh(self.b(x)))


class GroupedReshape(nn.Module):
    """ShuffleNet's channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        b, c, h, w = x.shape
        return self.b(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


class Shuffled(nn.Module):
    """Half of the channels go through a layer, half go round it: chunk and concatenate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, dim=1)
        return self.c(torch.cat([left, torch.relu(self.b(right))], dim=1))


class Split(nn.Module):
    """Three uneven parts, each with a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.split_dims = (3, 4, 5)
        self.inp, self.a, self.b, self.out = (
            nn.Conv2d(3, 12, 1),
            nn.Conv2d(3, 5, 1),
            nn.Conv2d(4, 2, 1),
            nn.Conv2d(10, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.inp(x).split(self.split_dims, 1)
        return self.out(torch.cat([third, self.a(torch.relu(first))], 1)) + self.b(second)


class Grouped(nn.Module):
    """Grouped-query attention as language models write it: keys and values expanded to every head of their group."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 3
        self.q, self.k, self.v, self.proj = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        times = self.num_heads // self.num_kv_heads
        k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).reshape(b, -1, n, self.head_dim) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class Rotary(Attention):
    """Rotary positions: halves of a head are turned into each other."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.num_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angle = torch.arange(n, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype).repeat(2)
        turn = lambda t: t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin()
        y = F.scaled_dot_product_attention(turn(q), turn(k), v)
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class Relative(Attention):
    """A table of relative positions with a column for each head, read by an index, as window attention has it."""

    def __init__(self) -> None:
        super().__init__(8, 4, 3, fused=True, manual=True)
        self.table = nn.Parameter(torch.zeros(9, 4))
        places = torch.arange(5)
        self.register_buffer("index", places[:, None] - places + 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        y = ((q * self.scale) @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class Block(nn.Module):
    """A transformer's block: the residual width is normalised and stays, heads and hidden width go."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = norm(8), norm(8), Attention(8, 4, 3)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TiedEmbedding(nn.Module):
    """One table reads tokens in and out: the width is that of both, and goes with what is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Embedding(7, 6),
            nn.Linear(6, 5),
            nn.Linear(5, 6),
            nn.Linear(6, 7, bias=False),
        )
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed((x.abs() * 3).long().clamp(max=6))
        return self.head(x + self.down(torch.relu(self.up(x))))


class Multihead(nn.Module):
    """torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.attn, self.b = nn.Linear(8, 8), nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.attn(x, x, x, need_weights=False)[0])


class OwnRMSNorm(nn.Module):
    """As language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


class OwnLayerNorm(nn.LayerNorm):
    """With a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class ChannelsFirst(nn.LayerNorm):
    """By way of its parent's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class Variance(nn.Module):
    """A norm without a mean, by torch's variance."""

    def __init__(self, **words: Any) -> None:
        super().__init__()
        self.words = words

    def forward(self, x: Tensor) -> Tensor:
        return x / (torch.var(x, dim=-1, keepdim=True, unbiased=bool(self.words)) + x.var(-1, keepdim=True) + 1e-2)


class BothMoments(nn.Module):
    """Variance and mean at once."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, -1, keepdim=True)
        return x * (var + 0.1).rsqrt() + mean


class ResponseNorm(nn.Module):
    """Norms over positions, divided by their mean over channels."""

    def forward(self, x: Tensor) -> Tensor:
        norms = x.norm(p=2, dim=1, keepdim=True)
        return x * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-3))


class Spread(nn.Module):
    """A mean, and the mean square beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.mean(x * x, dim=-1, keepdim=True) + x.mean((1, 2), keepdim=True)


OWN_NORMS: dict[str, Callable[[], nn.Module]] = {
    "RMS norm": lambda: OwnRMSNorm(6),
    "layer norm": lambda: OwnLayerNorm(6),
    "layer norm by its parent": lambda: ChannelsFirst(6),
    "variance": Variance,
    "variance without bias": lambda: Variance(unbiased=True),
    "both moments": BothMoments,
    "response norm": ResponseNorm,
    "mean square": Spread,
}


class NormedByItself(nn.Module):
    """A norm that no class of torch's is, between layers."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 6), norm(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


@dataclass(frozen=True, eq=False)
class Case:
    """make: the model.

    shape: of its input. groups: name -> units that `couple` has to find, exactly.
    """

    make: Callable[[], Model]
    shape: tuple[int, ...]
    groups: Mapping[str, int]


def conv_net(*middle: nn.Module, width: int = 6) -> Model:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *middle, nn.Conv2d(width, 2, 1))


IMAGE, TOKENS, ROW = (2, 3, 6, 6), (2, 5, 8), (3, 4)
FIRST = {"0.weight": 6}


def _places() -> Tensor:
    return torch.tensor([0, 1, 2, 0, 1])


def _thirds(h: Tensor) -> Tensor:
    return torch.zeros_like(h[:, :3])


def _between(f: Callable[[Tensor], Tensor]) -> Model:
    """A function between a layer that makes channels and one that reads them."""
    return Fn(lambda s, x: s.b(f(s.a(x))), a=nn.Linear(8, 6), b=nn.Linear(6, 3))


def _between_rows(norm: nn.Module) -> Model:
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, 3))


def _recurrent(kind: str, units: int = 5, **options: Any) -> Model:
    """A recurrent layer between two linear ones."""
    layer = getattr(nn, kind)(6, units, batch_first=True, **options)
    width = (options.get("proj_size") or units) * (2 if options.get("bidirectional") else 1)
    return Fn(lambda s, x: s.b(s.r(s.a(x))[0]), a=nn.Linear(8, 6), r=layer, b=nn.Linear(width, 3))


def _cell(kind: str) -> Model:
    """A cell that is called step by step."""

    def forward(s: Any, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = s.r(step, state)
        return s.b(state[0] if isinstance(state, tuple) else state)

    return Fn(forward, r=getattr(nn, f"{kind}Cell")(8, 5), b=nn.Linear(5, 3))


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), ROW, {"0.weight": 5}),
    "linear no bias": Case(
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.GELU(), nn.Linear(5, 3)), ROW, {"0.weight": 5}
    ),
    "sigmoid": Case(lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)), ROW, {"0.weight": 5}),
    "softplus": Case(lambda: nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3)), ROW, {"0.weight": 5}),
    "softmax over channels": Case(lambda: nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1), nn.Linear(5, 3)), ROW, {}),
    "conv bn relu": Case(lambda: conv_net(nn.BatchNorm2d(6), nn.ReLU()), IMAGE, FIRST),
    "conv relu bn": Case(lambda: conv_net(nn.ReLU(), nn.BatchNorm2d(6)), IMAGE, FIRST),
    "bn without affine": Case(lambda: conv_net(nn.BatchNorm2d(6, affine=False), nn.ReLU()), IMAGE, FIRST),
    "bn without statistics": Case(lambda: conv_net(nn.BatchNorm2d(6, track_running_stats=False)), IMAGE, FIRST),
    "instance norm": Case(lambda: conv_net(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)), IMAGE, FIRST),
    "group norm": Case(lambda: conv_net(nn.GroupNorm(3, 6)), IMAGE, {"0.weight": 3}),
    "group norm of one group": Case(lambda: conv_net(nn.GroupNorm(1, 6), nn.ReLU()), IMAGE, FIRST),
    "group norm of one group without affine": Case(lambda: conv_net(nn.GroupNorm(1, 6, affine=False)), IMAGE, FIRST),
    "layer norm over less": Case(lambda: _between_rows(nn.LayerNorm(5)), ROW, {"0.weight": 5}),
    "layer norm over less without bias": Case(lambda: _between_rows(nn.LayerNorm(5, bias=False)), ROW, {"0.weight": 5}),
    "layer norm over less without affine": Case(
        lambda: _between_rows(nn.LayerNorm(5, elementwise_affine=False)), ROW, {"0.weight": 5}
    ),
    "layer norm over less, of what is not zero": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.LayerNorm(5), nn.Linear(5, 3)), ROW, {}
    ),
    "layer norm over two dimensions": Case(
        lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm((5, 6)), nn.Linear(6, 3)), TOKENS, {}
    ),
    "rms norm over less": Case(lambda: _between_rows(nn.RMSNorm(5)), ROW, {"0.weight": 5}),
    "rms norm over less without affine": Case(
        lambda: _between_rows(nn.RMSNorm(5, elementwise_affine=False)), ROW, {"0.weight": 5}
    ),
    **{
        f"{name}, told in the code": Case(lambda norm=norm: NormedByItself(norm), TOKENS, {"a.weight": 6})
        for name, norm in OWN_NORMS.items()
    },
    "a norm of a function that is held": Case(lambda: _between(lambda h: h - h.var(-1, keepdim=True)), TOKENS, {}),
    "prelu": Case(lambda: conv_net(nn.PReLU(6)), IMAGE, FIRST),
    "pools": Case(lambda: conv_net(nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(2)), IMAGE, FIRST),
    "upsample": Case(
        lambda: conv_net(nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear")), IMAGE, FIRST
    ),
    "space padding": Case(lambda: conv_net(nn.ZeroPad2d(1), nn.ConstantPad2d(1, 2.0)), IMAGE, FIRST),
    "depthwise": Case(lambda: conv_net(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU6()), IMAGE, FIRST),
    "depthwise multiplier": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)),
        IMAGE,
        {"0.weight": 4},
    ),
    "grouped": Case(lambda: conv_net(nn.Conv2d(6, 6, 3, padding=1, groups=3)), IMAGE, {"0.weight": 3}),
    "grouped from the input": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        (2, 4, 6, 6),
        {"0.weight": 4},
    ),
    "transposed": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
        ),
        IMAGE,
        {"0.weight": 4, "1.weight": 6},
    ),
    "transposed grouped": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.Conv2d(6, 2, 1)),
        IMAGE,
        {"0.weight": 2},
    ),
    "conv1d": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)), (2, 3, 8), {"0.weight": 4}
    ),
    "conv3d": Case(
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Conv3d(4, 2, 1)),
        (2, 1, 4, 4, 4),
        {"0.weight": 4},
    ),
    "flatten": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), IMAGE, {"0.weight": 4}
    ),
    "residual": Case(
        lambda: Fn(
            lambda s, x: s.out(s.b(torch.relu(s.a(x))) + s.skip(x)),
            a=nn.Conv2d(3, 5, 1),
            b=nn.Conv2d(5, 4, 3, padding=1),
            skip=nn.Conv2d(3, 4, 1),
            out=nn.Conv2d(4, 2, 1),
        ),
        IMAGE,
        {"a.weight": 5, "b.weight": 4},
    ),
    "residual to the input": Case(
        lambda: Fn(lambda s, x: s.b(torch.relu(s.a(x))) + x, a=nn.Conv2d(3, 5, 1), b=nn.Conv2d(5, 3, 1)),
        IMAGE,
        {"a.weight": 5},
    ),
    "cat": Case(
        lambda: Fn(
            lambda s, x: s.out(torch.cat([s.a(x), s.b(x)], 1)),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(3, 5, 1),
            out=nn.Conv2d(9, 2, 1),
        ),
        IMAGE,
        {"a.weight": 4, "b.weight": 5},
    ),
    "cat with the input": Case(
        lambda: Fn(lambda s, x: s.out(torch.cat([x, s.a(x)], 1)), a=nn.Conv2d(3, 4, 1), out=nn.Conv2d(7, 2, 1)),
        IMAGE,
        {"a.weight": 4},
    ),
    "squeeze and excite": Case(
        lambda: Fn(
            lambda s, x: (lambda y: s.out(y * torch.sigmoid(s.up(torch.relu(s.down(y.mean((2, 3), keepdim=True)))))))(
                s.a(x)
            ),
            a=nn.Conv2d(3, 6, 1),
            down=nn.Conv2d(6, 3, 1),
            up=nn.Conv2d(3, 6, 1),
            out=nn.Conv2d(6, 2, 1),
        ),
        IMAGE,
        {"a.weight": 6, "down.weight": 3},
    ),
    "gated mlp": Case(
        lambda: Fn(
            lambda s, x: (lambda p: s.down(F.silu(p[0]) * p[1]))(s.up(x).chunk(2, -1)),
            up=nn.Linear(8, 12),
            down=nn.Linear(6, 8),
        ),
        TOKENS,
        {"up.weight": 6},
    ),
    "glu": Case(lambda: nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 3)), ROW, {"0.weight": 6}),
    "separate gate": Case(
        lambda: Fn(
            lambda s, x: s.down(F.gelu(s.gate(x)) * s.up(x)),
            gate=nn.Linear(8, 6),
            up=nn.Linear(8, 6),
            down=nn.Linear(6, 8),
        ),
        TOKENS,
        {"gate.weight": 6},
    ),
    "split": Case(Split, IMAGE, {"inp.weight": 3, "inp.weight#2": 4, "inp.weight#3": 5, "a.weight": 5}),
    "reshape": Case(
        lambda: Fn(
            lambda s, x: s.out(
                torch.relu(s.mix(s.a(x).flatten(2).transpose(1, 2))).transpose(1, 2).reshape(len(x), -1, 6, 6)
            ),
            a=nn.Conv2d(3, 6, 1),
            mix=nn.Linear(6, 5),
            out=nn.Conv2d(5, 2, 1),
        ),
        IMAGE,
        {"a.weight": 6, "mix.weight": 5},
    ),
    "global pool": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        IMAGE,
        {"0.weight": 4},
    ),
    "global mean and maximum": Case(
        lambda: Fn(
            lambda s, x: (lambda y: s.b(torch.cat([y.mean((2, 3)), y.amax((2, 3))], 1)))(torch.relu(s.a(x))),
            a=nn.Conv2d(3, 4, 3),
            b=nn.Linear(8, 3),
        ),
        IMAGE,
        {"a.weight": 4},
    ),
    "bn and groups norm": Case(
        lambda: conv_net(nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 6, 1)),
        IMAGE,
        {"0.weight": 6, "3.weight": 4, "5.weight": 6},
    ),
    "channels last norm": Case(
        lambda: Fn(
            lambda s, x: s.out(s.down(F.gelu(s.up(s.norm(s.a(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)),
            a=nn.Conv2d(3, 4, 3, padding=1),
            norm=nn.LayerNorm(4),
            up=nn.Linear(4, 6),
            down=nn.Linear(6, 4),
            out=nn.Conv2d(4, 2, 1),
        ),
        IMAGE,
        {"a.weight": 4, "up.weight": 6, "down.weight": 4},
    ),
    "transformer block": Case(lambda: Block(nn.LayerNorm), TOKENS, {"attn.q.weight": 4, "up.weight": 10}),
    "transformer block, rms norm": Case(lambda: Block(nn.RMSNorm), TOKENS, {"attn.q.weight": 4, "up.weight": 10}),
    **{
        f"residual width, {norm.__name__}": Case(
            lambda norm=norm: nn.Sequential(nn.Linear(8, 8), Block(norm), norm(8), nn.Linear(8, 3)),
            TOKENS,
            {"0.weight": 8, "1.attn.q.weight": 4, "1.up.weight": 10},
        )
        for norm in (nn.LayerNorm, nn.RMSNorm, OwnRMSNorm)
    },
    "grouped queries, expanded": Case(Grouped, TOKENS, {"q.weight": 2}),
    "rotary positions": Case(lambda: Rotary(8, 3, 4), TOKENS, {"q.weight": 3}),
    "relative position table": Case(Relative, TOKENS, {"qkv.weight": 4}),
    "multi-head attention of torch": Case(
        Multihead, TOKENS, {"a.weight": 8, "attn.in_proj_weight": 4, "attn.out_proj.weight": 8}
    ),
    "tied embedding": Case(TiedEmbedding, ROW, {"embed.weight": 6, "up.weight": 5}),
    "embedding": Case(
        lambda: Fn(
            lambda s, x: s.b(torch.relu(s.table((x.abs() * 3).long().clamp(max=6)) + s.place)),
            table=nn.Embedding(7, 6),
            b=nn.Linear(6, 3),
            place=nn.Parameter(torch.zeros(4, 6)),
        ),
        ROW,
        {"table.weight": 6},
    ),
    "shuffle": Case(GroupedReshape, IMAGE, {"a.weight": 4}),
    "chunk and cat": Case(Shuffled, IMAGE, {"a.weight": 4, "b.weight": 4}),
    "pixel shuffle": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1)), IMAGE, {"0.weight": 4}
    ),
    "pixel unshuffle": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(2), nn.Conv2d(16, 2, 1)), IMAGE, {"0.weight": 4}
    ),
    "tied": Case(Tied, ROW, {"a.weight": 6}),
    "attention": Case(lambda: Attention(8, 4, 3), TOKENS, {"q.weight": 4}),
    "attention fused": Case(lambda: Attention(8, 4, 3, fused=True), TOKENS, {"qkv.weight": 4}),
    "attention manual": Case(lambda: Attention(8, 4, 3, manual=True), TOKENS, {"q.weight": 4}),
    "attention manual fused": Case(lambda: Attention(8, 4, 3, manual=True, fused=True), TOKENS, {"qkv.weight": 4}),
    "attention shared keys": Case(lambda: Attention(8, 4, 3, kv_heads=2), TOKENS, {"q.weight": 2}),
    "one head": Case(lambda: Attention(8, 1, 4, own_scale=True), TOKENS, {"q.weight": 4, "v.weight": 4}),
    "one head, default scale told in the code": Case(
        lambda: Attention(8, 1, 4), TOKENS, {"q.weight": 4, "v.weight": 4}
    ),
    "layer scale": Case(
        lambda: Fn(
            lambda s, x: s.b(s.gamma * s.a(x)),
            a=nn.Linear(8, 6),
            b=nn.Linear(6, 8),
            gamma=nn.Parameter(torch.full((6,), 1e-6)),
        ),
        TOKENS,
        {"a.weight": 6},
    ),
    "class token": Case(
        lambda: Fn(
            lambda s, x: s.b(torch.cat([s.token.expand(len(x), -1, -1), s.a(x)], 1) + s.position)[:, 0],
            a=nn.Linear(8, 6),
            b=nn.Linear(6, 3),
            token=nn.Parameter(torch.zeros(1, 1, 6)),
            position=nn.Parameter(torch.zeros(1, 6, 6)),
        ),
        TOKENS,
        {"a.weight": 6},
    ),
    "mean over channels": Case(
        lambda: Fn(lambda s, x: s.b(s.a(x) - s.a(x).mean(-1, keepdim=True)), a=nn.Linear(8, 6), b=nn.Linear(6, 3)),
        TOKENS,
        {},
    ),
    "unknown operator": Case(
        lambda: Fn(lambda s, x: s.b(torch.special.i1(s.a(x))), a=nn.Linear(8, 6), b=nn.Linear(6, 3)),
        TOKENS,
        {},
    ),
    "in place": Case(
        lambda: Fn(lambda s, x: s.b(torch.sigmoid_(s.a(x))), a=nn.Linear(8, 6), b=nn.Linear(6, 3)),
        TOKENS,
        {"a.weight": 6},
    ),
    "in place through a view": Case(
        lambda: Fn(
            lambda s, x: (lambda y: (y[:, 1:].add_(1.0), s.b(y))[1])(s.a(x)), a=nn.Linear(8, 6), b=nn.Linear(6, 3)
        ),
        TOKENS,
        {"a.weight": 6},
    ),
    "logarithm": Case(
        lambda: Fn(lambda s, x: s.b(torch.log(s.a(x).relu())), a=nn.Linear(8, 6), b=nn.Linear(6, 3)), TOKENS, {}
    ),
    "swapped axes": Case(
        lambda: Fn(
            lambda s, x: s.b(s.a(x).swapaxes(1, 2).relu().swapaxes(-1, -2)), a=nn.Linear(8, 6), b=nn.Linear(6, 3)
        ),
        TOKENS,
        {"a.weight": 6},
    ),
    "batched products": Case(
        lambda: Fn(
            lambda s, x: torch.bmm(torch.bmm(s.q(x), s.k(x).mT), s.v(x)),
            q=nn.Linear(8, 4),
            k=nn.Linear(8, 4),
            v=nn.Linear(8, 6),
        ),
        TOKENS,
        {"q.weight": 4},
    ),
    "products of matrices and vectors": Case(
        lambda: Fn(
            lambda s, x: (
                torch.outer(torch.mv(torch.mm(s.a(x), s.w), s.u), torch.ones(2, dtype=x.dtype)) * torch.dot(s.u, s.u)
            ),
            a=nn.Linear(4, 6),
            w=nn.Parameter(torch.randn(6, 5)),
            u=nn.Parameter(torch.randn(5)),
        ),
        ROW,
        {"a.weight": 6, "w": 5},
    ),
    "split by sizes": Case(
        lambda: Fn(
            lambda s, x: (lambda p, q: s.b(torch.cat([p.relu(), q.sigmoid()], -1)))(
                *torch.ops.aten.split.sizes(s.a(x), s.split_dims, -1)
            ),
            split_dims=[4, 6],
            a=nn.Linear(8, 10),
            b=nn.Linear(10, 3),
        ),
        TOKENS,
        {"a.weight": 4, "a.weight#2": 6},
    ),
    "zeroed in part": Case(
        lambda: Fn(
            lambda s, x: (lambda bias: (bias[: s.quiet_dim].zero_(), s.b(F.linear(x, s.a.weight, bias).sigmoid()))[1])(
                s.a.bias.clone()
            ),
            quiet_dim=4,
            a=nn.Linear(8, 10),
            b=nn.Linear(10, 3),
        ),
        TOKENS,
        {"a.weight": 4, "a.weight#2": 6},
    ),
    "filled in part": Case(
        lambda: Fn(
            lambda s, x: (lambda y: (y[:, 1:3].fill_(0.5), s.b(y))[1])(s.a(x)),
            a=nn.Linear(8, 6),
            b=nn.Linear(6, 3),
        ),
        TOKENS,
        {"a.weight": 6},
    ),
    "in place, read through an earlier view": Case(
        lambda: Fn(
            lambda s, x: (lambda y, view: (y.sigmoid_(), view @ view.mT)[1])(*(lambda y: (y, y[:, 1:]))(s.q(x))),
            q=nn.Linear(8, 4),
        ),
        TOKENS,
        {},
    ),
    "in place, keeping zeros, read through an earlier view": Case(
        lambda: Fn(
            lambda s, x: (lambda y, view: (y.relu_(), view @ view.mT)[1])(*(lambda y: (y, y[:, 1:]))(s.q(x))),
            q=nn.Linear(8, 4),
        ),
        TOKENS,
        {"q.weight": 4},
    ),
    "products of scans": Case(
        lambda: Fn(lambda s, x: s.q(x).cumsum(1) @ s.k(x).sigmoid().mT, q=nn.Linear(8, 4), k=nn.Linear(8, 4)),
        TOKENS,
        {"q.weight": 4},
    ),
    "products of logarithmic scans": Case(
        lambda: Fn(lambda s, x: s.q(x).logcumsumexp(1) @ s.k(x).sigmoid().mT, q=nn.Linear(8, 4), k=nn.Linear(8, 4)),
        TOKENS,
        {},
    ),
    "classes as vectors": Case(
        lambda: Fn(
            lambda s, x: F.one_hot((s.a(x) > 0).long(), 2).to(x).flatten(-2) @ s.w,
            a=nn.Linear(8, 6),
            w=nn.Parameter(torch.randn(12, 3)),
        ),
        TOKENS,
        {},
    ),
    "einsum": Case(
        lambda: Fn(
            lambda s, x: s.b(torch.einsum("bnc,cd->bnd", x, s.w).relu()),
            w=nn.Parameter(torch.randn(8, 6)),
            b=nn.Linear(6, 3),
        ),
        TOKENS,
        {"w": 6},
    ),
    **{
        f"{name} over tokens": Case(partial(_between, f), TOKENS, {"a.weight": 6})
        for name, f in {
            "max": lambda h: h.max(1, keepdim=True).values,
            "median": lambda h: h.median(1).values[:, None],
            "kthvalue": lambda h: h.kthvalue(2, 1).values[:, None],
            "topk": lambda h: h.topk(3, 1).values,
            "sort": lambda h: h.sort(1).values,
            "cummax": lambda h: h.cummax(1).values,
            "logsumexp": lambda h: h.logsumexp(1, keepdim=True),
            "prod": lambda h: h.prod(1, keepdim=True),
            "var_mean": lambda h: torch.cat(torch.var_mean(h, 1, keepdim=True), 1),
            "diff": lambda h: h.diff(dim=1),
            "diff with a start and an end": lambda h: h.diff(dim=1, prepend=h[:, :1], append=h[:, 2:4]),
            "flags joined by &, | and ^": lambda h: h * ((h > 0) & (h < 1) | (h > 2) ^ (h < -1)),
            "empty_like": lambda h: torch.empty_like(h).copy_(h),
            "fft": lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1), n=5, dim=1),
            "fft of several": lambda h: torch.fft.fft2(h[..., None], dim=(1, 3)).real[..., 0],
            "tril": lambda h: h.transpose(1, 2)[..., None].expand(-1, -1, -1, 5).tril().sum(-1).transpose(1, 2),
            "gather": lambda h: h.gather(1, (torch.arange(2)[None, :, None].expand(2, 2, h.shape[-1]))),
            "take_along_dim": lambda h: h.take_along_dim(torch.tensor([[[0], [2]], [[1], [3]]]), 1),
            "scatter_add": lambda h: _thirds(h).scatter_add(1, _places()[None, :, None].expand_as(h), h),
            "scatter_reduce": lambda h: _thirds(h).scatter_reduce(1, _places()[None, :, None].expand_as(h), h, "amax"),
            "index_add": lambda h: _thirds(h).index_add(1, _places(), h),
            "index_fill": lambda h: h.index_fill(1, torch.tensor([0, 2]), 1.0),
            "index_put": lambda h: h.index_put((torch.tensor([0, 1]), torch.tensor([2, 3])), torch.ones_like(h[:, 0])),
            "masked_scatter": lambda h: h.masked_scatter(torch.eye(5)[:, :1].bool().expand(2, 5, 1), h.cos()),
            "rotation": lambda h: torch.rot90(h.unflatten(1, (1, 5)), 1, (1, 2)).flatten(1, 2),
            "xlogy": lambda h: torch.xlogy(h, h.abs() + 1),
            "copysign": lambda h: torch.copysign(h, h * 2),
            "logaddexp": lambda h: torch.logaddexp(h, h * 2),
            "sinc": torch.sinc,
        }.items()
    },
    **{
        f"{name} over channels": Case(partial(_between, f), TOKENS, {})
        for name, f in {
            "sort": lambda h: h.sort(-1).values,
            "topk": lambda h: h.topk(6, -1).values,
            "max": lambda h: h.max(-1, keepdim=True).values.expand(-1, -1, 6),
            "fft": lambda h: torch.fft.fft(h).real,
            "gather": lambda h: h.gather(2, torch.arange(6).flip(0).expand(2, 5, 6)),
            "scatter_add": lambda h: torch.zeros_like(h).scatter_add(2, torch.arange(6).flip(0).expand(2, 5, 6), h),
            "index_add": lambda h: torch.zeros_like(h).index_add(2, torch.arange(6).flip(0), h),
            "diff": lambda h: h.diff(dim=2, prepend=h[..., :1]),
            "histc": lambda h: h * torch.histc(h, 6, -1, 1),
            "hypot, which has no slope at zero,": lambda h: torch.hypot(h, h * 2),
            "a logit": lambda h: torch.logit(h.tanh()),
            "lgamma": lambda h: torch.lgamma(h),
        }.items()
    },
    "fractional pool": Case(
        lambda: Fn(
            lambda s, x: s.b(F.fractional_max_pool2d(s.a(x), 2, output_size=3, _random_samples=s.where)),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(6, 2, 1),
            where=nn.Parameter(torch.rand(2, 6, 2), requires_grad=False),
        ),
        IMAGE,
        {"a.weight": 6},
    ),
    "distances between rows": Case(
        lambda: Fn(lambda s, x: torch.cdist(s.a(x), s.b(x)) @ x, a=nn.Linear(8, 6), b=nn.Linear(8, 6)),
        TOKENS,
        {"a.weight": 6},
    ),
    "distances between rows that are moved": Case(
        lambda: Fn(lambda s, x: torch.cdist(s.a(x), s.b(x).sigmoid()) @ x, a=nn.Linear(8, 6), b=nn.Linear(8, 6)),
        TOKENS,
        {},
    ),
    "cosine similarity over channels": Case(
        lambda: Fn(
            lambda s, x: s.c(F.cosine_similarity(s.a(x), s.b(x), -1)),
            a=nn.Linear(8, 6),
            b=nn.Linear(8, 6),
            c=nn.Linear(5, 3),
        ),
        TOKENS,
        {"a.weight": 6},
    ),
    "bilinear layer": Case(
        lambda: Fn(
            lambda s, x: s.c(s.b(s.a(x), s.d(x)).relu()),
            a=nn.Linear(8, 6),
            d=nn.Linear(8, 5),
            b=nn.Bilinear(6, 5, 4),
            c=nn.Linear(4, 3),
        ),
        TOKENS,
        {"a.weight": 6, "d.weight": 5, "b.weight": 4},
    ),
    "unpooled": Case(
        lambda: Fn(
            lambda s, x: s.b(F.max_unpool2d(*F.max_pool2d(s.a(x), 2, return_indices=True), 2)),
            a=nn.Conv2d(3, 6, 3, padding=1),
            b=nn.Conv2d(6, 2, 1),
        ),
        IMAGE,
        {"a.weight": 6},
    ),
    "torch's channel shuffle": Case(lambda: conv_net(nn.ChannelShuffle(2)), IMAGE, {"0.weight": 3}),
    **{
        f"{kind}, {layers} layers{', both directions' if both else ''}": Case(
            partial(_recurrent, kind, num_layers=layers, bidirectional=both),
            TOKENS,
            {"a.weight": 6, "r.weight_ih_l0": 5},
        )
        for kind in ("LSTM", "GRU", "RNN")
        for layers, both in ((1, False), (2, True))
    },
    "LSTM, projected": Case(
        partial(_recurrent, "LSTM", units=8, proj_size=3, num_layers=2),
        TOKENS,
        {"a.weight": 6, "r.weight_ih_l0": 8, "r.weight_hr_l0": 3},
    ),
    "LSTM without biases": Case(partial(_recurrent, "LSTM", bias=False), TOKENS, {"a.weight": 6, "r.weight_ih_l0": 5}),
    "LSTM that reads packed sequences": Case(
        lambda: Fn(
            lambda s, x: s.b(pad_packed_sequence(s.r(pack_padded_sequence(s.a(x), [5, 3], True))[0], True)[0]),
            a=nn.Linear(8, 6),
            r=nn.LSTM(6, 5, batch_first=True),
            b=nn.Linear(5, 3),
        ),
        TOKENS,
        {"a.weight": 6, "r.weight_ih_l0": 5},
    ),
    "LSTM that starts from what it is given": Case(
        lambda: Fn(
            lambda s, x: s.b(s.r(x, (s.h(x[:, 0])[None], s.h(x[:, 1])[None].sigmoid()))[0]),
            h=nn.Linear(8, 5),
            r=nn.LSTM(8, 5, batch_first=True),
            b=nn.Linear(5, 3),
        ),
        TOKENS,
        {"h.weight": 5},
    ),
    **{f"{kind}Cell": Case(partial(_cell, kind), TOKENS, {"r.weight_ih": 5}) for kind in ("LSTM", "GRU", "RNN")},
    "normalised dot product": Case(
        lambda: Fn(
            lambda s, x: (F.normalize(s.q(x), dim=-1) @ F.normalize(s.k(x), dim=-1).mT).softmax(-1) @ x,
            q=nn.Linear(8, 4),
            k=nn.Linear(8, 4),
        ),
        TOKENS,
        {"q.weight": 4},
    ),
}


# -- the oracle ------------------------------------------


def randomised(model: Model, seed: int = 0) -> Model:
    """In float64, every parameter and running statistic random: defaults of zero and one hide faults."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.5 if p.ndim > 1 else 1.0))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=generator, dtype=b.dtype))
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=generator, dtype=b.dtype) + 0.5)
    return model


def with_masks(model: Model, given: Mapping[str, Tensor]) -> Model:
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in masked.named_parameters():
            if name in given:
                p.mul_(given[name])
    return masked


def cut(coupling: Coupling, keep: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """What the smaller model should hold of a tensor, said anew: index lists, no shared code."""
    for axis in range(tensor.ndim):
        gone = (
            {
                int(i)
                for g in coupling.groups
                for s in g.slices
                if s.parameter == name and s.axis == axis
                for i in s.index[~keep[g.name]].flatten()
            }
            if coupling.groups
            else set()
        )
        tensor = tensor[(slice(None),) * axis + ([i for i in range(tensor.shape[axis]) if i not in gone],)]
    return tensor


def assert_equal_without(
    model: Model,
    x: Tensor,
    coupling: Coupling,
    removed: Mapping[str, list[int]],
    trains: bool = True,
) -> Model:
    """Outputs in eval and train mode, gradients of what is kept, and the tensors themselves."""
    keep = {
        g.name: torch.tensor([i not in removed.get(g.name, []) for i in range(g.size)], dtype=torch.bool)
        for g in coupling.groups
    }
    given = channel_masks(coupling, keep, dict(model.named_parameters()))
    masked = with_masks(model, given)
    small = shrink(model, x, masks=given)
    for name, tensor in [*masked.named_parameters(), *masked.named_buffers()]:
        assert torch.equal(
            cut(coupling, keep, name, tensor), dict([*small.named_parameters(), *small.named_buffers()])[name]
        ), name
    for training in (False, True) if trains else (False,):
        a, b = (copy.deepcopy(m).train(training) for m in (masked, small))
        ya, yb = a(x), b(x)
        assert relative_error(ya, yb) < 1e-10
        for y in (ya, yb):
            torch.manual_seed(0)
            (y * torch.randn_like(y)).sum().backward()
        grads = {n: p.grad for n, p in b.named_parameters()}
        for name, p in a.named_parameters():
            if p.grad is not None:
                expected = cut(coupling, keep, name, p.grad)
                scale = max(float(q.grad.abs().max()) for q in a.parameters() if q.grad is not None)
                assert float((expected - grads[name]).abs().max()) < 1e-10 * max(scale, 1e-300), name
    return small


@cache
def coupled(case: Case) -> tuple[Model, Tensor, Coupling]:
    """The case's model, an input and the coupling; shared between tests, none of which may change them."""
    torch.manual_seed(0)
    model = randomised(case.make()).eval()
    x = torch.randn(case.shape, dtype=torch.float64)
    return model, x, couple(model, x)
