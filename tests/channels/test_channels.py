"""Coupled channels through the whole route: scored, pruned, trained, shrunk.

The masked model computes what the smaller one does.
"""

import copy

import cases
import pytest
import torch
from residual_net import DATA, X, build, shaken
from torch.nn import functional as F

import torch_flowprune as fp


def test_groups_are_the_candidates_and_the_sum_couples():
    found = fp.scores(build(), "magnitude", granularity="channel", example_inputs=X)
    assert {name: len(value) for name, value in found.items()} == {"stem.weight": 8, "inner.weight": 6}
    assert found.granularity == "channel"


@pytest.mark.parametrize(
    "method",
    ["magnitude", "loss_preservation", "gradient_norm_preservation", "gradient_norm_increase", "fisher", "synflow"],
)
def test_exactly_k_go_and_the_smaller_model_is_equal(method):
    model = build()
    report = fp.global_prune(model, method, sparsity=0.5, granularity="channel", data=DATA, min_keep=1)
    assert (report.units, report.pruned) == (14, 7)
    small = fp.shrink(model, X)
    assert small.stem.out_channels + small.inner.out_channels == 7
    assert small.outer.out_channels == small.stem.out_channels
    for mode in (False, True):
        ours, theirs = copy.deepcopy(model).train(mode)(X), copy.deepcopy(small).train(mode)(X)
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-10)


def test_what_a_measure_reads_of_a_channel():
    model, flow = build(), fp.flow(build(), DATA, needs=("g", "g2"))
    theta, g2 = flow.theta, flow.g2

    def of(method, scored_by):
        return fp.scores(model, method, DATA, granularity="channel", scored_by=scored_by)["inner.weight"]

    torch.testing.assert_close(of("magnitude", "producer"), theta["inner.weight"].flatten(1).norm(dim=1))
    torch.testing.assert_close(of("l1", "scale"), theta["inner_bn.weight"].abs())  # the paper code's `bn`
    nvidia = theta["inner_bn.weight"] ** 2 * g2["inner_bn.weight"] + theta["inner_bn.bias"] ** 2 * g2["inner_bn.bias"]
    torch.testing.assert_close(of("fisher", "norm"), nvidia)
    coupled = [
        theta[n].abs().flatten(1).sum(1)
        for n in ("inner.weight", "inner.bias", "inner_bn.weight", "inner_bn.bias")
        if theta[n].dim() > 1
    ]
    coupled += [theta[n].abs() for n in ("inner.bias", "inner_bn.weight", "inner_bn.bias")] + [
        theta["outer.weight"].abs().sum((0, 2, 3))
    ]
    torch.testing.assert_close(of("l1", "group"), sum(coupled))


def test_prune_train_prune_shrink_prune_shrink():
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)

    def train():
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(X), DATA[1]).backward()
            optimizer.step()

    train()
    fp.global_prune(model, "taylor", sparsity=0.25, granularity="channel", data=DATA, min_keep=2)
    train()
    fp.global_prune(model, "taylor", sparsity=0.5, granularity="channel", data=DATA, min_keep=2)
    train()
    small = fp.shrink(model, X, optimizer=optimizer)
    torch.testing.assert_close(copy.deepcopy(small).eval()(X), copy.deepcopy(model).eval()(X), rtol=1e-9, atol=1e-9)
    assert all(
        optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape for parameter in small.parameters()
    )
    model = small
    train()
    report = fp.global_prune(small, "magnitude", sparsity=0.3, granularity="channel", example_inputs=X, min_keep=1)
    assert report.units == 7
    smaller = fp.shrink(small.eval(), X)
    torch.testing.assert_close(smaller(X), small(X), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:less than a tenth:torch_flowprune.LayerCollapseWarning")
@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("name", ["vgg13", "mobilenet", "resnet56"])
def test_the_papers_models_at_three_quarters(name, rounds):
    paper = pytest.importorskip("benchmarks.paper.models")  # the wheel has none
    torch.manual_seed(0)
    model = shaken(paper.build(name, classes=4, width=0.125).double()).eval()
    x, y = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2])
    report = fp.global_prune(
        model, "loss_preservation", sparsity=0.75, rounds=rounds, granularity="channel", data=(x, y), min_keep=1
    )
    assert report.pruned == round(0.75 * report.units)
    small = fp.shrink(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())


def test_scores_computed_once_are_pruned_with_again(tmp_path):
    pytest.importorskip("safetensors")
    model = build()
    found = fp.scores(model, "taylor", DATA, granularity="channel")
    found.save(tmp_path / "scores.safetensors")
    direct, later = build(), build()
    fp.global_prune(direct, "taylor", sparsity=0.4, granularity="channel", data=DATA)
    fp.global_prune(later, scores=fp.Scores.load(tmp_path / "scores.safetensors"), sparsity=0.4, example_inputs=X)
    assert all(torch.equal(mask, fp.masks(later)[name]) for name, mask in fp.masks(direct).items())


def test_include_and_exclude_choose_groups_by_their_producers():
    assert list(fp.scores(build(), granularity="channel", example_inputs=X, exclude="inner")) == ["stem.weight"]
    assert list(fp.scores(build(), granularity="channel", example_inputs=X, include="inner")) == ["inner.weight"]
    text = r"channels of stem.weight are left out: .* with those of outer.weight; include"
    with pytest.raises(ValueError, match=text):
        fp.scores(build(), granularity="channel", example_inputs=X, include="stem")
    with pytest.warns(UserWarning, match=text):
        found = fp.scores(build(), granularity="channel", example_inputs=X, include=["stem", "inner"])
    assert list(found) == ["inner.weight"]


def test_looking_ahead_works_for_channels():
    found = fp.compare(build(), ["magnitude", "taylor"], [0.3], DATA, granularity="channel", min_keep=1)
    assert [outcome.sparsity for outcome in found.outcomes] == [pytest.approx(4 / 14)] * 2
    pruner = fp.Pruner(build(), "taylor", sparsity=0.5, rounds=2, granularity="channel", example_inputs=X, min_keep=1)
    for _ in range(2):
        pruner.track(DATA)
        report = pruner.step()
    assert report.pruned == 7


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "an example input is needed, and there is no data: pass example_inputs="),
        ({"data": iter([DATA])}, "taking one from this iterator would lose a batch: pass example_inputs="),
        (
            {"example_inputs": X, "scored_by": "bias"},
            "scored_by should be one of producer, consumer, group, norm, scale, got 'bias'",
        ),
        (
            {"example_inputs": X, "granularity": "filter", "scored_by": "norm"},
            "scored_by='norm' is for granularity='channel', got granularity='filter'",
        ),
    ],
)
def test_bad_arguments(arguments, text):
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        fp.global_prune(model, sparsity=0.5, **{"granularity": "channel", **arguments})
    assert before.keys() == model.state_dict().keys()


def test_a_net_without_norms_cannot_be_scored_by_them():
    with pytest.raises(ValueError, match="have no norm with an affine part; leave them out with exclude="):
        fp.scores(
            cases.mlp(),
            granularity="channel",
            example_inputs=torch.ones(2, *cases.CASES["mlp"].batch(2)[0].shape[1:]).double(),
            scored_by="norm",
        )


def test_a_pruned_channel_stays_pruned():
    model = build()
    fp.global_prune(model, sparsity=0.3, granularity="channel", example_inputs=X, min_keep=1)
    before = fp.masks(model)
    with pytest.raises(ValueError, match="already at sparsity"):
        fp.global_prune(model, sparsity=0.1, granularity="channel", example_inputs=X)
    fp.global_prune(model, "random", sparsity=0.6, granularity="channel", example_inputs=X, min_keep=1)
    assert all(bool((fp.masks(model)[name] <= mask).all()) for name, mask in before.items())


def test_finding_channels_leaves_no_trace():
    model = build().train()
    model.inner_bn.eval()
    model.stem.weight.requires_grad_(False)
    state, modes, randomness = (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )
    fp.scores(model, ["taylor", "magnitude"], [DATA, DATA], granularity="channel")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not model.stem.weight.requires_grad
    assert torch.equal(randomness, torch.get_rng_state())
