"""Every measure compared on one model: what it reads, what it leaves, what it draws, what it refuses."""

import copy
import json
from functools import partial

import cases
import pytest
import torch
from cases import CASES
from torch.nn import functional as F

import torch_flowprune as fp

BATCHES = CASES["cnn"].batches((4, 3))
METHODS = ["magnitude", "loss_preservation", "gradient_norm_preservation", "grasp", "fisher", "random"]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_one_flow_serves_all_measures(monkeypatch):
    """Two sweeps for g and Hg, one over the held-out data before, and one for each outcome."""
    model, seen = cases.cnn(), []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x: seen.append(1) or forward(self, x))
    fp.compare(model, METHODS, [0.2, 0.5], BATCHES, held_out=BATCHES[:1])
    assert len(seen) == 4 + 1 + 2 * len(METHODS)


@pytest.mark.parametrize(
    "methods",
    [[lambda theta: theta.sum(-1), lambda theta: -theta.sum(-1)], ["snip", "snip"], [partial(abs), partial(abs)]],
    ids=["lambdas", "a name twice", "partials"],
)
def test_two_measures_of_one_name_are_refused(methods):
    """One of the two would stand for both."""
    with pytest.raises(ValueError, match="name each once, and give each function a __name__ of its own"):
        fp.compare(cases.mlp(), methods, 0.5, CASES["mlp"].batch(4))


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_no_trace(granularity):
    """Randomness goes on where random numbers are asked for, and only there."""
    model = cases.cnn().train()
    fp.global_prune(model, "magnitude", 0.2)
    before, rng, names = state(model), torch.get_rng_state(), [name for name, _ in model.named_modules()]
    fp.compare(model, METHODS[:-1], [0.5, 0.7], BATCHES, granularity=granularity, mode="train", min_keep=0)
    assert list(state(model)) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert [name for name, _ in model.named_modules()] == names


def test_no_trace_of_a_failure():
    model, calls = cases.cnn(), []

    def fails_late(output, target):
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("late")
        return F.cross_entropy(output, target)

    before = state(model)
    with pytest.raises(RuntimeError, match="late"):
        fp.compare(model, METHODS, [0.3, 0.6], BATCHES, loss=fails_late)
    assert fp.masks(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_lower_sparsities_after_higher_ones_are_no_error():
    """The model is put back between two outcomes: nothing has to rise."""
    found = fp.compare(cases.cnn(), ["taylor"], [0.6, 0.2], BATCHES)
    alone = fp.compare(cases.cnn(), ["taylor"], [0.2], BATCHES)
    assert found.outcomes[1] == alone.outcomes[0]


def test_temperature_changes_the_scores_and_not_what_is_measured():
    warm = fp.compare(cases.cnn(), ["magnitude"], [0.5], BATCHES, temperature=7.0)
    cold = fp.compare(cases.cnn(), ["magnitude"], [0.5], BATCHES)
    assert (warm.loss, warm.outcomes[0].loss) == (cold.loss, cold.outcomes[0].loss)
    assert warm.outcomes[0].predicted != cold.outcomes[0].predicted


def test_emptied_layers_are_counted_and_kept_on_request():
    hollow = fp.compare(cases.cnn(), ["magnitude"], [1.0], BATCHES).outcomes[0]
    kept = fp.compare(cases.cnn(), ["magnitude"], [0.9], BATCHES, min_keep=1).outcomes[0]
    assert (hollow.emptied, hollow.sparsity) == (3, 1.0)
    assert kept.emptied == 0


def test_the_held_out_loss_is_the_sample_weighted_mean():
    model = cases.cnn()
    found = fp.compare(model, ["magnitude"], [0.5], BATCHES, held_out=CASES["cnn"].batches((5, 1)))
    losses = [(len(y), F.cross_entropy(model(x), y).item()) for x, y in CASES["cnn"].batches((5, 1))]
    assert found.loss == pytest.approx(sum(n * loss for n, loss in losses) / 6, rel=1e-12)


def test_correlation_is_symmetric_with_ones_on_its_diagonal():
    table = fp.compare(cases.cnn(), METHODS, [0.5], BATCHES).correlation
    for one in METHODS:
        assert table[one][one] == 1.0
        assert all(table[one][other] == pytest.approx(table[other][one], abs=1e-12) for other in METHODS)


def test_one_measure_and_one_sparsity_need_no_list():
    assert fp.compare(cases.cnn(), "taylor", 0.5, BATCHES) == fp.compare(cases.cnn(), ["taylor"], [0.5], BATCHES)


def test_a_users_measure_goes_by_its_name():
    def size(theta):
        return theta.abs().sum(-1)

    found = fp.compare(cases.cnn(), [size, "l1"], [0.5], BATCHES)
    assert [one.method for one in found.outcomes] == ["size", "l1"]
    assert found.outcomes[0].loss == found.outcomes[1].loss


def test_random_by_seed():
    def masks_of(seed):
        source = torch.Generator().manual_seed(seed)
        return [one.loss for one in fp.compare(cases.cnn(), ["random"], [0.3, 0.6], BATCHES, generator=source).outcomes]

    assert masks_of(1) == masks_of(1) != masks_of(2)


def test_table_dict_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    found = fp.compare(cases.cnn(), ["magnitude", "grasp"], [0.2, 0.5], BATCHES)
    assert json.loads(json.dumps(found.to_dict()))["outcomes"][3]["method"] == "grasp"
    lines = found.table().splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["method", "sparsity", "loss", "change", "predicted", "emptied"]
    found.plot(tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(
        f"<!-- {text} -->" in drawn
        for text in ("magnitude", "grasp", "change of the loss", "rank correlation of the scores")
    )
    assert f"<!-- {found.correlation['magnitude']['grasp']:.2f}".replace("-0", "−0") in drawn.replace("-0", "−0")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sparsities": [50]}, ValueError, "sparsity=50 should be from 0.0 to 1.0; for 50 percent write 0.5"),
        ({"methods": ["nope"]}, ValueError, "unknown measure 'nope'"),
        ({"data": []}, ValueError, "the data is empty"),
        ({"include": "nope"}, ValueError, "matches no parameter"),
        ({"min_keep": -1}, ValueError, "min_keep should be"),
        ({"methods": []}, ValueError, "methods= is empty: name at least one measure, such as 'magnitude'"),
        ({"sparsities": []}, ValueError, r"sparsities= is empty: name at least one, such as \[0.5, 0.9\]"),
        (
            {"data": iter(BATCHES)},
            ValueError,
            "a comparison reads its data several times, .* pass a list or a DataLoader",
        ),
        ({"held_out": iter(BATCHES)}, ValueError, "this iterator can be read only once"),
        (
            {"max_memroy": "2GB"},
            TypeError,
            r"compare does not take max_memroy=: did you mean max_memory=\?",
        ),
    ],
)
def test_bad_arguments(options, error, text):
    given = {"methods": ["magnitude"], "sparsities": [0.5], "data": BATCHES, **options}
    model = cases.cnn()
    with pytest.raises(error, match=text):
        fp.compare(model, given.pop("methods"), given.pop("sparsities"), given.pop("data"), **given)
    assert fp.masks(model) == {}


def test_a_sparsity_below_what_the_model_has():
    model = cases.cnn()
    fp.global_prune(model, "magnitude", 0.5)
    with pytest.raises(ValueError, match="already at sparsity 0.5"):
        fp.compare(model, ["magnitude"], [0.3], BATCHES)


def test_only_data_that_the_scores_have_not_seen_are_called_held_out(tmp_path):
    pytest.importorskip("matplotlib")
    for held_out, words, axis in (
        (None, "samples, which the scores have seen, before pruning", "change of the loss"),
        (BATCHES, "held-out samples before pruning", "change of the held-out loss"),
    ):
        found = fp.compare(cases.cnn(), "magnitude", 0.5, BATCHES, held_out=held_out)
        assert words in str(found).splitlines()[0]
        assert found.to_dict()["held_out"] is (held_out is not None)
        found.plot(tmp_path / "plot.svg")
        assert f"<!-- {axis} -->" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def right(model, data):
    """The share of samples whose class is right."""
    x, y = data
    assert not model.training and not torch.is_grad_enabled()
    return (model(x).argmax(-1) == y).float().mean()


def test_a_metric_of_ones_own_is_measured_beside_the_loss():
    model, (x, y) = cases.mlp(), CASES["mlp"].batch(24)
    model.train()
    found = fp.compare(
        model, ["magnitude", "snip"], [0.3, 0.5], (x[:12], y[:12]), held_out=(x[12:], y[12:]), metric=right
    )
    assert model.training
    for outcome in found.outcomes:
        pruned = copy.deepcopy(model)
        fp.global_prune(pruned, outcome.method, outcome.sparsity, data=(x[:12], y[:12]))
        with torch.no_grad():
            assert outcome.metric == pytest.approx(right(pruned.eval(), (x[12:], y[12:])).item())
    with torch.no_grad():
        assert found.metric == pytest.approx(right(model.eval(), (x[12:], y[12:])).item())
    assert found.table().splitlines()[0].split()[-1] == "metric"
    plain = fp.compare(model, "magnitude", 0.5, (x, y))
    assert (plain.metric, plain.outcomes[0].metric, "metric" in str(plain)) == (None, None, False)


class Hits:
    """A metric as torchmetrics and torcheval make them."""

    def __init__(self):
        self.right = self.seen = 0

    def reset(self):
        self.__init__()

    def update(self, output, target):
        self.right += (output.argmax(-1) == target).sum()
        self.seen += len(target)

    def compute(self):
        return self.right / self.seen


@pytest.mark.parametrize("kind", ["written here", "torchmetrics"])
@pytest.mark.parametrize("form", ["pair", "dict"])
def test_a_metric_that_is_fed_batch_by_batch_is_fed_and_keeps_its_state(kind, form):
    model, (x, y) = cases.mlp(), CASES["mlp"].batch(24)
    metric = (
        Hits() if kind == "written here" else pytest.importorskip("torchmetrics").Accuracy("multiclass", num_classes=3)
    )
    metric.update(torch.eye(3), torch.tensor([1, 1, 2]))
    before = float(metric.compute())
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    data = batches if form == "pair" else [{"input": a, "labels": b} for a, b in batches]
    found = fp.compare(model, ["magnitude", "snip"], 0.5, data, loss=torch.nn.functional.cross_entropy, metric=metric)
    with torch.no_grad():
        assert found.metric == pytest.approx(right(model.eval(), (x, y)).item())
    for outcome in found.outcomes:
        pruned = copy.deepcopy(model)
        fp.global_prune(pruned, outcome.method, 0.5, data=batches)
        with torch.no_grad():
            assert outcome.metric == pytest.approx(right(pruned.eval(), (x, y)).item())
    assert float(metric.compute()) == before


def test_a_collection_of_metrics_is_no_number_and_said():
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.MetricCollection([torchmetrics.Accuracy("multiclass", num_classes=3)])
    with pytest.raises(TypeError, match="metric should give a number, got .'MulticlassAccuracy'"):
        fp.compare(cases.mlp(), "magnitude", 0.5, CASES["mlp"].batch(6), metric=metric)


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("accuracy", "metric should be a function of .model, data."),
        (Hits, "got the class Hits: make one"),
        (lambda *_: "much", "metric should give a number"),
    ],
)
def test_what_is_no_metric_is_said(metric, text):
    model = cases.mlp()
    with pytest.raises(TypeError, match=text):
        fp.compare(model, "magnitude", 0.5, CASES["mlp"].batch(6), metric=metric)
    assert not fp.masks(model)
