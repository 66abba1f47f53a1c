"""What people write themselves: transformers, recurrent nets, early exits, outputs of all kinds."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.foreign.case import add, image, rows, words


class Outputs(NamedTuple):
    logits: Tensor
    hidden: list[Tensor]


@dataclass
class Found:
    logits: Tensor
    hidden: list[Tensor]


class Trunk(nn.Module):
    """Three convolutions, each with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in ((3, 16), (16, 24), (24, 32))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out


class EarlyExit(nn.Module):
    """Leaves when sure."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        self.trunk, self.sure = Trunk(), sure
        self.exits = nn.ModuleList(nn.Linear(width, 5) for width in (16, 24, 32))

    def forward(self, x: Tensor) -> Tensor:
        for stage, head in zip(self.trunk.stages, self.exits, strict=True):
            x = stage(x)
            y = head(x.mean((2, 3)))
            if y.softmax(-1).max() > self.sure:
                return y
        return y


class Outcome(nn.Module):
    """Its outputs, as the function lays them out."""

    def __init__(self, laid_out) -> None:
        super().__init__()
        self.trunk, self.head, self.laid_out = Trunk(), nn.Linear(32, 5), laid_out

    def forward(self, x: Tensor):
        features = self.trunk(x)
        return self.laid_out(self.head(features[-1].mean((2, 3))), features)


class Hooked(nn.Module):
    """Keeps activations by hooks, in lists and dicts, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.kept, self.last = Trunk(), nn.Linear(56, 5), {}, []
        for number, stage in enumerate(self.trunk.stages):
            stage.register_forward_hook(lambda _m, _i, y, n=number: self.kept.__setitem__(n, y))

    def forward(self, x: Tensor) -> Tensor:
        self.trunk(x)
        self.last = [self.kept[1], self.kept[2]]
        return self.head(torch.cat([y.mean((2, 3)) for y in self.last], 1))


class Tagger(nn.Module):
    """A recurrent net over words."""

    def __init__(self, kind, **options) -> None:
        super().__init__()
        self.words, self.rnn = nn.Embedding(99, 16), kind(16, 24, batch_first=True, **options)
        self.head = nn.Linear(48 if options.get("bidirectional") else 24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(x))[0])


class Packed(Tagger):
    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(x.shape[0]).flip(0) + x.shape[1] - x.shape[0] + 1
        packed = nn.utils.rnn.pack_padded_sequence(self.words(x), lengths, batch_first=True)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Unrolled(nn.Module):
    """Cells in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 24)
        out = []
        for step in x.unbind(1):
            h = self.cell(step, h)
            out.append(self.head(h))
        return torch.stack(out, 1)


class Translator(nn.Module):
    """nn.Transformer with embeddings, positions and a causal mask."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.source, self.target, self.place = nn.Embedding(99, 32), nn.Embedding(99, 32), nn.Embedding(32, 32)
        self.net = nn.Transformer(32, 4, 2, 2, 48, batch_first=True, dropout=0.1, **options)
        self.head = nn.Linear(32, 99)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], dtype=self.place.weight.dtype)
        a = self.source(src) + self.place(torch.arange(src.shape[1]))
        b = self.target(tgt) + self.place(torch.arange(tgt.shape[1]))
        return self.head(self.net(a, b, tgt_mask=mask, src_key_padding_mask=src == 0, tgt_is_causal=True))


class Experts(nn.Module):
    """Tokens go to the two best of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, rank = (chosen == number).nonzero(as_tuple=True)
            if token.numel():
                out[token] += expert(flat[token]) * weights[token, rank, None]
        return out.reshape(x.shape)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 32), nn.ELU(), nn.Linear(32, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ELU(), nn.Linear(32, 20))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp() if self.training else mean
        return {"x": self.decoder(z), "mean": mean, "log_var": log_var}


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(32, 8)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = (F.normalize(self.head(self.trunk(x)[-1].mean((2, 3))), dim=-1) for x in (a, b))
        return a @ b.T


class Graph(nn.Module):
    """Two layers over a dense adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        near = near / near.sum(-1, keepdim=True)
        return self.head(F.relu(self.two(near @ F.relu(self.one(near @ x)))))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def register() -> None:
    add("plain/TransformerEncoder", encoder, rows(32), 10, 7)
    add(
        "plain/TransformerEncoder norm first, GELU",
        lambda: encoder(norm_first=True, activation="gelu"),
        rows(32),
        10,
        7,
    )
    add("plain/Transformer", Translator, lambda b, s: (words(b, s), words(b, s - 2)), 10, 7)
    add(
        "plain/Transformer norm first",
        lambda: Translator(norm_first=True),
        lambda b, s: (words(b, s), words(b, s - 2)),
        10,
        7,
    )
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        add(f"plain/{kind.__name__} tagger", lambda k=kind: Tagger(k, num_layers=2, bidirectional=True), words, 10, 7)
    add("plain/LSTM projection", Projected, words, 10, 7)
    add("plain/LSTM packed", lambda: Packed(nn.LSTM), words, 10, 7)
    add("plain/GRUCell loop", Unrolled, rows(8), 6, 9)
    add("plain/early exit, never", lambda: EarlyExit(2.0), image, 32, 48)
    add("plain/early exit, at times", lambda: EarlyExit(0.35), image, 32, 48)
    layouts = {
        "list": lambda y, f: [y, f[2]],
        "dict": lambda y, f: {"logits": y, "features": {"a": f[1], "b": f[2:]}},
        "ordered dict": lambda y, f: OrderedDict(out=y, aux=f[-1]),
        "named tuple": lambda y, f: Outputs(y, f[1:]),
        "dataclass": lambda y, f: Found(y, f[2:]),
        "none and number": lambda y, _f: (y, None, 3, "text"),
    }
    for kind, laid_out in layouts.items():
        add(f"plain/outputs: {kind}", lambda f=laid_out: Outcome(f), image, 32, 48)
    add("plain/hooks that keep", Hooked, image, 32, 48)
    add("plain/experts", Experts, rows(16), 10, 7)
    add("plain/VAE", VAE, lambda b, _s: torch.randn(b, 20), 1)
    add("plain/Siamese", Siamese, lambda b, s: (image(b, s), image(b, s)), 32, 48)
    add("plain/graph, dense", Graph, lambda b, s: (torch.randn(b, s, 8), torch.rand(b, s, s)), 10, 7)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.head = (
            nn.Embedding(99, 16),
            nn.LSTM(16, 24, batch_first=True, proj_size=12),
            nn.Linear(12, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(x))[0])
