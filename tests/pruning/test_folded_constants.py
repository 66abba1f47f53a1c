"""What removed channels passed on whatever the input was stays, where that is exact."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp


def with_biases(model):
    """Biases and statistics as training leaves them."""
    torch.manual_seed(1)
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name in ("bias", "running_mean"):
                tensor.data.normal_(0, 0.5)
            elif name == "running_var":
                tensor.data.uniform_(0.5, 2)
    return model.double().eval()


def pruned(model, x, sparsity=0.5):
    model = with_biases(model)
    dense = copy.deepcopy(model)
    fp.global_prune(model, "magnitude", sparsity, granularity="channel", example_inputs=x)
    return dense, model


def weights_alone_at_zero(dense, model):
    """The oracle: rows that are gone are zero, and all else is dense, their biases and the columns behind them too."""
    for name, mask in fp.masks(model).items():
        if name.endswith("weight") and mask.dim() > 1:
            rows_gone = ~mask.flatten(1).any(1)
            dense.get_parameter(name).data[rows_gone] = 0
    return dense


class Gated(nn.Module):
    """What one layer gives times one number for all that the input makes: no constant passes."""

    def __init__(self, size=1.0):
        super().__init__()
        self.a, self.b, self.out, self.size = nn.Linear(6, 8), nn.Linear(6, 1), nn.Linear(8, 3), size

    def forward(self, x):
        return self.out(self.a(x).sigmoid() * self.b(x).tanh() * self.size)


class Branching(nn.Module):
    """A norm is right behind a layer, and is not the only one to read it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, bias=False)
        self.norm, self.out = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.b(self.a(x).sigmoid())
        return self.out((self.norm(h) + h).mean((2, 3)))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.a(x).sigmoid()) + self.out(self.b(x).sigmoid())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.mixed = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x[None]).sigmoid()
        return self.out(self.b(self.mixed(h, h, h)[0]).sigmoid())[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.along, self.b = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.along(self.a(x[None]).sigmoid())[0][0, :, :3] + self.out(self.b(x).sigmoid())


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.matrix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.out(self.b((self.a(x).sigmoid() @ self.matrix).relu()).sigmoid())


class TiedLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.out(self.c(self.b(self.a(x).sigmoid()).sigmoid()).sigmoid())


class NormOverChannels(nn.Module):
    """Zeros pass this norm: with constants in their place it divides by another number."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.out = nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.b(self.norm(self.a(x))).sigmoid())


def image_net(padding, mode="zeros"):
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)]
    last = nn.Conv2d(6, 4, 3, padding=padding, padding_mode=mode)
    return nn.Sequential(*layers, nn.Sigmoid(), last, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


TOKENS, IMAGES = torch.randn(5, 6, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
ALL = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)),
        TOKENS,
    ),
    "convolutions, and a norm behind": (lambda: image_net(0), IMAGES),
    "padded with what is there": (lambda: image_net(1, "replicate"), IMAGES),
    "along time": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 2), nn.Sigmoid(), nn.Conv1d(8, 4, 2), nn.Flatten(), nn.Linear(24, 3)),
        IMAGES[:, :, 0],
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_what_it_was_with_the_weights_alone_at_zero(name):
    build, x = ALL[name]
    dense, model = pruned(build(), x)
    before = model(x)
    folded = fp.fold_constants(model, x)
    assert folded.layers
    assert not folded.left
    other = x.flip(0) * 1.5 + 0.1  # not only for what it was tried with
    torch.testing.assert_close(model(other), weights_alone_at_zero(dense, model)(other), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(x), before)
    small = fp.shrink(model, x)
    torch.testing.assert_close(small(other), model(other), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_a_second_time_nothing_is_added(name):
    build, x = ALL[name]
    _, model = pruned(build(), x)
    fp.fold_constants(model, x)
    once = model(x)
    again = fp.fold_constants(model, x)
    assert max(layer.largest for layer in again.layers) < 1e-12
    assert torch.allclose(model(x), once, rtol=1e-12, atol=1e-12)


LEFT = {
    "zero padding": (lambda: image_net(1), IMAGES, "its padding reads zeros beside the constant"),
    "a gate": (Gated, TOKENS, "what is removed is another value for each input"),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False)),
        TOKENS,
        "it has no bias of its own, and no batch norm right behind",
    ),
    "a norm that is not alone": (Branching, IMAGES, "it has no bias of its own, and no batch norm right behind"),
    "called twice": (CalledTwice, TOKENS, "what is removed is another value for each input"),
    "attention": (Attending, TOKENS, "a MultiheadAttention reads it, beside others or in steps of its own"),
    "recurrent": (Recurrent, TOKENS, "a LSTM reads it, beside others or in steps of its own"),
    "a parameter of one's own": (OwnParameter, TOKENS, "a OwnParameter reads it, beside others or in steps of its own"),
    "tied": (TiedLayers, TOKENS, "several layers have this weight"),
    "a norm over channels": (
        NormOverChannels,
        TOKENS,
        "what is removed reaches more than layers that multiply it, such as a norm over channels",
    ),
    "one sample": (
        ALL["linear"][0],
        TOKENS[:1],
        "the example has one value for each channel: give two samples or more",
    ),
    "a small gate": (lambda: Gated(1e-17), TOKENS, "what is removed is another value for each input"),
}
OTHERS_TAKE = ["attention", "a norm over channels", "tied"]
"""Nets with a layer besides, which takes constants all the same."""


@pytest.mark.filterwarnings("ignore:.*of the weights are in matrices of modules of an unknown kind")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_exact_is_left_with_its_reason(name):
    build, x, reason = LEFT[name]
    _, model = pruned(build(), x)
    before = model(x)
    folded = fp.fold_constants(model, x)
    assert reason in folded.left.values()
    assert bool(folded.layers) or name not in OTHERS_TAKE
    if not folded.layers:
        assert torch.equal(model(x), before)
    small = fp.shrink(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-10)


def test_the_loss_before_and_after_is_told():
    dense, model = pruned(ALL["linear"][0](), TOKENS)
    target = dense(TOKENS).detach()
    data = (TOKENS, target)
    before = F.mse_loss(model(TOKENS), target).item()
    folded = fp.fold_constants(model, data=data, loss=F.mse_loss)
    assert folded.loss_before == pytest.approx(before)
    assert folded.loss_after == pytest.approx(F.mse_loss(model(TOKENS), target).item())
    assert folded.loss_after < folded.loss_before
    assert str(folded).startswith(f"loss {folded.loss_before:.4g} -> {folded.loss_after:.4g}")
    assert "channels into 2.bias, at most" in str(folded)


def test_nothing_but_what_takes_constants_is_touched():
    _, model = pruned(image_net(0), IMAGES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    folded = fp.fold_constants(model, IMAGES)
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    taken = {layer.into for layer in folded.layers}
    columns = {layer.name.replace("weight", "weight_orig") for layer in folded.layers}
    assert {name.removesuffix("_orig") for name in moved} - taken <= {name.removesuffix("_orig") for name in columns}
    assert modes == [module.training for module in model.modules()]
    dense = fp.state_dict(model)
    assert all(torch.equal(dense[name], value) for name, value in fp.state_dict(model).items())


def test_without_masked_channels_it_says_what_to_do():
    model = ALL["linear"][0]().double()
    with pytest.raises(ValueError, match="no channel of this model is masked: prune it with granularity='channel'"):
        fp.fold_constants(model, TOKENS)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_layer_that_computes_its_weight_takes_none_and_others_do(norm):
    """With its columns open its norm would be another: they stay zero, before and after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), norm(nn.Linear(8, 6)), nn.Sigmoid(), nn.Linear(6, 3)).double()
    model, x = model.eval(), torch.randn(5, 4, dtype=torch.float64)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    opened = fp.remove(copy.deepcopy(model))
    gone = (opened[4].weight == 0).all(0)
    opened[4].weight.data[:, gone] = columns = torch.randn(3, int(gone.sum()), dtype=torch.float64)
    model[4].weight_orig.data[:, gone] = columns
    opened[2].bias.data[gone] = model[2].bias_orig.data[gone]
    folded = fp.fold_constants(model, x)
    assert [one.name for one in folded.layers] == ["4.weight"]
    assert list(folded.left.values()) == ["the layer computes its weight from this"]
    assert torch.allclose(model(x), opened(x), atol=1e-12)
