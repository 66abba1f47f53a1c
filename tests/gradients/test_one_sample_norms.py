"""Gradients of norms in every layout that transposes, expansions and channels_last make, against plain arithmetic."""

import itertools

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.gradients.operators.double_backward import twice_differentiable
from torch_flowprune.gradients.operators.one_sample_norms import _layouts_are_mixed_up, sound_norms

CPU = torch.device("cpu")
MEAN, VAR = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([0.5, 2.0, 1.5]).double()


def by_channel(values):
    return values.view(1, -1, 1, 1)


def normalized(x, mean, var, w, b):
    return (x - mean) / (var + 1e-5).sqrt() * by_channel(w) + by_channel(b)


def over(x, axes):
    return x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)


# What is called, and what it is defined to be.
NORMS = {
    "batch norm in eval": (
        lambda x, w, b: F.batch_norm(x, MEAN, VAR, w, b),
        lambda x, w, b: normalized(x, by_channel(MEAN), by_channel(VAR), w, b),
    ),
    "batch norm in train": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        lambda x, w, b: normalized(x, *over(x, (0, 2, 3)), w, b),
    ),
    "instance norm": (
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        lambda x, w, b: normalized(x, *over(x, (2, 3)), w, b),
    ),
}


def layouts(values):
    """Equal shapes, in every order of axes in memory; and values that are the same along an axis or along all."""
    for order in itertools.permutations(range(4)):
        back = [order.index(axis) for axis in range(4)]
        yield values.permute(order).contiguous().permute(back)
    for axis in range(4):
        yield values.narrow(axis, 0, 1).expand_as(values)
    yield values[:1, :1, :1, :1].expand_as(values)


def in_some_layouts(count, inputs):
    """Every layout of the gradient against some of the input: contiguous, channels_last, and a transpose of places."""
    torch.manual_seed(0)
    x, dy = torch.randn(count, 3, 2, 3, dtype=torch.float64), torch.randn(count, 3, 2, 3, dtype=torch.float64)
    for order in inputs:
        laid_out = x.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
        for gradient in layouts(dy):
            yield laid_out, gradient


def assert_derivatives(norm, context, count, inputs):
    call, definition = NORMS[norm]
    for x, dy in in_some_layouts(count, inputs):
        operands = [x.detach().requires_grad_(), torch.rand(3).double().requires_grad_(), MEAN.clone().requires_grad_()]
        found, expected = derivatives(call, operands, dy, context), derivatives(definition, operands, dy, context)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def derivatives(call, operands, dy, context):
    """The gradient, and its derivative along a vector."""
    with context():
        grads = torch.autograd.grad(call(*operands), operands, dy, create_graph=True)
        along = [torch.linspace(-1, 1, grad.numel(), dtype=torch.float64).view(grad.shape) for grad in grads]
        return [*grads, *torch.autograd.grad(grads[:2], operands[:2], along[:2], allow_unused=False)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("ours", [False, True], ids=["gradients", "gradients differentiated again"])
def test_every_layout(norm, count, ours):
    def context():
        return twice_differentiable() if ours and norm == "batch norm in eval" else sound_norms(CPU)

    assert_derivatives(norm, context, count, [(0, 1, 2, 3), (0, 2, 3, 1), (2, 0, 3, 1)])


@pytest.mark.skipif(not _layouts_are_mixed_up(), reason="this torch has not the fault")
def test_the_probe_finds_the_fault_of_this_torch():
    """Plain torch is wrong where the probe says so: else the guard would be for nothing."""
    with pytest.raises(AssertionError):
        assert_derivatives("batch norm in eval", torch.enable_grad, 1, [(0, 1, 2, 3)])


class Stem(nn.Module):
    """What every hybrid transformer begins with: a convolution, a norm, and places as tokens."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return self.out(self.mix(tokens).tanh().mean(1))


@pytest.fixture
def stem():
    torch.manual_seed(0)
    model = Stem().double()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


def images(count):
    torch.manual_seed(1)
    return torch.randn(count, 3, 7, 7, dtype=torch.float64), torch.arange(count) % 3


def test_batches_of_one_sample_are_one_batch_of_all(stem):
    x, y = images(4)
    whole, ones = fp.flow(stem, (x, y)), fp.flow(stem, [(x[i : i + 1], y[i : i + 1]) for i in range(4)])
    oracles.assert_named_close(ones.g, whole.g)
    oracles.assert_named_close(ones.Hg, whole.Hg)


def test_the_squares_of_sample_gradients(stem):
    x, y = images(3)
    found = fp.flow(stem, (x, y), needs=("g2_sample",)).g2_sample
    stem.norm = _Defined(stem.norm)
    losses = F.cross_entropy(stem(x), y, reduction="none")
    of_samples = [torch.autograd.grad(loss, list(stem.parameters()), retain_graph=True) for loss in losses]
    squares = (sum(grad**2 for grad in grads) / 3 for grads in zip(*of_samples, strict=True))
    oracles.assert_named_close(found, dict(zip(found, squares, strict=True)))


class _Defined(nn.Module):
    """A batch norm in eval mode by its definition."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.statistics = norm.weight, norm.bias, (norm.running_mean, norm.running_var)

    def forward(self, x):
        mean, var = map(by_channel, self.statistics)
        return normalized(x, mean, var, self.weight, self.bias)


def test_synflow_runs_one_sample(stem):
    """|∂R/∂|θ|| on an input of ones, on a copy that is made of absolute values."""
    found = fp.flow(stem, needs=("gR",), example_inputs=torch.ones(2, 3, 7, 7, dtype=torch.float64)).gR
    with torch.no_grad():
        for value in stem.state_dict().values():
            value.abs_()
    stem.norm = _Defined(stem.norm)
    total = stem(torch.ones(1, 3, 7, 7, dtype=torch.float64)).sum()
    expected = dict(zip(found, torch.autograd.grad(total, list(stem.parameters())), strict=True))
    oracles.assert_named_close(found, expected)
