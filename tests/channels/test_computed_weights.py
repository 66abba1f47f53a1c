"""Layers that compute their weight from factors: weight norm, spectral norm, parametrizations of the user's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import torch_flowprune as fp

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


class LowRank(nn.Module):
    """What a low-rank adapter adds to a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape[:2]
        self.A, self.B = nn.Parameter(torch.randn(2, columns) / 3), nn.Parameter(torch.randn(rows, 2) / 3)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A)[(...,) + (None,) * (weight.ndim - 2)]


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.shape[2] if weight.ndim > 2 else weight * 0.5


class Positive(nn.Module):
    """Zeros in the original are no zeros in the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


class Limited(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.renorm(2, 0, 0.7)


def limiting(layer: nn.Module) -> nn.Module:
    """Its forward sets the weight to one whose rows have no larger norm, as EEGNet's layers do."""

    class Limiting(type(layer)):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.7)
            return super().forward(x)

    layer.__class__ = Limiting
    return layer


def parametrized(make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def on(layer: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", make(layer))
        return layer

    return on


KINDS: dict[str, Callable[..., nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm by hook": weight_norm,
    "weight norm of columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "weight norm of all by hook": lambda layer: weight_norm(layer, dim=None),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by hook": spectral_norm,
    "both": lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
    "low rank": parametrized(lambda layer: LowRank(layer.weight)),
    "scaled": parametrized(lambda layer: Scaled()),
    "limited": parametrized(lambda layer: Limited()),
    "limited in the forward": limiting,
}


class Residual(nn.Module):
    """Convolutions of two widths, a sum, a transposed one, and linear layers."""

    def __init__(self, wrap: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.a, self.b = wrap(nn.Conv2d(3, 8, 3, padding=1)), wrap(nn.Conv2d(8, 8, 3, padding=1))
        self.norm, self.up = nn.BatchNorm2d(8), wrap(nn.ConvTranspose2d(8, 10, 2, stride=2))
        self.fc, self.head = wrap(nn.Linear(10, 12)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = self.up(x + torch.relu(self.norm(self.b(x))))
        return self.head(torch.sigmoid(self.fc(x.mean((2, 3)))))


def net(kind: str) -> tuple[Residual, Tensor]:
    torch.manual_seed(0)
    model = Residual(KINDS[kind]).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    for _ in range(3):  # power iterations
        model(x)
    return model, x


def pruned(kind: str, **options: object) -> tuple[Residual, Tensor]:
    model, x = net(kind)
    fp.global_prune(model, "magnitude", 0.4, granularity="channel", example_inputs=x, **options)
    return model, x


@pytest.mark.parametrize("kind", KINDS)
def test_the_smaller_model_is_the_masked_one(kind: str) -> None:
    model, x = pruned(kind)
    small = fp.shrink(model, x)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    for training in (False, True):
        ours, theirs = small.train(training)(x), model.train(training)(x)
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_both_learn_alike(kind: str) -> None:
    """Ten steps of momentum: zeros stay zeros, and the smaller model goes the same way."""
    model, x = pruned(kind)
    small = fp.shrink(model, x)
    for one in (model, small):
        one.train()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    assert torch.allclose(small.eval()(x), model.eval()(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_state_their_sizes(kind: str) -> None:
    model, x = pruned(kind)
    small = fp.shrink(model, x)
    for layer in (small.a, small.b, small.up):
        out, into = (1, 0) if layer.transposed else (0, 1)
        assert (layer.out_channels, layer.in_channels) == (layer.weight.shape[out], layer.weight.shape[into])
    assert (small.fc.out_features, small.fc.in_features) == tuple(small.fc.weight.shape)
    assert small.fc.out_features < 12


@pytest.mark.parametrize("kind", KINDS)
def test_budgets_count_what_shrinking_leaves(kind: str) -> None:
    model, x = net(kind)
    whole = sum(p.numel() for p in model.parameters())
    report = fp.global_prune(model, "magnitude", 0.3, granularity="channel", example_inputs=x, cost="parameters")
    left = sum(p.numel() for p in fp.shrink(model, x).parameters())
    assert left <= 0.7 * whole
    assert f"{left:,} of {whole:,}" in str(report)


@pytest.mark.parametrize("kind", ["weight norm", "weight norm by hook", "spectral norm", "spectral norm by hook"])
def test_masks_live_through_files_and_copies(kind: str) -> None:
    model, x = pruned(kind)
    expected = model.eval()(x)
    again, _ = net(kind)
    fp.load_state_dict(again, fp.state_dict(model))
    with torch.no_grad():
        model(x)  # a graph in the weight that a hook makes would be in the way of any copy
        copied = copy.deepcopy(model)
    for other in (again.eval(), copied, fp.remove(copied)):
        assert torch.equal(other(x), expected)
    small = fp.shrink(model, x)
    rebuilt = fp.rebuild(net(kind)[0], fp.describe(net(kind)[0], small))
    fp.load_state_dict(rebuilt, fp.state_dict(small))
    assert torch.equal(rebuilt.eval()(x), small.eval()(x))


@pytest.mark.parametrize("kind", ["weight norm by hook", "spectral norm by hook"])
def test_the_weight_that_a_hook_makes_is_never_of_before(kind: str) -> None:
    model, x = pruned(kind)
    assert model.a.training  # as it was, though power iterations wait
    rows = fp.masks(model)["a.weight_g" if "weight norm" in kind else "a.weight_orig"].flatten(1).any(1)
    assert torch.equal(model.a.weight.flatten(1).any(1), rows)
    assert fp.shrink(model, x).a.weight.shape == (int(rows.sum()), 3, 3, 3)


def test_optimizers_go_on() -> None:
    model, x = pruned("weight norm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    small = fp.shrink(model, x, optimizer=optimizer)
    shapes = {tuple(p.shape) for p in small.parameters()}
    assert {tuple(v.shape) for state in optimizer.state.values() for v in state.values() if v.ndim} <= shapes


@pytest.mark.parametrize("kind", ["weight norm", "weight norm by hook", "spectral norm", "spectral norm by hook"])
@pytest.mark.parametrize("pick", ["fc", "fc.weight", "*fc*", "module", "type", "pair"])
def test_a_layer_is_picked_as_any_other(kind: str, pick: str) -> None:
    model, x = net(kind)
    picked = {
        "module": {"include": model.fc},
        "type": {"include": nn.Linear, "exclude": "head"},
        "pair": {"parameters": [(model.fc, "weight")]},
    }.get(pick, {"include": pick})
    report = fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x, **picked)
    assert report.pruned == 6
    assert int((model.fc.weight == 0).all(1).sum()) == 6
    assert not bool((model.a.weight.flatten(1) == 0).all(1).any())


@pytest.mark.parametrize("kind", ["weight norm", "weight norm by hook", "spectral norm"])
def test_a_layer_is_left_out_as_any_other(kind: str) -> None:
    model, x = net(kind)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x, exclude="fc.weight")
    assert not bool((model.fc.weight == 0).all(1).any())
    assert bool((model.a.weight.flatten(1) == 0).all(1).any())


@pytest.mark.parametrize("kind", ["weight norm", "weight norm by hook"])
def test_a_channel_is_scored_by_its_length(kind: str) -> None:
    """Of a direction all that counts is the length that it is multiplied by, which is the norm of its row."""
    model, x = net(kind)
    scores = fp.scores(model, "magnitude", granularity="channel", example_inputs=x, include="fc")
    assert torch.allclose(next(iter(scores.values())), model.fc.weight.norm(dim=1))


@pytest.mark.parametrize("kind", ["weight norm", "weight norm by hook", "weight norm of columns"])
def test_the_report_counts_lengths_and_directions(kind: str) -> None:
    """Of what makes a channel, and not the direction of what reads it."""
    model, x = net(kind)
    report = fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x, include=["fc", "up"])
    counts = {layer.name.split(".")[0]: (layer.weights, layer.weights_pruned, layer.pruned) for layer in report.layers}
    lengths = 0 if "columns" in kind else 1  # of each output; those of columns are of the inputs
    each = {"fc": 10 + lengths, "up": 8 * 4 + (0 if lengths else 1)}
    for name, (weights, zeros, pruned) in counts.items():
        assert weights == {"fc": 12, "up": 10}[name] * each[name]
        assert zeros == pruned * each[name]


def test_allocations_see_the_shape_of_the_weight() -> None:
    plain, x = Residual(lambda layer: layer).double(), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    options = {"sparsity": 0.4, "granularity": "channel", "example_inputs": x, "allocation": "erk"}
    expected = [layer.pruned for layer in fp.global_prune(plain, "magnitude", **options).layers]
    normed, _ = net("weight norm by hook")
    assert [layer.pruned for layer in fp.global_prune(normed, "magnitude", **options).layers] == expected


def test_what_an_orthogonal_weight_needs() -> None:
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="no channel can be pruned .*remove_parametrizations first"):
        fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=torch.randn(2, 6))
    assert not fp.masks(model)


def test_channels_that_zeros_in_the_factors_do_not_clear() -> None:
    """Neither what makes them is zero, nor what reads them."""
    wrap = parametrized(lambda layer: Positive())
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), wrap(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))
    groups = [group.name for group in fp.couple(model, torch.randn(2, 6)).groups]
    assert groups == ["2.parametrizations.weight.original"]  # read by columns that are zero


def test_single_weights_of_a_computed_weight_stay() -> None:
    model, _ = net("weight norm")
    with pytest.warns(UserWarning, match="is parametrized: .* it stays dense"):
        fp.global_prune(model, "magnitude", 0.5)
    with pytest.raises(ValueError, match="a mask on it would not be one on the weight"):
        fp.global_prune(model, "magnitude", 0.5, include="a.parametrizations.weight.original1")


def test_many_parametrized_layers_of_one_width() -> None:
    """Each has a class of its own, whose attributes may mean either width: not all of 2^60 ways are tried."""
    layers = [parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding=1)) for _ in range(30)]
    model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 2)), torch.randn(2, 4, 5)
    fp.global_prune(model, "magnitude", 0.3, granularity="channel", example_inputs=x)
    assert torch.allclose(fp.shrink(model, x)(x), model(x), atol=1e-6)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
def test_a_recurrent_layer_with_a_computed_weight(norm: Callable[..., nn.Module]) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = norm(nn.LSTM(5, 8, batch_first=True), "weight_hh_l0"), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Reader(), torch.randn(2, 4, 5)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    small = fp.shrink(model, x)
    assert small.lstm.hidden_size == 4
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_columns_that_norms_are_taken_over_keep_a_channel() -> None:
    """It reads zero once its length and its bias are zero, but the columns that read it still count in norms."""
    wrap = parametrizations.weight_norm
    model, x = nn.Sequential(wrap(nn.Linear(4, 6)), nn.ReLU(), wrap(nn.Linear(6, 3))), torch.randn(2, 4)
    length, direction = "0.parametrizations.weight.original0", "2.parametrizations.weight.original1"
    kept = torch.tensor([False, True, True, False, True, True])
    fp.apply_masks(model, {length: kept[:, None], "0.bias": kept})
    with pytest.warns(UserWarning, match="no channel is dead"):
        fp.shrink(model, x)
    fp.apply_masks(model, {direction: kept.expand(3, 6)})
    small = fp.shrink(model, x)
    assert small[0].out_features == 4
    assert torch.allclose(small(x), model(x), atol=1e-6)


class Generator(nn.Module):
    """Says its widths in its code, so that the smaller model is held to learn as the masked one does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(4, 8 * 9))
        self.up = parametrizations.weight_norm(nn.ConvTranspose2d(8, 6, 4, 2, 1))
        self.last = parametrizations.weight_norm(nn.ConvTranspose2d(6, 3, 4, 2, 1))

    def forward(self, z: Tensor) -> Tensor:
        x = torch.relu(self.first(z)).view(-1, 8, 3, 3)
        return torch.tanh(self.last(torch.relu(self.up(x))))


def test_directions_that_go_are_no_zeros_in_the_proof() -> None:
    torch.manual_seed(0)
    model, z = Generator(), torch.randn(3, 4)
    fp.global_prune(model, "magnitude", 0.4, granularity="channel", example_inputs=z)
    small = fp.shrink(model, z)
    assert small.up.in_channels < 8
    assert torch.allclose(small(z[:1]), model(z[:1]), atol=1e-6)
