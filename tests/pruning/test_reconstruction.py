"""Kept weights set anew, against the normal equations row by row, and what it is worth to a language model."""

import math
import pydoc_data.topics
from copy import deepcopy

import pytest
import torch
from torch import nn

import torch_flowprune as fp


def solved(dense, mask, bias, rows, damping):
    """min ‖(W − W₀)x‖² over kept weights and bias, one row at a time, by a dense solve in float64."""
    goal = dense if bias is None else torch.cat([dense, bias[:, None]], 1)
    size = rows.square().mean()
    if bias is not None:
        rows, mask = torch.nn.functional.pad(rows, (0, 1), value=1.0), torch.nn.functional.pad(mask, (0, 1), value=True)
    H = rows.T @ rows / len(rows)
    H = H + damping * size * torch.eye(len(H), dtype=H.dtype)
    found = torch.zeros_like(goal)
    for i, kept in enumerate(mask):
        right = H[kept][:, kept] @ goal[i][kept] + H[kept][:, ~kept] @ goal[i][~kept]
        found[i][kept] = torch.linalg.solve(H[kept][:, kept], right)
    return found


LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (40, 12)),
    "no bias": (lambda: nn.Linear(12, 7, bias=False), (40, 12)),
    "sequence": (lambda: nn.Linear(6, 5), (9, 4, 6)),
    "convolution": (lambda: nn.Conv2d(3, 5, 3, padding=1), (4, 3, 6, 6)),
    "strided and dilated": (lambda: nn.Conv2d(2, 5, (3, 2), stride=2, dilation=(1, 2), padding=(0, 1)), (6, 2, 9, 9)),
    "same": (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2, bias=False), (4, 3, 6, 6)),
}


def patches(layer, x):
    """What each output is a product of, by running the layer with one weight set at a time."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    size = layer.weight[0].numel()
    options = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    probe = nn.Conv2d(layer.in_channels, size, *options, bias=False).double()
    probe.weight.data = torch.eye(size, dtype=torch.float64).view(probe.weight.shape)
    return probe(x).permute(0, 2, 3, 1).flatten(0, -2).detach()


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("damping", [1e-2, 0.3])
def test_it_is_the_least_squares_of_every_row(make, shape, damping):
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64) + 0.3
    dense, bias = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
    fp.global_prune(layer, "random", 0.6, generator=torch.Generator().manual_seed(1))
    mask = fp.masks(layer)["weight"]
    data = [(x[:3], None), (x[3:], None)] if len(shape) == 2 else (x, torch.zeros(len(x)))
    found = fp.reconstruct(layer, data, damping=damping)
    expected = solved(dense.flatten(1), mask.flatten(1), bias, patches(layer, x), damping)
    weight = expected if bias is None else expected[:, :-1]
    assert torch.allclose(layer.weight.flatten(1), weight, atol=1e-9)
    assert bias is None or torch.allclose(layer.bias, expected[:, -1], atol=1e-9)
    assert torch.equal(layer.weight != 0, mask)
    assert torch.equal(layer.weight_orig[~mask], dense[~mask]), "what lies under the mask stays"
    (one,) = found.layers
    assert one.error_after < one.error_before
    assert str(found).splitlines()[1].startswith("weight")


def test_outputs_change_least_layer_after_layer_and_others_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 5)
    ).double()
    dense, x = deepcopy(model), torch.randn(64, 3, 6, 6, dtype=torch.float64)
    fp.global_prune(model, "magnitude", 0.5)
    before = (model(x) - dense(x)).square().mean()
    found = fp.reconstruct(model, (x, torch.zeros(64)))
    assert [layer.name for layer in found.layers] == ["0.weight", "5.weight"]
    assert found.skipped == {"2.weight": "a convolution in groups, or padded with other values than 0"}
    assert "2.weight: a convolution in groups" in str(found)
    assert (model(x) - dense(x)).square().mean() < 0.8 * before


def test_channels_that_are_gone_stay_gone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    x = torch.randn(32, 6, dtype=torch.float64)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    masks = fp.masks(model)
    fp.reconstruct(model, (x, torch.zeros(32)))
    assert {name: torch.equal(mask, fp.masks(model)[name]) for name, mask in masks.items()} == dict.fromkeys(
        masks, True
    )
    assert torch.allclose(fp.shrink(model, x)(x), model(x))


def test_no_trace_and_all_or_nothing():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)).train()
    x = torch.randn(10, 6)
    fp.global_prune(model, "magnitude", 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        fp.reconstruct(model, [(x, None), (torch.randn(4, 5), None)])
    for data, text in (([], "the data is empty"), (iter([(x, None)]), "can be read only once")):
        with pytest.raises(ValueError, match=text):
            fp.reconstruct(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].training
    assert not any(module._forward_pre_hooks.keys() - {*model[i]._forward_pre_hooks} for i, module in enumerate(model))
    state = torch.get_rng_state()
    fp.reconstruct(model, (x, None), max_samples=7)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_masked_is_told():
    with pytest.raises(ValueError, match="nothing is masked in this model: prune it first"):
        fp.reconstruct(nn.Linear(2, 2), torch.ones(3, 2))
    layer = nn.Linear(2, 2)
    fp.global_prune(layer, sparsity=0.5)
    with pytest.raises(ValueError, match="damping should be at least 0"):
        fp.reconstruct(layer, torch.ones(3, 2), damping=-1)


class Scaling(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(3 * x, self.weight, self.bias)


class Gating(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Padding(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 2, 0, 2)))


class Standardising(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Several(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


OTHERS = {
    "scales": (Scaling, (4, 6), (16, 4)),
    "gates": (Gating, (4, 6), (16, 4)),
    "pads": (Padding, (3, 4, 3), (5, 3, 6, 6)),
    "standardises": (Standardising, (3, 4, 3), (5, 3, 6, 6)),
    "returns more": (Several, (4, 6), (16, 4)),
}


@pytest.mark.filterwarnings("ignore:.*kernel")
@pytest.mark.parametrize(("kind", "sizes", "shape"), OTHERS.values(), ids=OTHERS)
def test_a_layer_that_does_more_than_multiply_is_left(kind, sizes, shape):
    torch.manual_seed(0)
    layer, x = kind(*sizes), torch.randn(shape)
    fp.global_prune(layer, "magnitude", 0.5)
    before = layer.weight.clone(), layer.bias.clone()
    found = fp.reconstruct(layer, x)
    assert found.skipped == {"weight": "its forward is not the product of its inputs and this weight"}
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(layer.bias, before[1])


def test_a_subclass_that_multiplies_is_refitted_as_its_class():
    torch.manual_seed(0)
    plain, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(5, 3, 6, 6)
    fp.global_prune(plain, "magnitude", 0.5)
    named = deepcopy(plain)
    named.forward = lambda x: nn.functional.conv2d(x, named.weight, named.bias, padding=1)
    for layer, inputs in ((plain, x), (named, x)):
        fp.reconstruct(layer, inputs)
    assert torch.equal(plain.weight, named.weight)
    one_image = deepcopy(plain)
    assert len(fp.reconstruct(one_image, [x[0]]).layers) == 1, "an image without a batch's axis"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(5, 4), nn.Linear(5, 4)
        self.other.weight = self.one.weight

    def forward(self, x):
        return torch.stack([self.one(x), self.other(2 - x)])


def test_each_layer_of_a_tied_weight_has_its_own_bias():
    torch.manual_seed(0)
    model, x = Tied().double(), torch.randn(50, 5, dtype=torch.float64)
    fp.global_prune(model, "magnitude", 0.5)
    dense, mask = model.one.weight_orig.detach().clone(), fp.masks(model)["one.weight"]
    rows = torch.cat([x, 2 - x])
    ones = torch.cat([torch.tensor([[1.0, 0.0]]).expand(50, 2), torch.tensor([[0.0, 1.0]]).expand(50, 2)]).double()
    biases = torch.stack([model.one.bias, model.other.bias], 1).detach()
    fp.reconstruct(model, x, damping=0.0)
    for i, kept in enumerate(mask):
        free = torch.cat([rows[:, kept], ones], 1)
        expected = torch.linalg.lstsq(free, rows @ dense[i] + ones @ biases[i]).solution
        found = torch.cat([model.one.weight[i][kept], torch.stack([model.one.bias[i], model.other.bias[i]])])
        assert torch.allclose(found, expected, atol=1e-9)


def test_a_bias_of_several_weights_stays():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(30, 4)
    model[2].bias = model[0].bias
    before = model[0].bias.detach().clone()
    fp.global_prune(model, "magnitude", 0.5)
    found = fp.reconstruct(model, x)
    assert all(layer.error_after < layer.error_before for layer in found.layers)
    assert torch.equal(model[0].bias, before)


@pytest.mark.slow
def test_the_perplexity_of_a_small_language_model():
    """GPT-2 with two blocks, trained on Python's manual letter by letter; half and two of four weights pruned."""
    transformers = pytest.importorskip("transformers")
    text = "".join(pydoc_data.topics.topics.values()).encode()
    tokens = torch.tensor(list(text)) % 128
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=64, n_embd=96, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    train, held_out = windows[: len(windows) * 9 // 10], windows[len(windows) * 9 // 10 :][:200]
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=800)
    for step in range(800):
        batch = train[torch.randint(len(train), (16,), generator=torch.Generator().manual_seed(step))]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()

    @torch.no_grad()
    def perplexity(model):
        return math.exp(model.eval()(held_out, labels=held_out).loss.item())

    dense, data = perplexity(model), [{"input_ids": part} for part in train[:256].split(32)]
    for options in ({"sparsity": 0.5, "allocation": "layer"}, {"granularity": "2:4"}):
        pruned = deepcopy(model)
        fp.global_prune(pruned, "magnitude", include=["*.c_attn", "*.c_proj", "*.c_fc"], **options)
        without = perplexity(pruned)
        fp.reconstruct(pruned, data)
        assert dense < perplexity(pruned)
        assert perplexity(pruned) - dense < 0.6 * (without - dense)
