"""A masked value: bit for bit what `torch.where` gives, with its derivatives, whatever lies under the mask."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from torch_flowprune.inputs import masked
from torch_flowprune.torch_internals import OperatorMode

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)


def value_and_mask(dtype, shape=(8, 6)):
    torch.manual_seed(0)
    value = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32)
    mask = torch.rand(shape) < 0.5
    value.view(-1)[:3], mask.view(-1)[:6] = torch.tensor([float("inf"), float("nan"), -0.0]), False
    return value.to(dtype), mask


def real(value):
    return torch.view_as_real(value) if value.is_complex() else value


def same(one, other):
    return torch.equal(real(one), real(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "gaps"])
def test_bit_for_bit_that_of_where(dtype, layout):
    value, mask = value_and_mask(dtype)
    value = {"rows": value, "columns": value.t().contiguous().t(), "gaps": value.repeat(1, 2)[:, :6]}[layout]
    one, other = value.clone().requires_grad_(), value.clone().requires_grad_()
    got, want = masked(one, mask), torch.where(mask, other, 0)
    upstream = torch.where(mask, 1, float("inf")).to(dtype)
    got.backward(upstream)
    want.backward(upstream)
    assert same(got, want) and same(one.grad, other.grad)
    assert same(masked(value, mask), torch.where(mask, value, 0))
    assert not got[~mask].any() and not torch.signbit(real(got))[~mask].any()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # torch's own, of dual tensors
def test_second_and_forward_derivatives():
    value, mask = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.rand(5, 4) < 0.5
    assert torch.autograd.gradcheck(lambda v: masked(v, mask), value, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda v: masked(v, mask) ** 3, value)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value.detach(), torch.ones(5, 4, dtype=torch.float64))
        assert torch.equal(forward_ad.unpack_dual(masked(dual, mask)).tangent, mask.double())


def test_transforms_of_functions():
    value, mask = torch.randn(3, 5, 4), torch.rand(5, 4) < 0.5
    assert torch.equal(torch.vmap(lambda v: masked(v, mask))(value), torch.where(mask, value, 0))
    grad = torch.func.grad(lambda v: masked(v, mask).square().sum())(value[0])
    assert torch.equal(grad, 2 * torch.where(mask, value[0], 0))


def test_a_graph_has_where():
    seen = []

    class Seen(OperatorMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        masked(torch.randn(4, requires_grad=True), torch.rand(4) < 0.5)
    assert any("where" in name for name in seen) and not any("mul" in name for name in seen)


def test_a_gradient_is_no_view():
    layer, mask = nn.Linear(4, 4), torch.rand(4, 4) < 0.5
    nn.functional.linear(torch.randn(2, 4), masked(layer.weight, mask)).sum().backward()
    layer.weight.grad.detach_()
    assert not layer.weight.grad._is_view()
