"""Tiny nets, one row each: a new row buys every behavioural test.

All in float64, with biases and batch-norm statistics off their initial zeros and ones, so that nothing is right by
accident. At most some dozens of parameters, so that the whole Hessian fits in a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A net, and the shape of its input (int inputs are token numbers below ``vocabulary``)."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 3
    vocabulary: int = 0
    tolerance: float = 1e-10

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build().double()
            for module in model.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
                    _unsettle(module)
                if getattr(module, "bias", None) is not None:
                    nn.init.normal_(module.bias, std=0.2)
        return model.to(dtype).eval()

    def batch(self, size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
        source = torch.Generator().manual_seed(1000 + seed)
        if self.vocabulary:
            inputs = torch.randint(self.vocabulary, (size, *self.shape), generator=source)
        else:
            inputs = torch.randn(size, *self.shape, generator=source, dtype=torch.float64).to(dtype)
        return inputs, torch.randint(self.classes, (size,), generator=source)

    def batches(self, sizes: tuple[int, ...] = (5, 5), dtype: torch.dtype = torch.float64) -> list[Batch]:
        return [self.batch(size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]


def _unsettle(norm: nn.Module) -> None:
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.5, 2.0)


class Residual(nn.Module):
    """Two convolutions with batch norm round a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1, bias=False)
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 2, padding=1, bias=False), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 2, bias=False), nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.tanh(x + self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class Tied(nn.Module):
    """A decoder that is the transposed embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.decode = nn.Linear(3, 5, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.mix(self.embed(x))))


class Attention(nn.Module):
    """torch's attention module, whose ``out_proj`` is read without a call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.fc(self.norm(x + y).mean(1))


class Fused(nn.Module):
    """Attention by the fused kernel, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Linear(2, 6), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.fc(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


class Gate(nn.Module):
    """Squeeze and excite with hardsigmoid, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.fc = nn.Conv2d(1, 3, 2), nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
        self.act = nn.Hardsigmoid(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        return self.fc((x * self.act(self.gate(x.mean((2, 3), keepdim=True)))).mean((2, 3)))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3),
    )  # fmt: skip


def _grouped() -> nn.Module:
    grouped = nn.Conv2d(4, 4, 2, groups=2)
    return nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Tanh(), grouped, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def _transposed() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(2, 3, 2),
        nn.Tanh(),
        nn.Conv1d(3, 2, 2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


CASES = {
    case.name: case
    for case in (
        Case("mlp", _mlp, (4,)),
        Case("cnn", _cnn, (1, 4, 4)),
        Case("residual", Residual, (1, 4, 4)),
        Case("grouped", _grouped, (1, 3, 3)),
        Case("transposed", _transposed, (2, 4)),
        Case("tied", Tied, (), classes=5, vocabulary=5),
        Case("attention", Attention, (3, 4)),
        Case("fused", Fused, (3, 2)),
        Case(
            "gate", Gate, (1, 3, 3), tolerance=1e-6
        ),  # torch's float64 gradient of hardsigmoid multiplies by a float32 sixth
    )
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The net of tests that need just any."""
    return CASES["mlp"].model(dtype=dtype)


def cnn(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The net of tests that need batch norm and filters."""
    return CASES["cnn"].model(dtype=dtype)
