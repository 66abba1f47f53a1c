"""Residual nets whose branches have gates: a gate of zero is the oracle for a branch that is gone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 6


class Gated(nn.Module):
    """Blocks one after another, and a head; ``gates`` has a number for each branch, by which what it adds is scaled."""

    def __init__(self, blocks: nn.Module, branches: int, head: nn.Module, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or nn.Identity()
        self.blocks, self.head, self.gates = blocks, head, [1.0] * branches
        at = 0
        for block in blocks.children():
            block.gates, block.first = self.gates, at
            at += block.branches

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks.children():
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    """One of a few kinds; ``branches`` says how many branches it has."""

    branches = 1
    gates: Sequence[float]
    first = 0

    def gate(self, number: int = 0) -> float:
        return self.gates[self.first + number]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(b, n, c)), None


class Transformer(Block):
    """Two branches, attention and a perceptron, with norms before."""

    branches = 2

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        added, _ = self.attn(self.norm1(x), mask=None)
        x = x + self.gate() * added
        return x + self.gate(1) * self.mlp(self.norm2(x))


class PostNorm(Block):
    """Norms after the sums, and layers of the branches side by side in the block."""

    branches = 2

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.attn(x)[0] * self.gate() + x)
        return self.norm2(x + self.gate(1) * self.fc2(F.relu(self.fc1(x))))


class Parallel(Block):
    """Both branches read one norm, and are added at once."""

    branches = 2

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + (self.gate() * self.attn(y)[0] + self.gate(1) * self.mlp(y))


class LayerScale(Block):
    """A parameter of the block itself scales the branch, and a number what is passed on."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.7 + self.gate() * (self.gamma * self.fc2(torch.tanh(self.fc1(x))))


class WrittenOut(Block):
    """Attention in the block's own code: the sizes of what its layers give are read there."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / c**0.5).softmax(-1)
        return x + self.gate() * self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Normed(Block):
    """The last weight is divided by its norm, which the block's own code takes: of zeros there is none."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.gain = nn.Parameter(torch.rand(width, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gain * self.fc2.weight / self.fc2.weight.norm(dim=1, keepdim=True)
        return x + self.gate() * F.linear(torch.tanh(self.fc1(x)), weight)


class Basic(Block):
    """A ResNet's block: the rectifier writes in place, and stands after the sum too."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        out = self.gate() * out
        out += x
        return self.act(out)


class Inverted(Block):
    """An inverted bottleneck with squeeze and excitation, linear at its end."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.squeeze, self.excite = nn.Conv2d(2 * width, 2, 1), nn.Conv2d(2, 2 * width, 1)
        self.project, self.bn2 = nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(F.silu(self.bn1(self.expand(x))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.gate() * self.bn2(self.project(y))


@dataclass(frozen=True)
class Case:
    """A net, an example, and how its branches are called, in the order of its gates."""

    make: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    names: tuple[str, ...]

    def model(self) -> nn.Module:
        """In float64, off its defaults, in eval mode."""
        torch.manual_seed(0)
        model = self.make().double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.rand_like(p) * 0.2 - 0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.uniform_(-0.3, 0.3)
        return model


def tokens() -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _of_tokens(*kinds: type[Block], container: type[nn.Module] = nn.Sequential) -> nn.Module:
    blocks = [kind() for kind in kinds]
    listed = nn.Sequential(*blocks) if container is nn.Sequential else nn.ModuleList(blocks)
    return Gated(listed, sum(one.branches for one in blocks), nn.Linear(WIDTH, 3))


class _Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def _of_images(*kinds: type[Block]) -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU())
    return Gated(nn.Sequential(*(kind() for kind in kinds)), len(kinds), _Pooled(), stem)


CASES = {
    "transformer": Case(
        lambda: _of_tokens(Transformer, Transformer),
        tokens,
        ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"),
    ),
    "in a list": Case(
        lambda: _of_tokens(Transformer, Transformer, container=nn.ModuleList),
        tokens,
        ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"),
    ),
    "norms after": Case(
        lambda: _of_tokens(PostNorm, PostNorm),
        tokens,
        ("blocks.0.attn", "blocks.0.fc1+fc2", "blocks.1.attn", "blocks.1.fc1+fc2"),
    ),
    "side by side": Case(
        lambda: _of_tokens(Parallel, Parallel),
        tokens,
        ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"),
    ),
    "scaled": Case(lambda: _of_tokens(LayerScale, LayerScale), tokens, ("blocks.0", "blocks.1")),
    "written out": Case(lambda: _of_tokens(WrittenOut, WrittenOut), tokens, ("blocks.0", "blocks.1")),
    "divided": Case(lambda: _of_tokens(Normed, Normed), tokens, ("blocks.0", "blocks.1")),
    "residual": Case(lambda: _of_images(Basic, Basic, Basic), images, ("blocks.0", "blocks.1", "blocks.2")),
    "inverted": Case(lambda: _of_images(Inverted, Inverted), images, ("blocks.0", "blocks.1")),
    "mixed": Case(
        lambda: _of_tokens(LayerScale, Transformer, WrittenOut, PostNorm),
        tokens,
        ("blocks.0", "blocks.1.attn", "blocks.1.mlp", "blocks.2", "blocks.3.attn", "blocks.3.fc1+fc2"),
    ),
}


def without(model: nn.Module, gone: Collection[int]) -> nn.Module:
    """The oracle: a copy of which these branches add zero times what they computed."""
    gated = copy.deepcopy(model)
    for i in gone:
        gated.gates[i] = 0.0
    for block in gated.blocks.children():
        block.gates = gated.gates
    return gated
