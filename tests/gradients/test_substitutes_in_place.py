"""Operators that are replaced while gradients are differentiated again keep what their own forms do.

Written in place or into ``out=``, with the result used or dropped.
"""

import inspect

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import torch_flowprune as fp
from torch_flowprune.gradients.operators.double_backward import _SUBSTITUTES, twice_differentiable
from torch_flowprune.torch_internals import HARDSIGMOID_IN_PLACE

SIXTH = 1e-7  # torch's own float64 gradient of hardsigmoid, which g is taken by, multiplies by a float32 sixth


def plain(x):
    return (x + 3).clamp(0, 6) / 6


def draw():
    torch.manual_seed(0)
    return [(torch.randn(size, 5, dtype=torch.float64) * 2, torch.arange(size) % 4) for size in (5, 3)]


class Net(nn.Module):
    def __init__(self, between):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.between = nn.Linear(5, 6).double(), nn.Linear(6, 4).double(), between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def result_dropped(call):
    def between(x):
        call(x)
        return x

    return between


def input_read_again(call):
    return lambda x: call(x) * x


IN_PLACE = {
    "functional": lambda x: F.hardsigmoid(x, inplace=True),
    "by position": lambda x: F.hardsigmoid(x, True),
    "module": nn.Hardsigmoid(inplace=True),
    "operator": HARDSIGMOID_IN_PLACE,
}
NOT_IN_PLACE = {"functional": F.hardsigmoid, "module": nn.Hardsigmoid()}


@pytest.mark.parametrize("batches", [draw(), draw()[:1]], ids=["two batches", "one"])
@pytest.mark.parametrize("use", [result_dropped, input_read_again])
@pytest.mark.parametrize("call", IN_PLACE)
def test_in_place(call, use, batches):
    reads_again = use is input_read_again
    expected = oracles.dense(Net(lambda x: plain(x) ** 2 if reads_again else plain(x)), batches)
    found = fp.flow(Net(use(IN_PLACE[call])), batches)
    oracles.assert_named_close(found.g, expected.g, SIXTH)
    oracles.assert_named_close(found.Hg, expected.Hg, SIXTH)
    assert found.loss == pytest.approx(expected.loss)


@pytest.mark.parametrize("call", NOT_IN_PLACE)
def test_not_in_place(call):
    expected = oracles.dense(Net(lambda x: plain(x) * x), draw())
    oracles.assert_named_close(fp.flow(Net(input_read_again(NOT_IN_PLACE[call])), draw()).Hg, expected.Hg, SIXTH)


def test_into_out():
    """Which autograd does not follow: torch's own runs, and writes."""
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with twice_differentiable(), torch.no_grad():
        out = torch.empty(2, 4)
        assert F.linear(x, w, out=out) is out
        torch.testing.assert_close(out, x @ w.T)
        out = torch.empty(2, 3)
        assert torch._C._nn.hardsigmoid(x, out=out) is out
        torch.testing.assert_close(out, plain(x))


def test_every_substitute_of_an_operator_with_such_a_form_takes_it():
    for operator, substitute in _SUBSTITUTES.items():
        names = inspect.signature(substitute).parameters
        assert "out" in names or not _takes_out(operator), operator


def _takes_out(operator):
    """Asked of the operator, as builtin functions have no signature: the error lists what there is."""
    try:
        operator(out=None, never_an_argument=None)
    except TypeError as error:
        return "Tensor out" in str(error)


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 0), ((4, 3), 1), ((4, 3), -1), ((4, 3, 2), 1), ((4, 3, 2), 2)])
def test_the_second_derivative_of_weight_norm(shape, dim):
    torch.manual_seed(0)
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = (torch.norm_except_dim(v.detach(), 2, dim) * 1.3).requires_grad_()
    with twice_differentiable():
        torch.testing.assert_close(torch._weight_norm(v, g, dim), v * g / torch.norm_except_dim(v, 2, dim))

    def through(*operands):
        with twice_differentiable():
            return torch._weight_norm(*operands, dim)

    assert torch.autograd.gradgradcheck(through, (v, g), fast_mode=True)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_against_differences(wrap):
    model = Net(torch.tanh)
    wrap(model.first)
    found, step, sides = fp.flow(model, draw()), 1e-5, []
    for sign in (1, -1):
        moved = Net(torch.tanh)
        wrap(moved.first)
        state = model.state_dict()
        moved.load_state_dict({name: value + sign * step * found.g[name] for name, value in state.items()})
        sides.append(fp.flow(moved, draw(), needs=("g",)).g)
    differences = {name: (sides[0][name] - sides[1][name]) / (2 * step) for name in found.g}
    oracles.assert_named_close(found.Hg, differences, 1e-6)


class Checkpointed(nn.Module):
    def __init__(self, body, **options):
        super().__init__()
        self.body, self.options = body, options

    def forward(self, x):
        return checkpoint(self.body, x, **self.options) if self.options else self.body(x)


def blocks():
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    convolutions = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Hardsigmoid(), nn.Conv2d(4, 3, 3), head]
    images = [(torch.randn(size, 2, 6, 6, dtype=torch.float64), torch.arange(size) % 3) for size in (3, 1)]
    yield nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double(), draw()
    yield nn.Sequential(*convolutions).double(), images


@pytest.mark.parametrize("which", [0, 1], ids=["linear", "convolutions"])
@pytest.mark.parametrize("budget", [{}, {"max_memory": "1GB"}], ids=["two sweeps", "graphs kept"])
@pytest.mark.parametrize("count", [1, 2])
def test_checkpointed_blocks(which, budget, count):
    body, batches = list(blocks())[which]
    expected = fp.flow(Checkpointed(body), batches[:count])
    found = fp.flow(Checkpointed(body, use_reentrant=False), batches[:count], **budget)
    oracles.assert_named_close(found.g, expected.g, SIXTH)
    oracles.assert_named_close(found.Hg, expected.Hg, SIXTH)


def test_reentrant_checkpoints_are_refused_in_words():
    body, batches = next(blocks())
    model = nn.Sequential(nn.Linear(5, 5).double(), Checkpointed(body, use_reentrant=True))
    with pytest.raises(RuntimeError, match="the model checkpoints activations with use_reentrant=True, .* or switch"):
        fp.flow(model, batches)
