"""Pruning round by round inside a training loop, and every measure compared without a change to the model."""

import copy
import io
import pickle

import cases
import oracles
import pytest
import torch
from cases import CASES
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.scoring import measure_lookup

BATCHES = CASES["mlp"].batches((4, 3, 5))
QUIET = pytest.mark.filterwarnings(
    "ignore::torch_flowprune.LayerCollapseWarning", "ignore::torch_flowprune.TiedScoresWarning"
)


def masks(model):
    return {name: mask.clone() for name, mask in fp.masks(model).items()}


def assert_same(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(mask, other[name]) for name, mask in one.items())


@QUIET
@pytest.mark.parametrize("schedule", [*fp.SCHEDULES, (0.3, 0.5, 0.6)])
def test_steps_are_the_rounds_of_global_prune(schedule):
    """Where nothing is trained in between, a pruner is one call with rounds=."""
    model, at_once = cases.mlp(), cases.mlp()
    pruner = fp.Pruner(model, "taylor", 0.6, rounds=3, schedule=schedule)
    seen = []
    while not pruner.done:
        seen.append(pruner.next_sparsity)
        report = pruner.step(BATCHES)
        assert report.pruned == round(seen[-1] * 52)
    assert (len(seen), seen[-1]) == (3, 0.6)
    given = schedule if isinstance(schedule, str) else (lambda rounds, start, target: [*schedule[:-1], target])
    fp.global_prune(at_once, "taylor", 0.6, data=BATCHES, rounds=3, schedule=given)
    assert_same(masks(model), masks(at_once))
    with pytest.raises(ValueError, match="all 3 rounds are done: the model is at sparsity 0.6"):
        pruner.step(BATCHES)


@pytest.mark.parametrize(
    "method",
    [
        "loss_preservation",
        "taylor",
        "fisher",
        "biased_loss_preservation",
        "magnitude",
        "distance_biased_loss_preservation",
    ],
)
@pytest.mark.parametrize("granularity", ["weight", "filter"])
@QUIET
def test_tracked_scores_are_the_moving_average(method, granularity):
    """α·new + (1−α)·old over the minibatches, over the weights' sum, read off .grad: by hand."""
    model, initial = cases.mlp(), CASES["mlp"].model(seed=5).state_dict()
    options = {"granularity": granularity, "normalize": None, "min_keep": 0}  # the scores as they are
    pruner = fp.Pruner(model, method, 0.5, alpha=0.8, theta0=initial, **options)
    average, optimizer = {}, torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in BATCHES:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pruner.track()
        for name, p in model.named_parameters():
            if p.dim() > 1:
                kinds = {"theta": p.detach(), "theta0": initial[name], "g": p.grad, "g2": p.grad.square()}
                rows = [
                    kinds[kind].reshape(-1, 1) if granularity == "weight" else kinds[kind]
                    for kind in measure_lookup.needs(method)
                ]
                average[name] = 0.8 * oracles.PAPER[method](*rows) + 0.2 * average.get(name, 0)
        optimizer.step()
    average = {name: value / (1 - 0.2 ** len(BATCHES)) for name, value in average.items()}  # it began from zero
    for name, value in average.items():
        torch.testing.assert_close(pruner.tracked[name], value, rtol=1e-9, atol=1e-15)
    report = pruner.step()
    k = round(0.5 * report.units)
    expected = dict(zip(average, oracles.lowest(list(average.values()), k), strict=True))
    for layer in report.layers:
        assert layer.pruned == int((~expected[layer.name]).sum())
    assert pruner.tracked == {}, "each round starts afresh"


def test_tracking_a_batch_serves_every_measure():
    model = cases.mlp()
    pruner = fp.Pruner(model, "grasp", 0.5, alpha=1.0)
    with pytest.raises(
        ValueError, match=r"'gradient_norm_increase' reads Hg, which .grad does not hold: call track\(batch\)"
    ):
        pruner.track()
    pruner.track(BATCHES[0])
    expected = fp.scores(model, "grasp", BATCHES[0])
    assert all(torch.equal(pruner.tracked[name], expected[name]) for name in expected)
    assert not any(p.grad is not None for p in model.parameters())


def test_tracking_without_a_gradient():
    with pytest.raises(
        ValueError,
        match=r".grad of 0.weight, 2.weight, 4.weight is None: call track\(\) after loss.backward\(\) and before "
        r"zero_grad\(\)",
    ):
        fp.Pruner(cases.mlp(), "taylor", 0.5).track()


def backward(model, batch, scale=1.0):
    model.zero_grad()
    (scale * F.cross_entropy(model(batch[0]), batch[1])).backward()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_a_batch_that_overflows_is_left_out_of_the_average(method, value):
    """The scaler skips its step; the average is that of the other batches, also where it comes first."""
    model = cases.mlp()
    tracking, oracle = (fp.Pruner(model, method, 0.5) for _ in range(2))
    for batch, overflows in ((BATCHES[0], True), (BATCHES[0], False), (BATCHES[1], True), (BATCHES[2], False)):
        backward(model, batch)
        if overflows:
            model[2].weight.grad[0, 0] = value
        else:
            oracle.track()
        tracking.track()
    assert_same(tracking.tracked, oracle.tracked)
    assert tracking.tracked


def test_a_loop_with_a_gradient_scaler():
    model = cases.mlp().float()
    pruner, optimizer = fp.Pruner(model, "loss_preservation", 0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    scaler, tracked = torch.amp.GradScaler("cpu", init_scale=2.0**127), []
    for _ in range(20):
        optimizer.zero_grad()
        scaler.scale(1e6 * F.cross_entropy(model(BATCHES[0][0].float()), BATCHES[0][1])).backward()
        scaler.unscale_(optimizer)
        pruner.track()
        tracked.append(bool(pruner.tracked))
        scaler.step(optimizer)
        scaler.update()
    assert tracked[0] is False
    assert tracked[-1] is True


def test_an_overflow_does_not_matter_to_what_reads_no_gradient():
    model = cases.mlp()
    pruner = fp.Pruner(model, "magnitude", 0.5)
    backward(model, BATCHES[0], float("inf"))
    pruner.track()
    assert pruner.tracked


def test_a_layer_that_a_batch_does_not_use_counts_with_zeros():
    model = cases.mlp()
    tracking, oracle = (fp.Pruner(model, "taylor", 0.5) for _ in range(2))
    for batch in BATCHES:
        backward(model, batch)
        if batch is BATCHES[1]:
            model[2].weight.grad.zero_()
            oracle.track()
            model[2].weight.grad = None
        else:
            oracle.track()
        tracking.track()
    assert_same(tracking.tracked, oracle.tracked)


@QUIET
def test_a_run_resumes_where_it_stopped():
    """Saved in the middle of a round and loaded into fresh objects, it ends with the same masks."""

    def train(pruner, model, batches):
        for x, y in batches:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            pruner.track()

    def make(model):
        return fp.Pruner(
            model, "distance_biased_loss_preservation", 0.8, rounds=2, theta0=CASES["mlp"].model(seed=3).state_dict()
        )

    model = cases.mlp()
    pruner = make(model)
    train(pruner, model, BATCHES)
    pruner.step()
    train(pruner, model, BATCHES[:1])
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)

    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for one, net in ((pruner, model), (resumed, other)):
        train(one, net, BATCHES[1:])
        one.step()
        assert one.done
    assert_same(masks(model), masks(other))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"method": "magnitude"}, "this state is of a pruner by loss_preservation, and this one prunes by magnitude"),
        ({"rounds": 1}, "this state is of a pruner with .*'rounds': 2.*, and this one has .*'rounds': 1"),
        ({"schedule": "cubic"}, "this state is of a pruner with .*'exponential'.*, and this one has .*'cubic'"),
        ({"sparsity": 0.6}, "this state is of a pruner with .*0.5.*, and this one has .*0.6"),
        ({"granularity": "filter"}, "this state is of a pruner of weights, and this one prunes filters"),
        (
            {"include": "0"},
            r"this state is of other layers: 2.weight \(.*\) and now not there, 4.weight .* and now not there",
        ),
    ],
)
@QUIET
def test_a_state_of_another_pruner(words, text):
    """And nothing of it is taken over."""
    asked = {"method": "snip", "sparsity": 0.5, "rounds": 2}
    state = fp.Pruner(cases.mlp(), **asked).state_dict()
    fp.Pruner(cases.mlp(), **asked).load_state_dict(state)
    pruner = fp.Pruner(cases.mlp(), **{**asked, **words})
    before = pruner.state_dict()
    with pytest.raises(ValueError, match=text):
        pruner.load_state_dict({**state, "round": 1})
    assert pruner.state_dict() == before


@pytest.mark.parametrize("round_", [-1, 3])
def test_a_state_of_a_round_that_is_none(round_):
    pruner = fp.Pruner(cases.mlp(), sparsity=0.5, rounds=2)
    with pytest.raises(ValueError, match=f"the round of a state should be from 0 to 2, got {round_}"):
        pruner.load_state_dict({**pruner.state_dict(), "round": round_})


def test_a_state_of_a_generator_needs_one():
    state = fp.Pruner(cases.mlp(), "random", 0.5, generator=torch.Generator().manual_seed(7)).state_dict()
    with pytest.raises(ValueError, match="this state is of a pruner with a generator: give this one a generator="):
        fp.Pruner(cases.mlp(), "random", 0.5).load_state_dict(state)
    one, other = cases.mlp(), cases.mlp()
    resumed = fp.Pruner(one, "random", 0.5, generator=torch.Generator())
    resumed.load_state_dict(state)
    resumed.step()
    fp.Pruner(other, "random", 0.5, generator=torch.Generator().manual_seed(7)).step()
    assert_same(masks(one), masks(other))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "give sparsity=, the fraction of all prunable units that are pruned after the last round"),
        ({"sparsity": 50}, ValueError, "sparsity=50 should be from 0.0 to 1.0; for 50 percent write 0.5"),
        ({"sparsity": 0.5, "alpha": 0}, ValueError, "alpha should be above 0"),
        ({"sparsity": 0.5, "amount": 3}, ValueError, "amount=3 should be alone"),
        ({"amount": 0.2, "schedule": "cubic"}, ValueError, "amount=0.2 should be alone"),
        ({"amount": 1.5}, ValueError, "amount=1.5 should be from 0.0 to 1.0"),
        ({"amount": 100}, ValueError, "amount=100 units should be pruned: expected 0 to 52"),
        ({"amount": "much"}, TypeError, "amount should be a fraction of what is left"),
        ({"sparsity": 0.5, "rounds": 0}, ValueError, "rounds should be a whole number of at least 1"),
        ({"sparsity": 0.9, "min_keep": 0.5}, ValueError, "47 of 52 units should be pruned, and at most 26 can"),
        ({"sparsity": 0.5, "generator": 3}, TypeError, "generator should be a torch.Generator"),
        ({"sparsity": 0.5, "theta0": 3}, TypeError, "theta0 should be tensors by parameter name"),
        ({"sparsity": 0.5, "autocast": "bf16"}, ValueError, "autocast should be"),
        ({"sparsity": 0.5, "closure": 3}, TypeError, "closure"),
        ({"sparsity": 0.5, "alpha": 2}, ValueError, "alpha=2 should be from 0.0 to 1.0"),
        ({"sparsity": 0.5, "method": "nope"}, ValueError, "unknown measure 'nope'"),
        ({"sparsity": 0.5, "schedule": [0.3, 0.2]}, ValueError, "should be rising sparsities, one a round"),
        ({"sparsity": 0.5, "schedule": [0.3, 0.6]}, ValueError, "the last of them sparsity= where that is given"),
        ({"schedule": [0.3, 0.6], "rounds": 3}, ValueError, "should be rising sparsities, one a round"),
        ({"sparsity": 0.5, "include": "nope"}, ValueError, "include='nope' matches no parameter"),
        ({"sparsity": 0.5, "granularity": "nope"}, ValueError, "unknown granularity 'nope'"),
        (
            {"sparsity": 0.5, "wholly_else": 3},
            TypeError,
            "Pruner does not take wholly_else=: it takes model, method, sparsity, ",
        ),
    ],
)
def test_bad_arguments_fail_at_once(options, error, text):
    with pytest.raises(error, match=text):
        fp.Pruner(cases.mlp(), **options)


def test_less_than_is_gone_is_said_in_the_constructor():
    model = cases.mlp()
    fp.global_prune(model, "magnitude", 0.6)
    with pytest.raises(ValueError, match="the model is already at sparsity 0.5962"):
        fp.Pruner(model, "magnitude", 0.5, rounds=2)


@pytest.mark.parametrize(("amount", "left"), [(0.2, [42, 34, 27]), (10, [42, 32, 22]), (0, [52, 52, 52])])
@QUIET
def test_an_amount_goes_of_what_is_left_in_every_round(amount, left):
    """The lottery ticket's 20 percent: as torch counts amounts, round(0.2 * left)."""
    model = cases.mlp()
    pruner = fp.Pruner(model, "magnitude", amount=amount, rounds=3)
    seen = []
    while not pruner.done:
        report = pruner.step()
        seen.append(report.units - report.pruned)
    assert seen == left


def test_n_m_blocks_are_one_round():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 4))
    pruner = fp.Pruner(model, "magnitude", granularity="2:4")
    assert pruner.step().sparsity == 0.5
    assert pruner.done
    for words in ({"rounds": 3}, {"sparsity": 0.75}, {"amount": 0.2}):
        with pytest.raises(ValueError, match="granularity '2:4' is sparsity 0.5 in one round"):
            fp.Pruner(model, "magnitude", granularity="2:4", **words)


@pytest.mark.parametrize("alpha", [1.0, 0.8, 0.3, 0.01])
def test_what_is_tracked_are_scores(alpha):
    """Of constant scores the average is the scores, however many minibatches there were."""
    expected = fp.global_prune(cases.mlp(), "magnitude", 0.5).threshold
    pruner = fp.Pruner(cases.mlp(), "magnitude", 0.5, alpha=alpha)
    pruner.track()
    pruner.track()
    assert pruner.step().threshold == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("between", ["track", "step"])
@QUIET
def test_a_layer_added_or_resized_is_named(between):
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 10))
    pruner = fp.Pruner(model, "magnitude", 0.5)
    pruner.track()
    model[1] = torch.nn.Linear(20, 7)
    model.append(torch.nn.Linear(7, 40))
    text = r"3?.*2.weight was added; 1.weight has shape \(7, 20\) instead of \(10, 20\); shrink\(..., pruner=\) takes"
    with pytest.raises(ValueError, match=text):
        getattr(pruner, between)()
    assert fp.masks(model) == {}
    del model[1:]
    with pytest.raises(ValueError, match=r"1.weight is gone"):
        getattr(pruner, between)()


def test_channels_are_found_with_the_first_data():
    """As global_prune finds them: no example_inputs= where there are data."""
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))

    pruner, model = fp.Pruner(net(), "snip", 0.5, granularity="channel"), net()
    with pytest.raises(ValueError, match="channels are found with an example input, and none is known yet"):
        pruner.next_sparsity  # noqa: B018 - it raises
    report = pruner.step((x, y))
    assert report.to_dict() == fp.global_prune(model, "snip", 0.5, granularity="channel", data=(x, y)).to_dict()
    assert pruner.done
    tracked = fp.Pruner(net(), "snip", 0.5, granularity="channel")
    tracked.track((x, y))
    assert tracked.step().pruned == 3


def test_a_gradient_is_tracked_once():
    """Those of a model that does not train stay, and would be read for ever."""
    model = cases.mlp()
    pruner = fp.Pruner(model, "taylor", 0.5)
    x, y = BATCHES[0]
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        pruner.track()
    with pytest.raises(ValueError, match="every .grad is the one that was tracked last: call track"):
        pruner.track()
    F.cross_entropy(model(x), y).backward()  # gradients that accumulate are others
    pruner.track()


# compare


@QUIET
def test_compare_is_pruning_measuring_and_putting_back():
    model, held_out = cases.mlp(), CASES["mlp"].batches((6, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fp.compare(model, ["magnitude", "snip", "grasp"], [0.3, 0.6], BATCHES, held_out=held_out)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    dense = oracles.dense(model, BATCHES)
    assert found.loss == pytest.approx(oracles.dense(model, held_out).loss, rel=1e-12)
    assert found.samples == 8
    assert [(one.method, one.sparsity) for one in found.outcomes] == [
        (m, round(s * 52) / 52) for m in ("magnitude", "snip", "grasp") for s in (0.3, 0.6)
    ]
    for one, sparsity in zip(found.outcomes, [0.3, 0.6] * 3, strict=True):
        pruned = cases.mlp()
        report = fp.global_prune(pruned, one.method, sparsity, data=BATCHES)
        predicted = -sum((before[name] * dense.g[name])[~mask].sum().item() for name, mask in fp.masks(pruned).items())
        loss = oracles.dense(fp.remove(pruned), held_out).loss
        assert one.loss == pytest.approx(loss, rel=1e-10)
        assert one.change == pytest.approx(loss - found.loss, abs=1e-10)
        assert one.predicted == pytest.approx(predicted, rel=1e-9, abs=1e-14)
        assert one.emptied == sum(layer.pruned == layer.units for layer in report.layers)


def test_compare_correlates_the_scores():
    found = fp.compare(cases.mlp(), ["magnitude", "taylor", "snip"], [0.5], BATCHES)
    assert found.correlation["taylor"]["snip"] == 1.0, "on single weights they are one"
    assert found.correlation["magnitude"]["snip"] == found.correlation["snip"]["magnitude"] < 1
    text = str(found)
    assert text.startswith(f"loss {found.loss:.4g} on 12 samples, which the scores have seen, before pruning\n")
    assert "rank correlation" in text


def test_compare_with_empty_held_out_data():
    model = cases.mlp()
    with pytest.raises(ValueError, match="the held-out data is empty"):
        fp.compare(model, ["magnitude"], [0.5], BATCHES, held_out=[])
    assert fp.masks(model) == {}


@pytest.mark.parametrize("granularity", ["weight", "filter", "channel"])
def test_rounds_by_scores_computed_earlier(granularity):
    """Round by round further down one ranking: that of the scores, whatever the weights have become."""
    model, at_once = cases.mlp(), cases.mlp()
    words = {"example_inputs": BATCHES[0][0]} if granularity == "channel" else {}
    scores = fp.scores(model, "snip", BATCHES, granularity=granularity, **words)
    pruner = fp.Pruner(model, scores=scores, schedule=[0.25, 0.5], **words)
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.neg_().add_(1)
        report = pruner.step()
    assert (report.method, report.granularity, report.pruned) == ("loss_preservation", granularity, report.units // 2)
    fp.global_prune(at_once, scores=scores, sparsity=0.5, **words)
    assert all(torch.equal(mask, fp.masks(at_once)[name]) for name, mask in fp.masks(model).items())


def test_data_given_go_before_scores_and_scores_pick_the_layers():
    model = cases.mlp()
    pruner = fp.Pruner(model, "l1", 0.5, rounds=2, scores=fp.scores(model, include="0"))
    assert [layer.name for layer in pruner.step().layers] == ["0.weight"]
    assert pruner.step(BATCHES).method == "l1"


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ({}, "scores= is empty"),
        ({"nope": torch.ones(3)}, "parameters this model does not have: nope"),
        ({"0.weight": torch.ones(3)}, "expected one per unit"),
        ({"0.weight": torch.full((20,), float("nan"))}, "hold nan"),
    ],
)
def test_scores_that_do_not_fit_are_found_when_a_pruner_is_made(scores, text):
    with pytest.raises(ValueError, match=text):
        fp.Pruner(cases.mlp(), sparsity=0.5, scores=scores)


def test_scores_do_not_outlive_a_shrink():
    model, x = cases.mlp(), BATCHES[0][0]
    scores = fp.scores(model, granularity="channel", example_inputs=x)
    pruner = fp.Pruner(model, sparsity=0.5, rounds=2, scores=scores, example_inputs=x)
    pruner.step()
    with pytest.raises(ValueError, match="prunes by scores= of the units that the model has now"):
        fp.shrink(model, x, pruner=pruner)


@pytest.mark.parametrize("words", [{}, {"granularity": "channel", "example_inputs": torch.ones(2, 4)}], ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pruner: pickle.loads(pickle.dumps(pruner))])
def test_a_pruner_is_copied_and_pickled_with_its_model(copied, words):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    pruner = fp.Pruner(model, "taylor", 0.5, rounds=2, **words)
    model(torch.ones(3, 4)).square().sum().backward()
    pruner.track()
    other = copied(pruner)
    assert str(other.step()) == str(pruner.step())
    assert all(torch.equal(mask, fp.masks(model)[name]) for name, mask in fp.masks(other.model).items())
    assert other.model is not model
