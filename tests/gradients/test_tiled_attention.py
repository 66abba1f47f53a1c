"""Attention in tiles: torch's plain attention to the third derivative, in memory that grows with the sequence."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_flowprune as fp
from torch_flowprune.gradients.batches.memory_budget import Peak
from torch_flowprune.gradients.operators import attention_tiles, twice_differentiable
from torch_flowprune.gradients.operators.tiled_attention import attention_of_long_sequences, tiled_attention

DOUBLE = torch.float64
SHAPES = {  # samples, heads, heads of keys, queries, keys, elements, elements of values
    "square": (2, 4, 4, 7, 7, 3, 3),
    "grouped heads, more keys": (2, 4, 2, 5, 9, 3, 5),
    "more queries": (1, 6, 6, 9, 4, 2, 2),
}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_tiles, "_IN_CACHE", 40)
    monkeypatch.setattr(attention_tiles, "_FEWEST_QUERIES", 3)


def _mask(kind, samples, heads, queries, keys):
    masks = {
        "bool": lambda: torch.rand(queries, keys) > 0.3,
        "a query that sees nothing": lambda: (torch.rand(samples, 1, queries, keys) > 0.3).index_fill(
            2, torch.tensor([1]), value=False
        ),
        "infinite": lambda: torch.randn(samples, 1, 1, keys, dtype=DOUBLE).index_fill(3, torch.tensor([1]), -torch.inf),
        "a query to which all is infinite": lambda: torch.randn(queries, keys, dtype=DOUBLE).index_fill(
            0, torch.tensor([1]), -torch.inf
        ),
        "learned": lambda: torch.randn(1, heads, queries, keys, dtype=DOUBLE, requires_grad=True),
        "learned by sample": lambda: torch.randn(samples, heads, queries, keys, dtype=DOUBLE, requires_grad=True),
        "learned by key": lambda: torch.randn(heads, 1, keys, dtype=DOUBLE, requires_grad=True),
    }
    return masks[kind]() if kind in masks else None


MASKS = ["none", "causal", "bool", "a query that sees nothing", "infinite", "a query to which all is infinite",
         "learned", "learned by sample", "learned by key"]  # fmt: skip


def _operands(shape, requires_grad=(True, True, True)):
    samples, heads, of_keys, queries, keys, width, of_values = SHAPES[shape]
    sizes = (samples, heads, queries, width), (samples, of_keys, keys, width), (samples, of_keys, keys, of_values)
    return [
        torch.randn(*size, dtype=DOUBLE, requires_grad=live) for size, live in zip(sizes, requires_grad, strict=True)
    ]


def _derivatives(attention, operands, third):
    """Value, gradients, their derivative along vectors, and the gradients of that."""
    torch.manual_seed(1)
    out = attention(*operands)
    live = [operand for operand in operands if operand.requires_grad]
    dy = torch.linspace(-1, 1, out.numel(), dtype=DOUBLE).view(out.shape).requires_grad_()
    grads = torch.autograd.grad(out, live, dy, create_graph=True)
    along = [torch.randn(grad.shape, dtype=DOUBLE) for grad in grads]
    product = torch.autograd.grad(grads, [dy, *live], along, create_graph=third)
    cubic = torch.autograd.grad(sum(part.square().sum() for part in product), live) if third else ()
    return [out, *grads, *product, *cubic]


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize(("shape", "mask", "scale"), [*itertools.product(SHAPES, MASKS, [None, 0.3])])
@pytest.mark.usefixtures("small_tiles")
def test_every_derivative_is_that_of_plain_attention(shape, mask, scale, third):
    torch.manual_seed(0)
    samples, heads, of_keys, queries, keys, *_ = SHAPES[shape]
    given = _mask(mask, samples, heads, queries, keys)
    options = {"is_causal": mask == "causal", "scale": scale, "enable_gqa": heads != of_keys}
    operands = [*_operands(shape), *([] if given is None else [given])]

    def ours(q, k, v, m=None):
        return tiled_attention(q, k, v, attn_mask=m, **options)

    def plain(q, k, v, m=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m, **options)

    found = _derivatives(ours, operands, third)
    with sdpa_kernel(SDPBackend.MATH):
        expected = _derivatives(plain, operands, third)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("live", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("third", [False, True])
def test_operands_that_want_no_gradient(live, third):
    torch.manual_seed(0)
    operands = _operands("square", live)
    dy = torch.randn(2, 4, 7, 3, dtype=DOUBLE, requires_grad=True)

    def product(attention):
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(attention(*operands), operands[live.index(True)], dy, create_graph=True)
        return torch.autograd.grad(grads[0].square().sum(), dy, create_graph=third)[0]

    assert torch.allclose(product(tiled_attention), product(F.scaled_dot_product_attention), rtol=1e-12)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_operands_that_are_made_of_one_another(weighed):
    """And a gradient of the output that is made of it, or of nothing: to the third derivative."""
    torch.manual_seed(0)
    x, weights = (torch.randn(2, 2, 7, 7, dtype=DOUBLE, requires_grad=True) for _ in range(2))

    def derivatives(attention):
        key = (x * weights).tanh()
        out = attention(x, key, key * x, attn_mask=key.square())
        (grad,) = torch.autograd.grad(out.exp().sum() if weighed else out.sum(), x, create_graph=True)
        product = torch.autograd.grad(grad.square().sum(), [x, weights], create_graph=True)
        along = [part.detach() for part in product]
        return [grad, *product, *torch.autograd.grad(product, [x, weights], along)]

    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(
            derivatives(tiled_attention), derivatives(F.scaled_dot_product_attention), rtol=1e-9, atol=1e-11
        )


@pytest.mark.usefixtures("small_tiles")
def test_dropout_drops_the_same_in_every_pass():
    torch.manual_seed(0)
    operands = _operands("square")

    def attention(*operands):
        torch.manual_seed(3)
        return tiled_attention(*operands, dropout_p=0.4, is_causal=True)

    def gradients(*operands):
        return torch.autograd.grad(attention(*operands).square().sum(), operands, create_graph=True)

    def product(create_graph):
        grads = gradients(*operands)
        along = [grad.detach() for grad in grads]
        return torch.autograd.grad(grads, operands, along, create_graph=create_graph)

    assert not torch.equal(attention(*operands), tiled_attention(*operands, is_causal=True))
    assert torch.autograd.gradcheck(attention, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(attention, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(gradients, operands, fast_mode=True)
    torch.testing.assert_close(product(create_graph=True), product(create_graph=False), rtol=1e-10, atol=1e-12)


def test_dropout_keeps_its_share_and_its_mean():
    torch.manual_seed(0)
    v = torch.eye(64, dtype=DOUBLE)[None]
    q = torch.zeros(1, 400, 8, dtype=DOUBLE)
    p, again = (tiled_attention(q, q[:, :64], v, dropout_p=0.25) for _ in range(2))
    assert not torch.equal(p, again)
    assert (p == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert p.sum(-1).mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.usefixtures("small_tiles")
def test_every_tile_drops_others():
    q, v = torch.zeros(1, 6, 8, dtype=DOUBLE), torch.eye(40, dtype=DOUBLE)[None]
    first, second = tiled_attention(q, q.new_zeros(1, 40, 8), v, dropout_p=0.5).split(3, 1)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "queries", "keys"), [(5, 7, 7), (3, 2, 4), (9, 3, 3), (1, 20, 12)])
@pytest.mark.usefixtures("small_tiles")
def test_tiles_have_every_place_once_and_take_no_more_than_their_room(heads, queries, keys, causal):
    q, k = torch.empty(heads, queries, 1), torch.empty(heads, keys, 1)
    seen = torch.zeros(heads, queries, keys)
    for at in attention_tiles.Attention(1.0, causal)._tiles(q, k):
        seen[at] += 1
        assert seen[at].numel() <= 40 or (seen[at].shape[0] == 1 and seen[at].shape[1] <= 3)
    visible = torch.ones(queries, keys).tril() if causal else torch.ones(queries, keys)
    assert (seen[:, visible > 0] == 1).all()
    assert seen.max() == 1
    assert not causal or queries < 7 or (seen == 0).any(), "what no query of a tile sees is left out"


class _Minded(torch.Tensor):
    """Of a class that has ways of its own with torch's functions."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((torch.ones(1, 4, 2), torch.ones(1, 4, 3), torch.ones(1, 4, 3)), {}),
        ((torch.ones(2, 4, 2), torch.ones(3, 4, 2), torch.ones(3, 4, 2)), {}),
        ((torch.ones(4, 4, 2), torch.ones(3, 4, 2), torch.ones(3, 4, 2)), {"enable_gqa": True}),
        ((torch.ones(1, 4, 2), torch.ones(2, 3, 2), torch.ones(2, 3, 2)), {"enable_gqa": True}),
        ((torch.ones(1, 4, 2).double(), torch.ones(1, 4, 2), torch.ones(1, 4, 2)), {}),
        ((torch.ones(1, 4, 2), torch.ones(1, 5, 2), torch.ones(1, 4, 2)), {}),
        ((torch.ones(1, 4, 2),) * 3, {"attn_mask": torch.ones(4, 3)}),
        ((torch.ones(1, 4, 2),) * 3, {"attn_mask": torch.ones(4)}),
        ((torch.ones(1, 4, 2),) * 3, {"attn_mask": torch.ones(1, 1, 4, 4)}),
        ((torch.ones(1, 4, 2),) * 3, {"attn_mask": torch.ones(4, 4, dtype=torch.long)}),
        ((torch.ones(1, 4, 2),) * 3, {"attn_mask": torch.ones(4, 4), "is_causal": True}),
        ((torch.ones(1, 4, 2),) * 3, {"dropout_p": 1.0}),
        ((torch.ones(1, 0, 2),) * 3, {}),
        ((torch.ones(2),) * 3, {}),
        ((torch.ones(1, 4, 2).to_sparse(),) * 3, {}),
        ((torch.ones(1, 4, 2).as_subclass(_Minded),) * 3, {}),
    ],
)
def test_what_is_left_to_torch(arguments, options):
    assert tiled_attention(*arguments, **options) is None


def test_transforms_of_functions_are_left_to_torch():
    found = []
    torch.vmap(lambda q: found.append(tiled_attention(q, q, q)) or q)(torch.ones(2, 4, 2))
    assert found == [None]


@pytest.mark.parametrize("autocast", [False, True])
def test_few_digits_are_computed_in_more(autocast):
    torch.manual_seed(0)
    q = torch.randn(1, 2, 5, 4, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), sdpa_kernel(SDPBackend.MATH):
        found, expected = tiled_attention(q, q, q), F.scaled_dot_product_attention(q, q, q)
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    wide = q.bfloat16().float()
    assert torch.equal(found, tiled_attention(wide, wide, wide).bfloat16())
    mask = torch.randn(5, 5)  # in more digits than the operands
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(tiled_attention(q, q, q, mask), tiled_attention(wide, wide, wide, mask).bfloat16())


def test_autocast_leaves_float64_alone():
    q = torch.randn(1, 2, 5, 4, dtype=DOUBLE)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiled_attention(q, q, q).dtype is F.scaled_dot_product_attention(q, q, q).dtype is DOUBLE


class _Encoder(nn.Module):
    def __init__(self, layer=None):
        super().__init__()
        self.layer = layer or nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.layer(x).mean(1))


def test_short_sequences_keep_their_matrix():
    """It takes no more than the operands do, and making it again takes time."""
    q, k = torch.randn(1, 2, 16, 4), torch.randn(1, 2, 17, 4)
    assert attention_of_long_sequences(q, q, q) is None
    assert attention_of_long_sequences(q, k, k) is not None
    assert attention_of_long_sequences(query=k, key=k, value=k, is_causal=True) is not None


def test_attention_of_torchs_modules_is_in_tiles(monkeypatch):
    """What a function of torch's calls inside is seen too."""
    torch.manual_seed(0)
    calls, double_backward = [], attention_tiles.Attention.double_backward

    def counted(self, *arguments):
        calls.append(1)
        return double_backward(self, *arguments)

    monkeypatch.setattr(attention_tiles.Attention, "double_backward", counted)
    model, data = _Encoder().double(), [(torch.randn(4, 20, 8).double(), torch.tensor([0, 1, 2, 0]))]
    found = fp.flow(model, data, loss=F.cross_entropy, needs=("g", "Hg"))
    assert calls
    plain = copy.deepcopy(model).eval()
    parameters = dict(plain.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(plain(data[0][0]), data[0][1])
        grads = torch.autograd.grad(loss, [*parameters.values()], create_graph=True)
        along = [grad.detach() for grad in grads]
        products = torch.autograd.grad(grads, [*parameters.values()], along)
    for name, product in zip(parameters, products, strict=True):
        assert torch.allclose(found.Hg[name], product, rtol=1e-10, atol=1e-12)


def test_a_loss_that_takes_gradients_itself():
    """As critics are trained, whose H·g is a third derivative."""
    torch.manual_seed(0)
    model, x, y = _Encoder().double().eval(), torch.randn(3, 20, 8, dtype=DOUBLE), torch.tensor([0, 1, 2])

    def penalised(model, batch):
        inputs = batch[0].clone().requires_grad_()
        out = model(inputs)
        (slope,) = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return F.cross_entropy(out, batch[1]) + slope.square().mean()

    found = fp.flow(model, (x, y), closure=penalised)
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(penalised(model, (x, y)), parameters, create_graph=True)
        products = torch.autograd.grad(g, parameters, [value.detach() for value in g])
    for name, product in zip(found.theta, products, strict=True):
        torch.testing.assert_close(found.Hg[name], product, rtol=1e-8, atol=1e-10)


def _bytes_of_a_product(tokens):
    torch.manual_seed(0)
    x = torch.randn(1, 2, tokens, 8, requires_grad=True)
    with Peak() as memory, twice_differentiable():
        out = F.scaled_dot_product_attention(x, x, x)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        torch.autograd.grad(grad, x, grad.detach())
    return memory.peak


def test_memory_grows_with_the_sequence(monkeypatch):
    monkeypatch.setattr(attention_tiles, "_IN_CACHE", 2**10)
    few, many = _bytes_of_a_product(128), _bytes_of_a_product(1280)
    assert many < 12 * few
    monkeypatch.setattr(attention_tiles, "_IN_CACHE", 2**30)  # one tile: whole matrices
    assert _bytes_of_a_product(1280) > 40 * few
