"""A shrunk model does what the masked one does on calls that the example was not: forwards, arguments, modes drawn."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as for_all
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_flowprune as fp

WIDTH, HEADS = 8, 4


class Attends(nn.Module):
    """Attention that takes a mask of padding, a flag and a number; a way to put heads together each."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = HEADS, WIDTH // HEADS
        self.qkv, self.proj, self.drop = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(batch, heads, tokens, width) of queries, keys and values."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, padded: Tensor | None, causal: bool, temperature: float) -> Tensor:
        q, k, v = self.split(x)
        scores = q @ k.mT / temperature
        if padded is not None:
            scores = scores.masked_fill(padded[:, None, None, :], -1e4)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -1e4)
        return self.proj(self.merge(self.drop(scores.softmax(-1)) @ v))


class WidthsOfTheInput(Attends):
    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, c = x.shape
        return self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).reshape(len(y), y.shape[2], WIDTH)


class Slices(Attends):
    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        qkv, size = self.qkv(x), self.heads * self.width
        parts = qkv[..., :size], qkv[..., size : 2 * size], qkv[..., -size:]
        return tuple(part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in parts)


class WithTheBatch(Attends):
    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).chunk(3, -1)
        return tuple(self.one(part) for part in (q, k, v))

    def one(self, part: Tensor) -> Tensor:
        b, n = part.shape[:2]
        part = part.transpose(1, 2).reshape(b * self.heads, self.width, n)
        return part.reshape(b, self.heads, self.width, n).transpose(2, 3)


class Unpacked(Attends):
    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.one(part) for part in self.qkv(x).chunk(3, -1))

    def one(self, part: Tensor) -> Tensor:
        shape = (*part.shape[:2], HEADS, WIDTH // HEADS)
        return part.view(*shape).transpose(1, 2)


class OfTorch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor, padded: Tensor | None, causal: bool, temperature: float) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
        return self.inner(x / temperature, x, x, key_padding_mask=padded, attn_mask=mask, need_weights=False)[0]


class Recurrent(nn.Module):
    """Step by step, as many steps as the input has."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(WIDTH, 6), nn.Linear(6, WIDTH)

    def forward(self, x: Tensor, padded: Tensor | None, causal: bool, temperature: float) -> Tensor:
        state, states = x.new_zeros(len(x), 6), []
        for step in (x if causal else x.flip(1)).unbind(1):
            state = self.cell(step / temperature, state)
            states.append(state)
        found = self.out(torch.stack(states, 1))
        return found if padded is None else found.masked_fill(padded[..., None], 0.0)


BLOCKS = {cls.__name__: cls for cls in (Attends, WidthsOfTheInput, Slices, WithTheBatch, Unpacked, OfTorch, Recurrent)}
NORMS = {
    "batch": lambda: nn.BatchNorm1d(WIDTH),
    "batch, of each": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm1d(WIDTH, affine=True, track_running_stats=True),
    "none": nn.Identity,
}


class Net(nn.Module):
    """Linear, norm, block, norm, linear; channels of the norms and of the block go."""

    def __init__(self, block: str, norm: str) -> None:
        super().__init__()
        self.embed, self.norm, self.block = nn.Linear(5, WIDTH), NORMS[norm](), BLOCKS[block]()
        self.after, self.head = NORMS[norm](), nn.Linear(WIDTH, 3)

    def forward(
        self, x: Tensor, padded: Tensor | None = None, *, causal: bool = False, temperature: float = 1.0
    ) -> Tensor:
        h = self.norm(self.embed(x).mT).mT.relu()
        h = self.block(h, padded, causal, temperature)
        return self.head(self.after(h.mT).mT.tanh())


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    batch, length = draw(st.integers(2, 4)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    call: dict[str, Any] = {"x": torch.randn(batch, length, 5, generator=generator, dtype=torch.float64)}
    if draw(st.booleans()):
        call["padded"] = torch.rand(batch, length, generator=generator) < 0.3
        call["padded"][:, 0] = False
    if draw(st.booleans()):
        call["causal"] = draw(st.booleans())
    if draw(st.booleans()):
        call["temperature"] = draw(st.sampled_from([0.5, 2.0, 3.0]))
    return call


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    model.train(mode != "eval")
    for module in model.modules():
        norm = isinstance(module, (nn.BatchNorm1d, nn.InstanceNorm1d))
        if (norm and mode == "frozen") or isinstance(module, nn.Dropout):
            module.eval()
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def running(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]


def shrunk(block: str, norm: str, example: Mapping[str, Any], share: float, seed: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    model = Net(block, norm).double().eval()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    fp.global_prune(model, "magnitude", share, granularity="channel", scope="layer", example_inputs=dict(example))
    return model, fp.shrink(model, dict(example))


def check(block: str, norm: str, example: Any, later: Any, mode: str, share: float, seed: int) -> None:
    model, small = shrunk(block, norm, example, share, seed)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for one in (model, small):
        set_mode(one, mode)
    before = running(small)
    for call in (later, example):
        torch.testing.assert_close(small(**call), model(**call), rtol=1e-7, atol=1e-9)
    moved = [not torch.equal(a, b) for a, b in zip(before, running(small), strict=True)]
    assert not any(moved) if mode != "train" else all(moved), "norms that are frozen stay, others go on"
    again = copy.deepcopy(small)
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again.eval()(**later), small.eval()(**later), rtol=0, atol=0)


drawn = for_all(
    block=st.sampled_from(sorted(BLOCKS)),
    norm=st.sampled_from(sorted(NORMS)),
    example=calls(),
    later=calls(),
    mode=st.sampled_from(["eval", "train", "frozen"]),
    share=st.sampled_from([0.25, 0.5]),
    seed=st.integers(0, 9),
)
words: Any = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


PAIRS = [*((block, "batch") for block in BLOCKS), *(("WidthsOfTheInput", norm) for norm in NORMS if norm != "batch")]


@pytest.mark.parametrize(("block", "norm"), PAIRS)
def test_every_block_and_every_norm(block: str, norm: str) -> None:
    """Nothing given in the example, all of it later, and the other way round."""
    x = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    every = {"x": torch.cat([x, x[:1].neg()]), "padded": torch.eye(3, 4) > 0, "causal": True, "temperature": 2.0}
    every["padded"][0] = False
    for example, later in (({"x": x}, every), (every, {"x": x})):
        check(block, norm, example, later, "frozen", 0.5, 0)


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate, Phase.shrink], **words)
@drawn
def test_calls_that_the_example_was_not(**case: Any) -> None:
    check(**case)


@pytest.mark.slow
@settings(max_examples=400, **words)
@drawn
def test_many_calls_that_the_example_was_not(**case: Any) -> None:
    check(**case)
