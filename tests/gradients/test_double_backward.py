"""The operators of gradients that are differentiated again.

Equal to torch's own, to the second derivative and the third.
"""

import contextlib
import copy

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.gradients.operators.double_backward import _SUBSTITUTES, WeightGradients, twice_differentiable

DOUBLE = {"dtype": torch.float64, "requires_grad": True}


def draw(*shape):
    return torch.randn(*shape, **DOUBLE)


def _norm(x, w, b):
    mean, var = torch.tensor([3.0, -1.0]).double(), torch.tensor([0.5, 2.0]).double()
    return F.batch_norm(x, mean, var, w, b, eps=0.1)


# What is called, and the shapes of x, w and b.
OPERATORS = {
    "linear": (F.linear, (3, 4), (2, 4), (2,)),
    "linear on sequences": (F.linear, (3, 2, 4), (2, 4), (2,)),
    "linear without bias": (lambda x, w, b: F.linear(x, w) + b, (3, 4), (2, 4), (2,)),
    "linear on sequences, written in place": (lambda x, w, b: F.linear(x, w, b).mul_(2), (3, 2, 4), (2, 4), (2,)),
    "conv1d": (lambda *a: F.conv1d(*a, stride=2, padding=1), (2, 2, 6), (3, 2, 3), (3,)),
    "conv2d": (lambda *a: F.conv2d(*a, stride=(1, 2), padding=(1, 0), dilation=2), (2, 2, 5, 5), (3, 2, 2, 2), (3,)),
    "conv2d, grouped": (lambda *a: F.conv2d(*a, groups=2), (2, 4, 3, 3), (4, 2, 2, 2), (4,)),
    "conv2d, depthwise": (
        lambda *a: F.conv2d(*a, None, 1, 1, 1, 3) if len(a) < 3 else F.conv2d(*a, 1, 1, 1, 3),
        (2, 3, 3, 3),
        (3, 1, 3, 3),
        (3,),
    ),
    "conv2d, same": (lambda *a: F.conv2d(*a, padding="same"), (2, 2, 3, 3), (2, 2, 3, 3), (2,)),
    "conv2d, one image": (F.conv2d, (2, 4, 4), (3, 2, 2, 2), (3,)),
    "conv3d": (F.conv3d, (1, 2, 3, 3, 3), (2, 2, 2, 2, 2), (2,)),
    "conv_transpose1d": (lambda *a: F.conv_transpose1d(*a, stride=2), (2, 2, 3), (2, 3, 3), (3,)),
    "conv_transpose1d, padded": (
        lambda *a: F.conv_transpose1d(*a, stride=2, output_padding=1),
        (2, 2, 3),
        (2, 3, 3),
        (3,),
    ),
    "conv_transpose2d": (lambda *a: F.conv_transpose2d(*a, groups=2, padding=1), (2, 4, 3, 3), (4, 1, 2, 2), (2,)),
    "conv_transpose3d": (F.conv_transpose3d, (1, 2, 2, 2, 2), (2, 2, 2, 2, 2), (2,)),
    "batch_norm": (_norm, (3, 2, 2, 2), (2,), (2,)),
    "batch_norm of rows": (_norm, (3, 2), (2,), (2,)),
    "batch_norm without weights": (
        lambda x, w, b: _norm(x, None, None) * w.view(1, -1, 1) + b.view(1, -1, 1),
        (3, 2, 4),
        (2,),
        (2,),
    ),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def derivatives(name, *, ours, frozen=()):
    """Value, gradient, and the gradient's derivative along a vector.

    Of a function nonlinear in the operator's output.
    """
    call, *shapes = OPERATORS[name]
    torch.manual_seed(0)
    operands = [draw(*shape).detach().requires_grad_(i not in frozen) for i, shape in enumerate(shapes)]
    live = [operand for operand in operands if operand.requires_grad]
    with twice_differentiable(values_read=False) if ours else torch.enable_grad():
        value = torch.tanh(call(*operands)).square().sum()
        grads = torch.autograd.grad(value, live, create_graph=True)
    product = torch.autograd.grad(
        grads, live, [torch.randn_like(grad) for grad in grads], create_graph=True, allow_unused=True
    )
    if name == "conv_transpose1d, padded":  # torch has no third derivative of it
        return [value, *grads, *product]
    cubic = sum(part.square().sum() for part in product if part is not None)
    return [value, *grads, *product, *torch.autograd.grad(cubic, live, allow_unused=True)]


@every_operator
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_every_derivative_is_torchs(name, frozen):
    for found, expected in zip(
        derivatives(name, ours=True, frozen=frozen), derivatives(name, ours=False, frozen=frozen), strict=True
    ):
        assert (
            (found is None or not found.any())
            if expected is None
            else torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
        )


@every_operator
def test_the_second_derivative_by_differences(name):
    call, *shapes = OPERATORS[name]
    torch.manual_seed(0)

    def through(*operands):
        with twice_differentiable(values_read=False):
            return torch.tanh(call(*operands))

    operands = tuple(draw(*shape) for shape in shapes)
    assert torch.autograd.gradgradcheck(through, operands, fast_mode=True)


def names_in(output):
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("name", sorted({*OPERATORS} - {"conv2d, same", "conv2d, one image"}))
def test_the_operators_are_in_place(name):
    """Otherwise the tests above would compare torch with itself."""
    call, *shapes = OPERATORS[name]
    with twice_differentiable(values_read=False):
        assert "_ProductBackward" in names_in(call(*(draw(*shape) for shape in shapes)))
    assert "_ProductBackward" not in names_in(call(*(draw(*shape) for shape in shapes)))


def test_every_substitute_is_tried():
    assert (
        len(_SUBSTITUTES) == 4 + 1 + 2 + 6 + 4 + 1
    )  # the last two in test_twice_differentiable_losses, test_tiled_attention
    assert {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)} <= {
        name.split(",")[0] for name in OPERATORS
    }


def test_torchs_own_where_ours_do_not_apply():
    x, w = draw(2, 3, 4, 4), draw(3, 3, 2, 2)
    statistics = torch.zeros(3), torch.ones(3)
    with twice_differentiable(values_read=False):
        with torch.autocast("cpu", torch.bfloat16):
            assert "_ProductBackward" not in names_in(F.conv2d(x.float(), w.float()))
        assert "_ProductBackward" not in names_in(F.batch_norm(x, *map(torch.Tensor.double, statistics), training=True))
        assert "_ProductBackward" not in names_in(F.batch_norm(x, None, None, training=True))
        assert "_ProductBackward" not in names_in(F.batch_norm(x.bfloat16(), *statistics)), "mixed types"
        torch.func.vmap(torch.func.grad(lambda one: F.conv2d(one, w).sum()))(x.detach())


class Penalised(nn.Module):
    """A closure may read values of gradients that it takes itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, x):
        return self.net(x)


def penalty(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.1 * sum(grad.square().sum() for grad in grads)


def by_differences(model, batches, along, step=1e-5):
    """(g(θ + εv) − g(θ − εv)) / 2ε."""
    found = []
    for sign in (step, -step):
        moved = copy.deepcopy(model)
        moved.load_state_dict({name: value + sign * along[name] for name, value in model.state_dict().items()})
        found.append(fp.flow(moved, batches, closure=penalty, needs=("g",), reduction="mean").g)
    return {name: (found[0][name] - found[1][name]) / (2 * step) for name in found[0]}


@pytest.mark.parametrize("sizes", [(6,), (4, 3)])
def test_a_closure_that_takes_gradients_itself(sizes):
    """The value of no gradient is left out where the model's user reads it."""
    torch.manual_seed(0)
    model = Penalised()
    batches = [(torch.randn(size, 4, dtype=torch.float64), torch.arange(size) % 3) for size in sizes]
    found = fp.flow(model, batches, closure=penalty, reduction="mean")
    oracles.assert_named_close(found.Hg, by_differences(model, batches, found.g), 1e-6)


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, lambda layer: _pruned(layer)], ids=["weight norm", "pruned"]
)
def test_weights_that_are_computed(wrap):
    """The gradient of weight norm reads values of the gradient behind it: they are there where a weight is no leaf."""
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = [(torch.randn(size, 4, dtype=torch.float64), torch.arange(size) % 3) for size in (4, 3)]
    several, one = fp.flow(model, batches), fp.flow(model, [tuple(map(torch.cat, zip(*batches, strict=True)))])
    oracles.assert_named_close(several.Hg, one.Hg, 1e-10)


def _pruned(layer):
    fp.global_prune(layer, sparsity=0.5)
    return layer


def test_a_hook_on_a_weight_reads_the_gradients_value(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = [(torch.randn(size, 4, dtype=torch.float64), torch.arange(size) % 3) for size in (4, 3)]
    model[0].weight.register_hook(lambda grad: grad**3)
    found = fp.flow(model, batches)
    monkeypatch.setattr(WeightGradients, "unread", lambda self: contextlib.nullcontext())
    oracles.assert_named_close(found.Hg, fp.flow(model, batches).Hg, 1e-12)
