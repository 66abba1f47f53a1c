"""How sparse a model is, whoever pruned it: the report of the prune is the oracle."""

import cases
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def counts(report):
    return [(one.name, one.shape, one.units, one.pruned, one.weights, one.weights_pruned) for one in report.layers]


@pytest.mark.parametrize("finish", [lambda model: model, fp.remove], ids=["masks", "zeros"])
@pytest.mark.parametrize(
    "words",
    [{}, {"granularity": "filter"}, {"granularity": "channel"}, {"include": "2"}, {"exclude": "0"}],
    ids=str,
)
def test_a_model_that_was_pruned(words, finish):
    model = net()
    example = {"example_inputs": X} if words.get("granularity") == "channel" else {}
    expected = fp.global_prune(model, "magnitude", 0.5, **words, **example)
    found = fp.report(finish(model), **words, **example)
    assert counts(found) == counts(expected)
    assert (found.sparsity, found.dense, found.left) == (expected.sparsity, expected.dense, expected.left)
    assert (found.newly_pruned, found.threshold, found.granularity) == (0, None, expected.granularity)
    assert str(found).startswith(f"as it is, {expected.granularity}: ")


def test_a_model_that_was_loaded():
    model, loaded = cases.mlp(), cases.mlp()
    expected = fp.global_prune(model, "magnitude", 0.7)
    fp.load_state_dict(loaded, fp.state_dict(model))
    assert counts(fp.report(loaded)) == counts(expected)


def test_a_model_that_torch_pruned_is_left_as_it_was():
    model = net()
    prune.l1_unstructured(model[0], "weight", amount=12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert [one.pruned for one in fp.report(model).layers] == [12, 0, 0]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_masked_layer_is_counted_by_its_mask():
    """A weight that is kept and happens to be zero is not gone."""
    model = nn.Linear(4, 2)
    fp.apply_masks(model, {"weight": torch.tensor([[True] * 4, [False] * 4])})
    model.weight_orig.data.zero_()
    assert fp.report(model).pruned == 4


def test_a_dense_model():
    assert fp.report(net()).sparsity == 0
    with pytest.raises(ValueError, match="nothing to prune"):
        fp.report(nn.ReLU())


class Experts(nn.Module):
    """Matrices of its own, as those of transformers' mixtures have them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.arange(1.0, 97).view(4, 6, 4))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return torch.einsum("eij,bj->bi", self.up, x) * self.scale


def test_matrices_that_a_prune_was_told_to_take_are_counted():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), Experts())
    fp.global_prune(model, "magnitude", 0.5, include=["1", "2.up", "0"], allocation="layer")
    report = fp.report(model)
    assert [layer.name for layer in report.layers] == ["0.weight", "1.weight", "2.up"]
    assert report.pruned == 10 + 8 + 48
    assert [layer.name for layer in fp.report(model, exclude="0").layers] == ["1.weight", "2.up"]
    assert [layer.name for layer in fp.report(model, include="1").layers] == ["1.weight"]


def test_a_model_of_nothing_else_is_reported():
    model = Experts()
    fp.global_prune(model, "magnitude", 0.25, include="up")
    assert fp.report(model).sparsity == 0.25


def test_masked_matrices_are_not_said_to_stay_dense():
    model = nn.Sequential(nn.Linear(4, 4), Experts())
    with pytest.warns(UserWarning, match=r"stay dense: \*.up"):
        fp.global_prune(model, "magnitude", 0.2)
    fp.global_prune(model, "magnitude", 0.5, include="1.up")
    fp.global_prune(model, "magnitude", 0.4)
