"""Channels that a module's code cannot do without stay, masked, and the others go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torch_flowprune as fp


class Call:
    """Code in an object that is no module, which takes the width of values for that of keys."""

    def __call__(self, owner: nn.Module, x: Tensor) -> Tensor:
        q, k, v = owner.q(x), owner.k(x), owner.v(x)
        v = v.view(len(x), -1, 1, k.shape[-1]).transpose(1, 2)
        return functional.scaled_dot_product_attention(q[:, None], k[:, None], v)[:, 0]


class Calls(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.call = Call()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.call(self, x))


class Aligned(nn.Linear):
    """A kernel that takes multiples of eight alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 8:
            raise RuntimeError("strides should be multiple of 16 bytes")
        return super().forward(x)


def pruned(model: nn.Module, x: Tensor, sparsity: float) -> nn.Module:
    fp.global_prune(model, "magnitude", sparsity, granularity="channel", scope="layer", example_inputs=x)
    return model


def test_groups_of_code_that_cannot_take_them_stay_and_the_warning_says_so() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.double)
    model = pruned(nn.Sequential(nn.Linear(6, 16), Calls(16), nn.Linear(16, 3)).double().eval(), x, 0.5)
    with pytest.warns(
        UserWarning, match=r"8 dead channels of 1 groups \(1.v.weight\) stay, masked, as the model's own"
    ):
        small = fp.shrink(model, x)
    assert (small[0].out_features, small[1].v.out_features, small[1].out.out_features) == (8, 16, 8)
    assert set(fp.masks(small)) == {"1.v.weight", "1.v.bias", "1.out.weight"}
    for batch, length in ((2, 5), (3, 4)):
        x = torch.randn(batch, length, 6, dtype=torch.double)
        torch.testing.assert_close(small(x), model(x))


def test_as_many_stay_as_a_kernel_needs() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    model = pruned(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), Aligned(24, 12), nn.Linear(12, 3)).eval(), x, 0.5)
    with pytest.warns(UserWarning, match=r"dead channels of \d groups .* stay, masked, as .*multiple of 16 bytes"):
        small = fp.shrink(model, x)
    assert small[2].in_features == 16
    torch.testing.assert_close(small(x), model(x))
    with pytest.warns(UserWarning, match="stay, masked"):
        again = fp.shrink(pruned(small, x, 0.6), x)
    assert again[2].in_features == 8
    torch.testing.assert_close(again(x), small(x))


def test_where_nothing_else_would_go_it_is_an_error_that_changes_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6)

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if h.shape[1] != 8:
                raise RuntimeError("eight and no other")
            return self.b(h)

    model = pruned(nn.Sequential(Fixed()), x, 0.5)
    before = model(x)
    with pytest.raises(fp.channels.ShrinkError, match="eight and no other"):
        fp.shrink(model, x)
    torch.testing.assert_close(model(x), before)
