"""Attributes that code holds a size against: set with the size, where a check would refuse the smaller model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torch_flowprune as fp


class Checks(nn.Module):
    """A part that raises where it is given another width than it was made for."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.channels, self.wanted = width, width
        self.conv = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Asserts(Checks):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.conv(x)


class Raises(Checks):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(1) != self.wanted:
            raise RuntimeError("another width than it was made for")
        return self.conv(x)


class Unpacks(Checks):
    def forward(self, x: Tensor) -> Tensor:
        _, channels, *_ = x.shape
        torch._assert(self.wanted == channels, "another width than it was made for")
        return self.conv(x)


@pytest.mark.parametrize(("kind", "name"), [(Asserts, "channels"), (Raises, "wanted"), (Unpacks, "wanted")])
@pytest.mark.parametrize("out", [8, 6])
def test_it_is_set_to_the_width_of_the_input(kind: type[Checks], name: str, out: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), kind(8, out), nn.ReLU(), nn.Conv2d(out, 2, 1)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    fp.global_prune(model, "magnitude", 0.4, granularity="channel", example_inputs=x)
    small = fp.shrink(model, x)
    assert getattr(small[2], name) == small[0].out_channels < 8
    assert type(small[2]) is kind
    torch.testing.assert_close(small(x[:1]), model(x[:1]))


def test_torchs_own_transformer_states_its_width() -> None:
    class Translates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.net = nn.Embedding(9, 16), nn.Transformer(16, 2, 1, 1, 24, batch_first=True)
            self.head = nn.Linear(16, 9)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return self.head(self.net(self.words(source), self.words(target)))

    torch.manual_seed(0)
    model, inputs = Translates().eval(), (torch.randint(9, (2, 5)), torch.randint(9, (2, 4)))
    fp.global_prune(model, "magnitude", 0.4, granularity="channel", example_inputs=inputs)
    small = fp.shrink(model, inputs)
    assert small.net.d_model == small.words.embedding_dim < 16
    more = (torch.randint(9, (3, 7)), torch.randint(9, (3, 6)))
    torch.testing.assert_close(small(*more), model(*more), rtol=1e-4, atol=1e-5)


def test_tensors_that_a_module_keeps_are_no_sizes() -> None:
    class Keeps(nn.Module):
        """Its state of one call is there for the next."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.heads, self.state = nn.Linear(4, 8), nn.Linear(8, 2), 2, None

        def forward(self, x: Tensor) -> Tensor:
            self.state = self.a(x).detach()
            return self.b(self.a(x).unflatten(-1, (self.heads, -1)).flatten(-2))

    torch.manual_seed(0)
    model, x = Keeps().double(), torch.randn(3, 4, dtype=torch.double)
    model(x)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    small = fp.shrink(model, x)
    assert small.a.out_features == 4
    torch.testing.assert_close(small(x), model(x))
