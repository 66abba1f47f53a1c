"""Products in float32 of operands that float32 cannot hold: equal to float64's but for the last digits of float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from torch_flowprune.gradients.synflow import narrow_convolutions

PRODUCTS = {
    "conv1d": (lambda x, w, b: functional.conv1d(x, w, b, padding=1), (2, 3, 7), (4, 3, 3), 4),
    "conv2d": (lambda x, w, b: functional.conv2d(x, w, b, 2, 1), (2, 4, 6, 5), (6, 4, 3, 3), 6),
    "conv2d in groups": (
        lambda x, w, b: functional.conv2d(x, weight=w, bias=b, groups=2),
        (1, 4, 6, 5),
        (6, 2, 3, 2),
        6,
    ),
    "conv_transpose2d": (lambda x, w, b: functional.conv_transpose2d(x, w, b, 2), (1, 3, 4, 4), (3, 5, 2, 2), 5),
}


def operands(name, exponents, seed=0):
    """Positive, a few orders of magnitude around powers of two that float32 does not reach."""
    _, shape, weight, outputs = PRODUCTS[name]
    source = torch.Generator().manual_seed(seed)
    make = lambda size, power: torch.randn(size, generator=source, dtype=torch.float64).exp() * 2.0**power
    x, w = make(shape, exponents[0]), make(weight, exponents[1])
    return x, w, make((outputs,), exponents[2])


def gradients(name, inputs):
    leaves = [value.clone().requires_grad_() for value in inputs]
    found = PRODUCTS[name][0](*leaves)
    power = 2.0 ** torch.arange(found.numel(), dtype=torch.float64).view(found.shape).remainder(5)
    return found.detach(), *torch.autograd.grad((found * power * 2.0**-300).sum(), leaves)


@pytest.mark.parametrize("name", PRODUCTS)
@settings(max_examples=20, deadline=None)
@given(
    exponents=st.tuples(st.integers(-400, 400), st.integers(-120, 120), st.integers(-400, 400)),
    sign=st.sampled_from((1, -1)),
    seed=st.integers(0, 9),
)
def test_products_and_their_gradients_are_those_of_float64(name, exponents, sign, seed):
    x, w, b = operands(name, exponents, seed)
    inputs = sign * x, w, sign * b
    expected = gradients(name, inputs)
    with narrow_convolutions():
        found = gradients(name, inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is torch.float64
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    assert not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), (
        "in float32, not in float64"
    )


def test_only_float64_is_narrowed():
    x, w, b = (value.float() for value in operands("conv2d", (0, 0, 0)))
    with narrow_convolutions():
        found = functional.conv2d(x, w, b)
    assert found.dtype is torch.float32
    assert torch.equal(found, functional.conv2d(x, w, b))


def test_what_is_no_convolution_stays_in_float64():
    x, w, mean, var = (torch.rand(size, dtype=torch.float64) for size in ((2, 3, 4), (5, 4), 3, 3))
    with narrow_convolutions():
        found = functional.batch_norm(x, mean, var), functional.linear(x, w)
    assert torch.equal(found[0], functional.batch_norm(x, mean, var))
    assert torch.equal(found[1], functional.linear(x, w))


@pytest.mark.parametrize("special", [0.0, float("inf"), float("nan")])
def test_zeros_and_what_is_not_finite_pass(special):
    x = torch.full((2, 3, 1), special, dtype=torch.float64, requires_grad=True)
    w = torch.ones(1, 3, 1, dtype=torch.float64, requires_grad=True)
    with narrow_convolutions():
        found = functional.conv1d(x, w)
    assert torch.equal(found.isfinite(), torch.full((2, 1, 1), special == 0))
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3, 1, dtype=torch.float64))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_power_is_that_of_the_largest_value_whatever_its_sign(sign):
    x = torch.tensor([[[1.0], [sign * 1e200]]], dtype=torch.float64)
    with narrow_convolutions():
        assert functional.conv1d(x, torch.ones(1, 2, 1, dtype=torch.float64)).item() == pytest.approx(
            sign * 1e200, rel=1e-6
        )


def test_no_samples():
    with narrow_convolutions():
        assert functional.conv1d(
            torch.ones(0, 3, 4, dtype=torch.float64), torch.ones(2, 3, 1, dtype=torch.float64)
        ).shape == (0, 2, 4)


def test_a_frozen_operand_gets_no_gradient():
    x, w, b = operands("conv1d", (0, 0, 0))
    w.requires_grad_()
    with narrow_convolutions():
        functional.conv1d(x, w[..., :1], b).sum().backward()
    torch.testing.assert_close(w.grad[..., 0], x.sum((0, 2)).expand(4, 3), rtol=1e-6, atol=0)
    assert x.grad is None
    assert b.grad is None
