"""Rows 9 of docs/explanation/host.md.

Operators that have no second derivative, models that change under their own feet, zero scores.
"""

from __future__ import annotations

import pytest
import torch
from hosts import pruned
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of

ROWS = {
    "9.1": (
        "fused attention has no second derivative",
        "handled",
        "H·g runs the forward with attention in tiles, in memory linear in the sequence",
    ),
    "9.2": (
        "the switches for it are global, or too late",
        "handled",
        "a context around the forward and the loss alone. No switch is left changed",
    ),
    "9.3": (
        "forward mode lacks fused attention and more",
        "handled",
        "not used: reverse over reverse",
    ),
    "9.4": (
        "`hardsigmoid` has no second derivative",
        "handled",
        "computed as the `relu6` it is, for H·g only",
    ),
    "9.5": (
        "forward over reverse lacks silu, mish, group norm, recurrent layers",
        "handled",
        "as 9.3. Each is tested against differences of gradients",
    ),
    "9.6": (
        "`torch.func` and batch norm in train mode",
        "handled",
        '`mode="train"` works and leaves no trace in the statistics',
    ),
    "9.7": (
        "LeViT and others keep attention biases with a graph in eval mode",
        "handled",
        (
            "every scoring pass starts from train mode, which clears them. Where a call of this package changes "
            "masks or loads a state, modules in eval mode that have a `train` or `eval` of their own are put "
            "through train mode and back"
        ),
    ),
    "9.8": (
        "operators marked `once_differentiable`",
        "refused",
        "the error says what to do. `torch.autograd.grad` alone returns 0 in silence",
    ),
    "9.9": (
        "zero-initialised branches score exactly 0; a loss that overflows",
        "handled",
        "`TiedScoresWarning` says so. A loss that is not finite is an error",
    ),
    "9.10": (
        "masked entries have no gradient",
        "documented",
        "they are exactly 0 in `g` and `H·g`. A pruned weight scores lowest, and is no candidate",
    ),
    "9.11": (
        (
            "batch and instance norms of one sample on a CPU: wrong gradients where input and gradient differ in "
            "layout (a transpose after the norm)"
        ),
        "handled",
        "the gradient gets the layout of the input. A probe finds out whether this torch has the fault",
    ),
    "9.12": (
        "the second derivative of the fused weight norm is wrong",
        "handled",
        "computed as `g v / ‖v‖`, for H·g only",
    ),
    "9.13": (
        "activation checkpointing runs blocks again",
        "handled",
        "they run with the same operators as the first time. Reentrant checkpoints are refused",
    ),
}

TOKENS = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def square(output, target):
    return (output[0] if isinstance(output, tuple) else output).square().mean()


def gradient(model, inputs):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(square(model(inputs), None), parameters)


def assert_hg_is_right(model, inputs, mode="eval"):
    """H·g by the flow against two gradients a small step apart."""
    model.train(mode == "train")
    found = fp.flow(model, (inputs, torch.zeros(len(inputs))), loss=square, mode=mode)
    along, step = gradient(model, inputs), 1e-5
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), along, strict=True):
                parameter.add_(direction, alpha=sign * step)
        sides.append(gradient(model, inputs))
        with torch.no_grad():
            for parameter, direction in zip(model.parameters(), along, strict=True):
                parameter.sub_(direction, alpha=sign * step)
    for name, plus, minus in zip(found.Hg, *sides, strict=True):
        torch.testing.assert_close(found.Hg[name], (plus - minus) / (2 * step), rtol=1e-4, atol=1e-7)


class Attention(nn.Module):
    """Fused attention, in which a default ViT of timm has no second derivative."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v)


def test_row_9_1_and_9_2_fused_attention():
    model = Attention().double()
    grads = torch.autograd.grad(square(model(TOKENS), None), list(model.parameters()), create_graph=True)
    norm = sum(grad.square().sum() for grad in grads)
    with pytest.raises(RuntimeError, match="is not implemented"):
        norm.backward()
    before = torch.backends.cuda.flash_sdp_enabled()
    assert_hg_is_right(model, TOKENS)
    assert torch.backends.cuda.flash_sdp_enabled() == before
    assert_hg_is_right(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True).double(), TOKENS, "train")


class Recurrent(nn.LSTM):
    def __init__(self):
        super().__init__(8, 4)

    def forward(self, x):
        return super().forward(x)[0]


OPERATORS = {
    "9_4 hardsigmoid": (nn.Hardsigmoid(), TOKENS),
    "9_4 hardswish": (nn.Hardswish(), TOKENS),
    "9_3 and 9_5 silu": (nn.SiLU(), TOKENS),
    "9_5 mish": (nn.Mish(), TOKENS),
    "9_5 gelu": (nn.GELU(), TOKENS),
    "9_5 lstm": (Recurrent(), TOKENS),
    "9_5 group norm": (nn.GroupNorm(2, 4), IMAGES),
    "9_6 batch norm": (nn.BatchNorm2d(4), IMAGES),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_row_9_3_to_9_6_operators(case):
    layer, inputs = OPERATORS[case]
    first = nn.Linear(8, 8) if inputs is TOKENS else nn.Conv2d(4, 4, 2)
    model = nn.Sequential(first, layer).double()
    for mode in ("eval", "train"):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        found = fp.flow(model, (inputs, torch.zeros(2)), loss=square, mode=mode)
        assert all(value.isfinite().all() for value in found.Hg.values())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), (
            "no trace, batch statistics included"
        )
    assert_hg_is_right(model, inputs)


class Caching(nn.Module):
    """In eval mode keeps what it computed from its weight, with its graph, as LeViT keeps attention biases."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.cache = None

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = None
        return self

    def forward(self, x):
        if self.training:
            return functional.linear(x, self.layer.weight)
        if self.cache is None:
            self.cache = self.layer.weight * 1
        return functional.linear(x, self.cache)


def test_row_9_7_caches_of_eval_mode():
    model = Caching().double().eval()
    model(TOKENS).sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        model(TOKENS).sum().backward()
    data = [(part, torch.zeros(1)) for part in TOKENS.split(1)]
    with pytest.warns(UserWarning, match="does not reach layer.bias"):
        found = fp.flow(model, data, loss=square)
    assert found.Hg["layer.weight"].any()
    pruned(model)
    assert torch.equal(model(TOKENS), functional.linear(TOKENS, model.layer.weight)), (
        "not the cache of the dense weight"
    )


@pytest.mark.slow
def test_row_9_7_levit():
    timm = pytest.importorskip("timm")
    model = timm.create_model("levit_128s", num_classes=3, img_size=224).eval()
    images = [(torch.randn(1, 3, 224, 224), torch.tensor([label])) for label in (0, 1)]
    assert fp.flow(model, images).samples == 2


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


def test_row_9_8_an_operator_without_second_derivative():
    class Model(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x))

    model = Model(8, 8).double()
    with pytest.raises(
        RuntimeError, match="an operator of this model has none: use a measure that reads only g.*once_differentiable"
    ):
        fp.flow(model, (TOKENS, torch.zeros(2)), loss=square)
    assert fp.flow(model, (TOKENS, torch.zeros(2)), loss=square, needs=("g",)).g["weight"].any()


def test_row_9_9_zero_scores_are_told():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    nn.init.zeros_(model[2].weight)
    with pytest.warns(fp.TiedScoresWarning, match="zero-initialised branch or head.*train a little first"):
        fp.global_prune(model, "loss_preservation", sparsity=0.5, data=(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))


def test_row_9_9_a_loss_that_overflows_is_an_error():
    model = nn.Linear(8, 3)
    with torch.no_grad():
        model.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"the loss of batch 0 is (nan|inf): scores would mean nothing .*mode='train'"):
        fp.global_prune(model, "grasp", sparsity=0.5, data=(torch.ones(2, 8) * 10, torch.tensor([0, 1])))


def test_row_9_10_masked_entries_have_no_gradient():
    model = pruned(nn.Linear(8, 3))
    found = fp.flow(model, (torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))
    gone = parameters_of(model)["weight"].mask == 0
    assert not found.g["weight"][gone].any()
    assert not found.Hg["weight"][gone].any()


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.norm(x).flatten(2).transpose(1, 2)).tanh()


def test_row_9_11_norms_of_one_sample():
    model = Transposed().double()
    ones = [(image, torch.zeros(1)) for image in IMAGES.split(1)]
    found, whole = (fp.flow(model, data, loss=square) for data in (ones, (IMAGES, torch.zeros(2))))
    for kind in ("g", "Hg"):
        torch.testing.assert_close(found.tensors(kind), whole.tensors(kind))


def test_row_9_12_weight_norm():
    assert_hg_is_right(
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh()).double(), TOKENS
    )


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_row_9_13_checkpointed_blocks():
    assert_hg_is_right(Checkpointed(nn.Linear(8, 8), nn.Hardswish(), nn.Linear(8, 8)).double(), TOKENS)
