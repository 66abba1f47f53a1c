"""A pruner handed to `shrink`: sparsities are shares of the model it began with, and it knows which model trains."""

import copy
import io

import pytest
import residual_net
import torch
from residual_net import build
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))


def make(model, **words):
    given = {"sparsity": 0.6, "rounds": 3, "granularity": "channel", "example_inputs": X, **words}
    return fp.Pruner(model, given.pop("method", "magnitude"), **given)


def channels(model):
    return [int(fp.masks(model).get(f"{i}.weight", model[i].weight != 0).any(1).sum()) for i in (0, 2)]


WORDS = [
    {},
    {"allocation": "layer"},
    {"allocation": "erk"},
    {"allocation": {"0.weight": 0.2}, "sparsity": 0.5},
    {"cost": "flops"},
    {"cost": "parameters"},
    {"method": "l1", "normalize": None},
    {"min_keep": 0.3},
    {"amount": 0.25, "sparsity": None},
    {"schedule": "cubic"},
    {"scored_by": "group"},
    {"round_to": 2},
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("words", WORDS, ids=str)
def test_shrinking_between_rounds_changes_nothing_that_is_chosen(words, inplace):
    """The oracle is the same pruner over the same model that nobody shrinks."""
    masked, small = net(), net()
    pruner, follower = make(masked, **words), make(small, **words)
    assert follower.goals == pruner.goals
    for _ in range(3):
        expected, report = pruner.step(), follower.step()
        assert [
            (one.name, one.units, one.pruned, one.newly_pruned, one.weights, one.weights_pruned)
            for one in report.layers
        ] == [
            (one.name, one.units, one.pruned, one.newly_pruned, one.weights, one.weights_pruned)
            for one in expected.layers
        ]
        assert (report.sparsity, report.dense, report.left) == (expected.sparsity, expected.dense, expected.left)
        assert report.threshold == pytest.approx(expected.threshold, rel=1e-5)
        small = fp.shrink(small, X, inplace=inplace, pruner=follower)
        assert follower.model is small
        assert [small[0].out_features, small[2].out_features] == channels(masked)
        torch.testing.assert_close(small(X), masked(X), rtol=1e-4, atol=1e-6)
    assert follower.done


@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_and_filters_are_counted_as_they_were(granularity):
    """Whole channels go first, then the pruner's own units."""
    masked, small = net(), net()
    for model in (masked, small):
        fp.global_prune(model, "magnitude", 0.3, granularity="channel", example_inputs=X)
    words = {"granularity": granularity, "example_inputs": None, "sparsity": 0.8, "exclude": "4"}
    pruner, follower = make(masked, **words), make(small, **words)
    for _ in range(3):
        expected, report = pruner.step(), follower.step()
        assert report.pruned == expected.pruned
        assert [one.pruned for one in report.layers] == [one.pruned for one in expected.layers]
        small = fp.shrink(small, X, pruner=follower)
        torch.testing.assert_close(small(X), masked(X), rtol=1e-4, atol=1e-6)
    assert report.pruned == round(0.8 * report.units)


def test_a_training_with_tracked_scores_goes_on_as_it_would_have():
    """Gradients, momentum, theta0 and the average: masked and shrunk train alike, shrunk in the middle of a round."""
    masked, small = net().double(), net().double()
    words = {"method": "distance_biased_loss_preservation", "example_inputs": X.double(), "normalize": None}
    pruner, follower = make(masked, **words), make(small, **words)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (masked, small)]
    for round_ in range(3):
        for minibatch in range(3):
            for model, one, optimizer in ((masked, pruner, optimizers[0]), (small, follower, optimizers[1])):
                optimizer.zero_grad()
                F.cross_entropy(model(X.double()), Y).backward()
                one.track()
                optimizer.step()
            if round_ and minibatch == 1:
                small = fp.shrink(small, X.double(), optimizer=optimizers[1], pruner=follower)
        assert [one.pruned for one in pruner.step().layers] == [one.pruned for one in follower.step().layers]
    small = fp.shrink(small, X.double(), optimizer=optimizers[1], pruner=follower)
    torch.testing.assert_close(small(X.double()), masked(X.double()), rtol=1e-6, atol=1e-9)


def test_pairs_of_parameters_are_found_in_the_smaller_model():
    model = net()
    pruner = make(model, parameters=[(model[0], "weight")])
    pruner.step()
    small = fp.shrink(model, X, pruner=pruner)
    report = pruner.step()
    assert [one.name for one in report.layers] == ["0.weight"]
    assert small[2].out_features == 20


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("words", ["parameters", "include", "exclude"])
def test_modules_and_pairs_of_coupled_layers_are_found_in_the_smaller_model(words, inplace):
    """The stem and the outer convolution make the same channels: both go on, and the inner one is left alone."""
    model, data = build(), {"granularity": "channel", "example_inputs": residual_net.X}
    given = {
        "parameters": [(model.stem, "weight"), (model.outer, "weight")],
        "include": [model.stem, model.outer],
        "exclude": model.inner,
    }
    pruner = fp.Pruner(model, sparsity=0.5, rounds=2, **{words: given[words]}, **data)
    pruner.step()
    small = fp.shrink(model, residual_net.X, pruner=pruner, inplace=inplace)
    report = pruner.step()
    assert report.sparsity == 0.5
    small = fp.shrink(small, residual_net.X, pruner=pruner)
    assert (small.stem.out_channels, small.outer.out_channels, small.inner.out_channels) == (4, 4, 6)


def test_a_run_that_was_shrunk_resumes():
    model = net()
    pruner, at_once = make(model, sparsity=0.9, allocation="layer"), net()
    pruner.step()
    small = fp.shrink(model, X, pruner=pruner)
    pruner.step()
    small = fp.shrink(small, X, pruner=pruner)
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    resumed = make(copy.deepcopy(small), sparsity=0.9, allocation="layer")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    report = resumed.step()
    assert report.sparsity == 0.9
    expected = pruner.step()
    assert (report.dense, report.left) == (expected.dense, expected.left)
    assert report.dense.parameters > 600
    fp.global_prune(at_once, "magnitude", 0.9, granularity="channel", example_inputs=X, allocation="layer")
    assert channels(at_once) == [2, 2]
    done = fp.shrink(resumed.model, X, pruner=resumed)
    assert done[0].out_features == done[2].out_features == 2


def test_a_state_from_before_the_model_was_shrunk_is_refused():
    model = net()
    pruner = make(model)
    pruner.step()
    state, small = pruner.state_dict(), fp.shrink(model, X)
    with pytest.raises(ValueError, match=r"this state is of other layers: 0.weight \(20,\) and now \(1\d,\)"):
        make(small).load_state_dict(state)


def by_size(runs, device):
    """A timer without noise: what the operators hold of the sizes that they are run at."""
    made, seconds = None, []
    for run in runs:
        made = run()
        seconds.append(1e-6 * sum(one.numel() for one in (made if isinstance(made, (list, tuple)) else [made])))
    return seconds


TARGETS = {
    "flops": {"cost": "flops"},
    "parameters": {"cost": "parameters"},
    "memory": {"cost": "memory"},
    "latency": {"cost": fp.LatencyTable(timer=by_size, multiple=1)},
    "an amount": {"sparsity": None, "at_most": {"memory": 2600}},
    "amounts": {"sparsity": None, "at_most": {"parameters": 300, fp.LatencyTable(timer=by_size, multiple=1): 0.6}},
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_to_a_cost_that_was_shrunk_resumes(target):
    words = TARGETS[target]
    pruner = make(net(), **words)
    pruner.step()
    small = fp.shrink(pruner.model, X, pruner=pruner)
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    resumed = make(copy.deepcopy(small), **words)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        expected, report = pruner.step(), resumed.step()
        assert str(report) == str(expected)
        assert (report.dense, report.left, report.spent) == (expected.dense, expected.left, expected.spent)
        assert all(torch.equal(mask, fp.masks(resumed.model)[name]) for name, mask in fp.masks(pruner.model).items())
        fp.shrink(resumed.model, X, pruner=resumed), fp.shrink(pruner.model, X, pruner=pruner)
    assert report.left.parameters < 0.6 * report.dense.parameters


@pytest.mark.parametrize("target", TARGETS)
def test_a_state_that_does_not_hold_what_the_dense_model_cost_is_refused(target):
    pruner = make(net(), **TARGETS[target])
    pruner.step()
    small = fp.shrink(pruner.model, X, pruner=pruner)
    state = pruner.state_dict()
    for word in ("operators", "holdings", "extents"):  # as earlier versions wrote it
        del state["costs"][word]
    if target in {"flops", "parameters"}:
        del state["costs"]
    with pytest.raises(ValueError, match="does not hold what it cost: a target in [a-z]+ cannot continue"):
        make(small, **TARGETS[target]).load_state_dict(state)


# -- models left behind ------------------------------------------


def test_a_model_left_behind_is_neither_tracked_nor_pruned():
    model = net()
    optimizer, pruner = torch.optim.SGD(model.parameters(), lr=0.1), make(model)
    pruner.step()
    fp.shrink(model, X, optimizer=optimizer)
    for call in (pruner.track, pruner.step):
        with pytest.raises(ValueError, match="this pruner's model was left behind"):
            call()


def test_a_model_cut_without_its_pruner_is_named():
    model = net()
    pruner = make(model)
    pruner.step()
    fp.shrink(model, X, inplace=True)
    with pytest.raises(
        ValueError,
        match=r"not the one that this pruner knows: 0.weight has shape \(\d+, 6\) instead of \(20, 6\); 2.weight",
    ):
        pruner.step()


def test_a_pruner_of_another_model_is_refused():
    model, pruner = net(), make(net())
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=X)
    with pytest.raises(ValueError, match="pruner= is of another model than the one to shrink"):
        fp.shrink(model, X, inplace=True, pruner=pruner)
    assert model[0].out_features == 20


def test_blocks_do_not_outlive_a_cut():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = fp.Pruner(model, "magnitude", granularity="2:4")
    with pytest.raises(ValueError, match="n:m blocks lie along an axis that shrink cuts"):
        fp.shrink(model, torch.randn(3, 8), pruner=pruner)


def test_a_model_is_read_once(monkeypatch):
    from torch_flowprune.channels import coupling

    seen = []
    monkeypatch.setattr(coupling, "read", lambda *args, real=coupling.read: seen.append(1) or real(*args))
    model = net()
    pruner = make(model, method="taylor")
    for _ in range(3):
        model.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        pruner.track()
    pruner.step()
    pruner.step(data=(X, Y))
    assert seen == [1]


def test_a_layer_added_to_a_model_of_channels_is_named():
    model = net()
    pruner = make(model)
    model.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="not the one that this pruner knows: 5.weight was added"):
        pruner.step()
