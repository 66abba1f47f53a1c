"""What a default call covers: weights of recurrent and bilinear layers too, and a word on matrices it does not know."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import torch_flowprune as fp

LAYERS = {
    "lstm": (lambda: nn.LSTM(6, 5, 2, bidirectional=True), 8),
    "lstm with projections": (lambda: nn.LSTM(6, 5, proj_size=3), 3),
    "gru": (lambda: nn.GRU(6, 5), 2),
    "rnn": (lambda: nn.RNN(6, 5), 2),
    "lstm cell": (lambda: nn.LSTMCell(6, 5), 2),
    "gru cell": (lambda: nn.GRUCell(6, 5), 2),
    "rnn cell": (lambda: nn.RNNCell(6, 5), 2),
    "bilinear": (lambda: nn.Bilinear(6, 6, 5), 1),
}


def outputs(layer, x):
    if isinstance(layer, nn.Bilinear):
        return layer(x, x)
    found = layer(x[None]) if isinstance(layer, nn.RNNBase) else layer(x)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize(("build", "matrices"), LAYERS.values(), ids=LAYERS)
def test_half_of_all_matrices_go_and_the_layer_computes_without_them(build, matrices):
    torch.manual_seed(0)
    layer, x = build(), torch.randn(4, 6)
    dense = copy.deepcopy(layer)
    report = fp.global_prune(layer, "magnitude", 0.5)
    assert len(report.layers) == matrices
    assert report.units == sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    again = fp.global_prune(layer, "magnitude", 0.6)
    assert (again.units, len(again.layers)) == (report.units, matrices)
    with torch.no_grad():
        for name, mask in fp.masks(layer).items():
            dense.get_parameter(name).mul_(mask)
    torch.testing.assert_close(outputs(layer, x), outputs(dense, x))


@pytest.mark.parametrize("method", ["snip", "grasp", "fisher"])
def test_recurrent_weights_are_scored(method):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    found = fp.scores(Net(), method, (torch.randn(4, 7, 6), torch.tensor([0, 1, 2, 0])))
    assert list(found) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"]
    assert all(score.any() for score in found.values())


def test_a_parametrized_recurrent_weight_stays_dense_with_a_word():
    layer = spectral_norm(nn.LSTM(6, 5), "weight_hh_l0")
    with pytest.warns(UserWarning, match="weight_hh_l0 is parametrized: .*; it stays dense"):
        report = fp.global_prune(layer, "magnitude", 0.5)
    assert [layer.name for layer in report.layers] == ["weight_ih_l0"]


class Experts(nn.Module):
    """Matrices that are a module's own, as transformers keeps the experts of Mixtral."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 8, width)), nn.Parameter(torch.randn(4, width, 8))


class Mixture(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.embed, self.place = nn.Embedding(50, 8), nn.Parameter(torch.randn(1, 90, 8))
        self.blocks = nn.ModuleList([Experts(width), Experts(width)])
        self.head = nn.Linear(8, 50)


class Adapted(nn.Module):
    """As adapters say what they add to a layer."""

    adapter_layer_names = ("added", "matrices")

    def __init__(self):
        super().__init__()
        self.base, self.added = nn.Linear(4, 4), nn.Linear(4, 64)
        self.matrices = nn.ParameterDict({"default": torch.randn(64, 64)})

    def forward(self, x):
        return self.base(x) + (self.added(x) @ self.matrices["default"])[..., :4]


def test_what_an_adapter_adds_is_no_default_and_nothing_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fp.global_prune(Adapted(), "magnitude", 0.5)
    assert [layer.name for layer in report.layers] == ["base.weight"]
    asked = fp.global_prune(Adapted(), "magnitude", 0.5, include=["added*", "matrices*"], min_keep=1)
    assert [layer.name for layer in asked.layers] == ["added.weight", "added.bias", "matrices.default"]


def test_matrices_that_the_default_does_not_know_are_named_with_the_include_to_copy():
    model = Mixture()
    with pytest.warns(UserWarning, match="stay dense: blocks") as seen:
        report = fp.global_prune(copy.deepcopy(model), "magnitude", 0.5)
    text = str(seen[0].message)
    assert text.startswith("57% of the weights are in matrices of modules of an unknown kind")
    assert text.endswith("pass include=['*', 'blocks.*.up', 'blocks.*.down']")
    assert seen[0].filename == __file__
    assert (report.sparsity, report.model_sparsity) == (0.5, 200 / 3618)
    assert "200 of all 3,618 weights of the model are masked (5.53%)" in str(report)
    assert report.to_dict()["model_sparsity"] == report.model_sparsity

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fp.global_prune(model, "magnitude", 0.5, include=["*", "blocks.*.up", "blocks.*.down"], min_keep=1)
    assert report.units == 8 * 50 + 2 * 2 * 4 * 8 * 16
    assert report.model_sparsity == report.pruned / 3618


def test_a_glob_that_would_take_more_is_not_given():
    model = nn.Sequential(Experts(16), nn.Linear(8, 8))
    model.other = nn.Module()
    model[1].up = nn.Parameter(torch.randn(1, 3))
    with pytest.warns(UserWarning, match=r"include=\['\*', '0.up', '\*.down'\]"):
        fp.global_prune(model, "magnitude", 0.5)


def test_less_than_a_tenth_and_what_was_named_are_no_news(recwarn):
    small = Mixture(width=1)
    fp.global_prune(small, "magnitude", 0.5)
    fp.global_prune(Mixture(), "magnitude", 0.5, include="*")
    assert not recwarn
