"""Channels that only masked weights read go with what makes them, and with what that alone reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torch_flowprune as fp


def chain() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 4, 1)]
    return nn.Sequential(*layers).eval(), torch.randn(2, 3, 10, 10)


def masked_inputs(weight: Tensor, positions: list[int]) -> Tensor:
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[:, positions] = False
    return keep


def test_channels_that_only_masked_weights_read_go() -> None:
    model, x = chain()
    fp.apply_masks(model, {"3.weight": masked_inputs(model[3].weight, [0, 1, 2])})
    small = fp.shrink(model, x)
    assert [small[at].weight.shape[0] for at in (0, 1, 3, 5)] == [5, 5, 6, 4]
    torch.testing.assert_close(small(x), model(x))


def test_and_so_do_channels_that_these_alone_read() -> None:
    """The last layer reads one of six channels, and that is made of two of eight."""
    model, x = chain()
    rows = torch.ones_like(model[3].weight, dtype=torch.bool)
    rows[2, [0, 1, 2, 3, 4, 5]] = False
    fp.apply_masks(model, {"5.weight": masked_inputs(model[5].weight, [0, 1, 3, 4, 5]), "3.weight": rows})
    small = fp.shrink(model, x)
    assert [small[at].weight.shape[0] for at in (0, 3, 5)] == [2, 1, 4]
    torch.testing.assert_close(small(x), model(x))
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small.train()(x).square().mean().backward()
    optimizer.step()


def test_channels_that_are_read_otherwise_too_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(h) + (h * self.b(x)).sum(-1, keepdim=True)

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 5)
    fp.apply_masks(model, {"c.weight": masked_inputs(model.c.weight, [0, 1, 2])})
    with pytest.warns(UserWarning, match="no channel is dead"):
        small = fp.shrink(model, x)
    assert small.a.out_features == 8
    torch.testing.assert_close(small(x), model(x))


def test_weights_that_start_at_zero_are_no_masks() -> None:
    """Of a model without masks exact zeros count as masked, but what a layer of zeros reads stays."""
    model, x = chain()
    nn.init.zeros_(model[3].weight[:, :4])
    assert fp.shrink(model, x)[0].out_channels == 8
    nn.init.zeros_(model[5].weight)
    assert fp.shrink(model, x)[3].out_channels == 6


def test_a_layer_of_which_nothing_is_read_keeps_its_channels() -> None:
    model, x = chain()
    fp.apply_masks(model, {"3.weight": torch.zeros_like(model[3].weight, dtype=torch.bool)})
    with pytest.warns(UserWarning, match="no channel is dead"):
        assert fp.shrink(model, x)[0].out_channels == 8


def test_a_head_that_only_training_gives_out_is_an_output() -> None:
    """It is computed in eval mode too, where nobody gets it."""

    class Supervised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
            self.early, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x).relu()
            early, last = self.early(h), self.head(self.body(h).relu())
            return torch.stack([early, last]) if self.training else last

    torch.manual_seed(0)
    model, x = Supervised().eval(), torch.randn(2, 3, 8, 8)
    assert not any(
        one.parameter == "early.weight" and one.axis == 0 for g in fp.couple(model, x).groups for one in g.slices
    )
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    small = fp.shrink(model, x)
    assert small.stem.out_channels < 8
    torch.testing.assert_close(small.train()(x), model.train()(x))


def test_operators_without_a_rule_are_named_where_they_keep_dead_channels() -> None:
    """As those that a quantizer puts between the layers once channels are masked."""

    class Quantized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)

    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    model.insert(1, Quantized())
    with pytest.warns(UserWarning, match="without a rule keep the channels that they touch: fake_quantize_per_tensor"):
        assert fp.shrink(model, x)[0].out_features == 8
