"""Small nets, each with one thing in it that libraries for pruning channels have to read, and what it is called with.

Every net ends in ``out`` (and ``more``), whose outputs are the user's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE, ROWS, WORDS = (2, 3, 12, 12), (4, 6), (3, 5)


class Net(nn.Module):
    """Layers by name, and a forward over them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, *inputs):
        return self.run(self, *inputs)


def conv(a, b, size=3, **words):
    return nn.Conv2d(a, b, size, padding=size // 2, **words)


def pooled(layer, x):
    return layer.out(x.mean((2, 3)))


def shuffled(x, groups):
    n, c, *rest = x.shape
    return x.view(n, groups, c // groups, *rest).transpose(1, 2).reshape(n, c, *rest)


def image_net(forward, **layers):
    return lambda: (Net(forward, **layers_of(layers)), (torch.randn(IMAGE),))


def row_net(forward, **layers):
    return lambda: (Net(forward, **layers_of(layers)), (torch.randn(ROWS),))


def layers_of(layers):
    """New ones each time."""
    return {name: layer() if callable(layer) and not isinstance(layer, nn.Module) else layer
            for name, layer in layers.items()}  # fmt: skip


class Attention(nn.Module):
    """Written out, with heads of a set size."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 16))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)) for _ in range(4))

    def forward(self, x):
        shares, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            y = y.index_add(0, row, expert(x[row]) * shares[row, place, None])
        return y


def unet(m, x):
    down = m.a(x).relu()
    deep = m.b(F.max_pool2d(down, 2)).relu()
    return m.out(m.c(torch.cat([down, F.interpolate(deep, scale_factor=2)], 1)).relu())


def dense_block(m, x):
    x = m.a(x)
    x = torch.cat([x, m.b(x.relu())], 1)
    return pooled(m, torch.cat([x, m.c(x.relu())], 1))


def squeezed(m, x):
    x = m.a(x).relu()
    return pooled(m, m.d(x * m.c(m.b(x.mean((2, 3), keepdim=True)).relu()).sigmoid()))


def tokens(m, x):
    h = m.embed(x).flatten(2).transpose(1, 2)
    h = torch.cat([m.token.expand(len(h), -1, -1), h], 1) + m.places
    return m.out(m.norm(m.b(m.a(h).relu()))[:, 0])


def recurrent(m, x):
    return m.out(m.rnn(m.embed(x))[0][:, -1])


def with_tokens():
    net = Net(
        tokens, embed=nn.Conv2d(3, 8, 4, 4), a=nn.Linear(8, 16), b=nn.Linear(16, 8), norm=nn.LayerNorm(8),
        out=nn.Linear(8, 3),
    )  # fmt: skip
    net.token, net.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 10, 8))
    return net, (torch.randn(IMAGE),)


class Split(nn.Module):
    """Sizes in code of one's own, as the next two."""

    def __init__(self):
        super().__init__()
        self.a, self.out = conv(3, 8), nn.Linear(8, 3)

    def forward(self, x):
        first, second = self.a(x).split([4, 4], 1)
        return self.out(torch.cat([second.relu(), first.relu()], 1).mean((2, 3)))


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.b(self.a(x)[:, :4]).mean((2, 3)))


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.b(self.a(x).reshape(-1, 8, 12, 12)).mean((2, 3)))


def looked_at():
    net, x = SITUATIONS["a plain chain"]()
    seen = []

    def look(_, __, output):
        seen.append(output.detach().mean().item())

    net.b.register_forward_hook(look)
    return net, x


def kept():
    def forward(m, x):
        m.maps = [m.a(x).relu()]
        return pooled(m, m.b(m.maps[0]))

    net, x = Net(forward, a=conv(3, 8), b=conv(8, 8), out=nn.Linear(8, 3)), (torch.randn(IMAGE),)
    net(*x).sum().backward()
    return net, x


def tied():
    net = Net(lambda m, x: m.out(m.b(m.a(m.embed(x)).relu())), embed=nn.Embedding(9, 8), a=nn.Linear(8, 16),
              b=nn.Linear(16, 8), out=nn.Linear(8, 9, bias=False))  # fmt: skip
    net.out.weight = net.embed.weight
    return net, (torch.randint(9, WORDS),)


def words(forward, **layers):
    return lambda: (Net(forward, embed=nn.Embedding(9, 8), **layers_of(layers), out=nn.Linear(8, 3)),
                    (torch.randint(9, WORDS),))  # fmt: skip


PAIR = {"a": lambda: conv(3, 8), "b": lambda: conv(8, 8), "out": lambda: nn.Linear(8, 3)}
LINEAR = {"a": lambda: nn.Linear(6, 8), "b": lambda: nn.Linear(8, 8), "out": lambda: nn.Linear(8, 3)}

SITUATIONS = {
    "a plain chain": image_net(lambda m, x: pooled(m, m.b(m.a(x).relu()).relu()), **PAIR),
    "batch norms": image_net(
        lambda m, x: pooled(m, m.n(m.b(m.k(m.a(x)).relu())).relu()),
        **PAIR, k=lambda: nn.BatchNorm2d(8), n=lambda: nn.BatchNorm2d(8),
    ),
    "a residual sum": image_net(lambda m, x: pooled(m, m.a(x) + m.b(m.a(x).relu())), **PAIR),
    "a sum that broadcasts": image_net(lambda m, x: pooled(m, m.a(x) + m.b(m.a(x).mean((2, 3), keepdim=True))), **PAIR),
    "a concatenation": image_net(
        lambda m, x: pooled(m, torch.cat([m.a(x), m.b(m.a(x))], 1)), a=PAIR["a"], b=PAIR["b"],
        out=lambda: nn.Linear(16, 3),
    ),
    "a dense block": image_net(
        dense_block, a=lambda: conv(3, 4), b=lambda: conv(4, 4), c=lambda: conv(8, 4), out=lambda: nn.Linear(12, 3)
    ),
    "a U-net": image_net(
        unet, a=lambda: conv(3, 8), b=lambda: conv(8, 8), c=lambda: conv(16, 8), out=lambda: conv(8, 3, 1)
    ),
    "a split": lambda: (Split(), (torch.randn(IMAGE),)),
    "chunks that gate": image_net(
        lambda m, x: pooled(m, m.b(F.glu(m.a(x), 1))), a=lambda: conv(3, 16), b=PAIR["b"], out=PAIR["out"]
    ),
    "a slice": lambda: (Sliced(), (torch.randn(IMAGE),)),
    "depthwise": image_net(
        lambda m, x: pooled(m, m.c(m.b(m.a(x).relu()).relu())), a=PAIR["a"], b=lambda: conv(8, 8, groups=8),
        c=lambda: conv(8, 8, 1), out=PAIR["out"],
    ),
    "groups": image_net(
        lambda m, x: pooled(m, m.c(m.b(m.a(x).relu()).relu())), a=PAIR["a"], b=lambda: conv(8, 8, groups=2),
        c=lambda: conv(8, 8, 1), out=PAIR["out"],
    ),
    "shuffled channels": image_net(
        lambda m, x: pooled(m, m.c(shuffled(m.a(x), 2))), a=PAIR["a"], c=lambda: conv(8, 8, 1), out=PAIR["out"]
    ),
    "a squeeze and its gate": image_net(
        squeezed, a=PAIR["a"], b=lambda: nn.Conv2d(8, 4, 1), c=lambda: nn.Conv2d(4, 8, 1), d=PAIR["b"], out=PAIR["out"]
    ),
    "flattened over space": image_net(
        lambda m, x: m.out(m.b(F.adaptive_avg_pool2d(m.a(x), 3).flatten(1)).relu()), a=PAIR["a"],
        b=lambda: nn.Linear(72, 8), out=PAIR["out"],
    ),
    "pixels shuffled": image_net(
        lambda m, x: m.out(F.pixel_shuffle(m.a(x), 2)), a=lambda: conv(3, 16), out=lambda: conv(4, 3)
    ),
    "transposed": image_net(
        lambda m, x: m.out(m.b(m.a(x).relu()).relu()), a=PAIR["a"], b=lambda: nn.ConvTranspose2d(8, 8, 2, 2),
        out=lambda: conv(8, 3),
    ),
    "one axis": lambda: (
        Net(lambda m, x: m.out(m.b(m.a(x).relu()).mean(2)), a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 8, 3),
            out=nn.Linear(8, 3)), (torch.randn(2, 3, 12),)),
    "three axes": lambda: (
        Net(lambda m, x: m.out(m.b(m.a(x).relu()).mean((2, 3, 4))), a=nn.Conv3d(3, 8, 3), b=nn.Conv3d(8, 8, 1),
            out=nn.Linear(8, 3)), (torch.randn(2, 3, 4, 4, 4),)),
    "PReLU and group norm": image_net(
        lambda m, x: pooled(m, m.b(m.p(m.n(m.a(x))))), **PAIR, n=lambda: nn.GroupNorm(4, 8), p=lambda: nn.PReLU(8)
    ),
    "instance norm": image_net(
        lambda m, x: pooled(m, m.b(m.n(m.a(x)))), **PAIR, n=lambda: nn.InstanceNorm2d(8, affine=True)
    ),
    "layer norm over channels": row_net(lambda m, x: m.out(m.b(m.n(m.a(x)))), **LINEAR, n=lambda: nn.LayerNorm(8)),
    "a layer used twice": row_net(lambda m, x: m.out(m.b(m.b(m.a(x).relu()).relu())), **LINEAR),
    "two inputs": lambda: (
        Net(lambda m, x, y: m.out(m.b((m.a(x) * m.c(y)).relu())), **layers_of(LINEAR), c=nn.Linear(2, 8)),
        (torch.randn(ROWS), torch.randn(4, 2))),
    "outputs in a dict": row_net(
        lambda m, x: {"logits": m.out(m.b(m.a(x).relu())), "more": m.more(m.a(x))}, **LINEAR,
        more=lambda: nn.Linear(8, 2),
    ),
    "einsum": row_net(lambda m, x: m.out(torch.einsum("nd,nd->nd", m.a(x), m.b(m.a(x).relu()))), **LINEAR),
    "a mean over channels that gates": row_net(
        lambda m, x: m.out(m.b(m.a(x).relu() * m.a(x).mean(1, keepdim=True).sigmoid())), **LINEAR
    ),
    "a constant that scales": row_net(lambda m, x: m.out(m.b(m.a(x).relu() * torch.arange(1.0, 9))), **LINEAR),
    "tokens and places": with_tokens,
    "attention, written out": words(lambda m, x: m.out(m.a(m.embed(x)).mean(1)), a=lambda: nn.Sequential(
        nn.Linear(8, 16), Attention(), nn.Linear(16, 8))),
    "torch's attention": words(
        lambda m, x: m.out(m.a(*[m.embed(x)] * 3, need_weights=False)[0].mean(1)),
        a=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "an encoder layer": words(
        lambda m, x: m.out(m.a(m.embed(x)).mean(1)),
        a=lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
    ),
    "LSTM": words(recurrent, rnn=lambda: nn.LSTM(8, 8, 2, batch_first=True)),
    "GRU, both ways": words(
        lambda m, x: m.out(m.c(m.rnn(m.embed(x))[0][:, -1])), rnn=lambda: nn.GRU(8, 8, batch_first=True,
        bidirectional=True), c=lambda: nn.Linear(16, 8),
    ),
    "tied embeddings": tied,
    "experts behind a router": row_net(
        lambda m, x: m.out(m.b(m.a(x))), a=lambda: nn.Linear(6, 8), b=Experts, out=lambda: nn.Linear(8, 3)
    ),
    "weight norm": row_net(
        lambda m, x: m.out(m.b(m.a(x).relu()).relu()), a=LINEAR["a"],
        b=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), out=LINEAR["out"],
    ),
    "spectral norm": row_net(
        lambda m, x: m.out(m.b(m.a(x).relu()).relu()), a=LINEAR["a"],
        b=lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), out=LINEAR["out"],
    ),
    "an orthogonal weight": row_net(
        lambda m, x: m.out(m.b(m.a(x).relu()).relu()), a=LINEAR["a"],
        b=lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), out=LINEAR["out"],
    ),
    "sizes in the code": lambda: (Reshaped(), (torch.randn(IMAGE),)),
    "dropout that is always on": row_net(
        lambda m, x: m.out(m.b(F.dropout(m.a(x).relu(), 0.0, training=True))), **LINEAR
    ),
    "a hook that looks": looked_at,
    "activations kept in a list": kept,
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The net in eval mode, and its inputs."""
    torch.manual_seed(0)
    net, inputs = SITUATIONS[name]()
    return net.eval(), inputs
