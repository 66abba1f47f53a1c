"""A gradient that comes without a graph would be missing in H·g: never without a word."""

import pytest
import torch
from torch import nn

import torch_flowprune as fp


class Detached(torch.autograd.Function):
    """Its derivative is computed outside of autograd, as some kernels do it."""

    @staticmethod
    def forward(ctx, values):
        ctx.values = values.detach()
        return values.detach() ** 3

    @staticmethod
    def backward(ctx, grad):
        return (3 * ctx.values**2 * grad).detach()


class Straight(torch.autograd.Function):
    """Whose gradient is the one that comes: it has a graph."""

    @staticmethod
    def forward(ctx, values):
        return values.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Flat(torch.autograd.Function):
    """Whose gradient is zero, without a graph: nothing is lost."""

    @staticmethod
    def forward(ctx, values):
        return values.sign()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


class Cut(nn.Module):
    def __init__(self, function=Detached):
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.function.apply(self.first(x)))


@pytest.mark.parametrize("batches", [1, 2])
def test_a_backward_that_leaves_the_graph_is_named(batches):
    torch.manual_seed(0)
    data = [(torch.randn(6, 4), torch.tensor([0, 1] * 3))] * batches
    with pytest.raises(RuntimeError, match="DetachedBackward computes its gradient outside of autograd's graph"):
        fp.flow(Cut(), data, needs=("Hg",))
    assert fp.flow(Cut(), data, needs=("g",)).g


@pytest.mark.parametrize("function", [Straight, Flat])
def test_functions_that_lose_nothing(function):
    model = Cut(function)
    assert fp.flow(model, [(torch.randn(6, 4), torch.tensor([0, 1] * 3))], needs=("Hg",)).Hg
