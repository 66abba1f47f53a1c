"""Scores as a value: what they are, many from one flow, saved, loaded, printed, and what they refuse."""

import math
from functools import partial

import cases
import oracles
import pytest
import torch
from cases import CASES, every_case
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of
from torch_flowprune.scoring import measure_lookup

ALL = list(fp.MEASURES)


def options(case):
    """What every measure together needs."""
    return {"data": case.batches((4, 3)), "theta0": case.model(seed=9).state_dict()}


def oracle_flow(model, case):
    """Every ingredient by the oracles, by name."""
    batches = case.batches((4, 3))
    dense = oracles.dense(model, batches)
    single = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(y))]
    return {
        "theta": oracles.trainable(model),
        "theta0": dict(case.model(seed=9).named_parameters()),
        "g": dense.g,
        "Hg": dense.Hg,
        "g2": oracles.squared_gradients(model, batches),
        "g2_sample": oracles.squared_gradients(model, single),
    }


@every_case
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_scores_are_the_papers(case, granularity):
    """Every measure on every net, written out naively over the dense derivatives."""
    model = case.model()
    expected, known = oracle_flow(model, case), parameters_of(model)
    found = fp.scores(
        model,
        [name for name in ALL if set(measure_lookup.needs(name)) <= set(expected)],
        granularity=granularity,
        **options(case),
    )
    for method, scores in found.items():
        assert list(scores) == [target.name for target in known.values() if target.is_default]
        for name, value in scores.items():
            reads = [expected[kind][name].detach() for kind in measure_lookup.needs(method)]
            axis = known[name].output_axis
            rows = [x.reshape(-1, 1) if granularity == "weight" else x.movedim(axis, 0) for x in reads]
            torch.testing.assert_close(
                value, oracles.PAPER[method](*rows), rtol=1e-5 if case.name == "gate" else 1e-8, atol=1e-16
            )


@every_case
def test_many_measures_of_one_flow_are_those_one_by_one(case, monkeypatch):
    model, given = case.model(), options(case)
    given["example_inputs"] = given["data"][0][0]
    seen = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *args: seen.append(1) or forward(self, *args))
    torch.manual_seed(3)
    together = fp.scores(model, ALL, **given)
    sweeps = len(seen)
    assert list(together) == ALL
    for method in ALL:
        torch.manual_seed(3)
        alone = fp.scores(model, method, **given)
        assert alone.method == together[method].method == method
        for name in alone:
            torch.testing.assert_close(alone[name], together[method][name], rtol=1e-9, atol=1e-15)
    alone = 7 if case.name in ("tied", "attention") else 0  # of what is used twice, or inside one function of torch's
    assert sweeps == 2 + 2 + 3 + alone + 1 + 2 + 2, (
        "two sweeps of two batches, two samples one by one and at once; one input of ones; forwards for the inputs of "
        "layers, and a sweep for the diagonal"
    )


@pytest.mark.parametrize(
    ("method", "batches", "forwards"),
    [
        ("magnitude", 3, 0),
        ("random", 3, 0),
        ("taylor", 3, 3),
        ("fisher", 3, 3),
        ("grasp", 3, 6),
        ("grasp", 1, 1),
        ("synflow", 3, 1),
    ],
)
def test_no_more_sweeps_than_a_measure_needs(method, batches, forwards):
    model, seen = cases.mlp(), []
    model.register_forward_pre_hook(lambda *args: seen.append(1))
    fp.scores(model, method, CASES["mlp"].batches((4,) * batches))
    assert len(seen) == forwards


def test_aliases_keep_the_name_they_were_asked_by():
    found = fp.scores(cases.mlp(), ("snip", "l2"), CASES["mlp"].batch(3))
    assert list(found) == ["snip", "l2"]
    assert [value.method for value in found.values()] == ["loss_preservation", "magnitude"]


def test_any_iterable_of_measures_gives_them_all():
    methods = ["magnitude", "l1"]
    for several in (methods, tuple(methods), iter(methods), dict.fromkeys(methods)):
        assert list(fp.scores(cases.mlp(), several)) == methods


def test_two_functions_of_one_name_are_an_error_not_one_lost():
    with pytest.raises(
        ValueError,
        match="scores come back by name, and these are asked for: <lambda>, <lambda>; name each once, and give each",
    ):
        fp.scores(cases.mlp(), [lambda theta: theta.sum(-1), lambda theta: theta.prod(-1)])


def test_a_users_measure():
    def soft(theta, g, power=0.5):
        return (theta * g).abs().pow(power).sum(-1)

    model, batch = cases.cnn(), CASES["cnn"].batch(4)
    point = fp.flow(model, batch, needs=("g",))
    found = fp.scores(model, soft, batch, granularity="filter")
    assert found.method == "soft"
    for name, value in found.items():
        torch.testing.assert_close(value, (point.theta[name] * point.g[name]).abs().sqrt().flatten(1).sum(1))


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (
            lambda theta: theta.abs(),
            (
                r"the measure '<lambda>' gave \(20, 1\) for '0.weight': expected a score per unit, shape \(20,\); "
                r"reduce the last axis"
            ),
        ),
        (lambda theta: theta.sum(), r"gave \(\) for '0.weight'"),
        (lambda theta: 3.0, "gave float for '0.weight'"),
        (
            lambda theta: theta.sum(-1) / 0,
            (
                "the <lambda> scores of 0.weight, 2.weight, 4.weight are not all finite: a weight or derivative "
                "there is nan or inf"
            ),
        ),
    ],
)
def test_a_users_measure_that_is_wrong(measure, text):
    with pytest.raises(ValueError, match=text):
        fp.scores(cases.mlp(), measure)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_their_layer(value):
    model = cases.mlp()
    model[2].weight.data[1, 1] = value
    with pytest.raises(
        ValueError, match=r"the magnitude scores of 2.weight are not all finite: .* try model.double\(\)"
    ):
        fp.scores(model, "magnitude")


def test_a_nan_that_is_pruned_already_does_no_harm():
    model = cases.mlp()
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 1] = False
    fp.apply_masks(model, {"2.weight": mask})
    model[2].weight_orig.data[1, 1] = math.nan
    assert fp.scores(model, "magnitude")["2.weight"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(dtype):
    """θ·g of 1e-9 is no zero, as it would be in float16."""
    model = nn.Linear(8, 2, bias=False).to(dtype)
    nn.init.constant_(model.weight, 2**-12)
    found = fp.scores(model, "taylor", torch.ones(1, 8, dtype=dtype), closure=lambda m, x: m(x).sum() * 2**-18)
    assert found["weight"].dtype is torch.float32
    assert found["weight"].tolist() == [2**-30] * 16


def test_random_repeats_with_a_seed_or_a_generator():
    model = cases.mlp()
    torch.manual_seed(1)
    one, two = fp.scores(model, "random"), fp.scores(model, "random")
    torch.manual_seed(1)
    assert torch.equal(one["0.weight"], fp.scores(model, "random")["0.weight"])
    assert not torch.equal(one["0.weight"], two["0.weight"]), "torch's generator goes on"
    assert not torch.equal(one["0.weight"][:12], one["4.weight"]), "each layer draws its own"
    source = torch.Generator().manual_seed(5)
    first, second = (fp.scores(model, "random", generator=source)["0.weight"] for _ in range(2))
    assert not torch.equal(first, second), "a generator given goes on"
    assert torch.equal(first, fp.scores(model, "random", generator=torch.Generator().manual_seed(5))["0.weight"])
    with pytest.raises(TypeError, match=r"generator should be a torch.Generator on the CPU .*, got 3"):
        fp.scores(model, "random", generator=3)


@pytest.mark.parametrize(
    "call",
    [fp.scores, partial(fp.global_prune, sparsity=0.5), fp.diagnose],
    ids=["scores", "global_prune", "diagnose"],
)
def test_distance_without_a_reference_point(call):
    model = cases.mlp()
    with pytest.raises(
        ValueError,
        match=r"reads theta0, the parameters at a reference point: pass theta0=, a state dict taken at initialisation",
    ):
        call(model, method="distance_biased_loss_preservation", data=_Unread())
    assert not fp.masks(model)


class _Unread(list):
    """Data that nobody may read: what is missing is said before."""

    def __iter__(self):
        raise AssertionError("the data were read first")


def test_gradient_measures_without_data():
    with pytest.raises(ValueError, match="this needs data: pass data="):
        fp.scores(cases.mlp(), "taylor")


def test_blocks_are_scored_weight_by_weight():
    model = nn.Conv2d(4, 3, 2)
    found = fp.scores(model, granularity="2:4")
    assert found.granularity == "2:4"
    torch.testing.assert_close(found["weight"], model.weight.detach().abs().movedim(1, -1).flatten())


def test_layers_that_blocks_do_not_fit_stay_out():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.warns(
        UserWarning, match="the input axis of 1.weight does not divide into whole blocks of 2:4: they stay dense"
    ):
        assert list(fp.scores(model, granularity="2:4")) == ["0.weight"]
    with pytest.raises(
        ValueError, match="the input axis of 1.weight does not divide into whole blocks of 2:4: leave them out"
    ):
        fp.scores(model, granularity="2:4", parameters=[(model[1], "weight")])
    with pytest.raises(ValueError, match="leave them out"):
        fp.scores(nn.Linear(6, 4), granularity="2:4")


# importance_scores


def test_importance_scores_go_into_torchs_pruning():
    model, batch = cases.mlp(), CASES["mlp"].batch(6)
    scores = fp.importance_scores(model, "gradient_norm_increase", batch)
    assert list(scores) == [(model[0], "weight"), (model[2], "weight"), (model[4], "weight")]
    flat = fp.scores(model, "gradient_norm_increase", batch)
    assert all(
        torch.equal(value.flatten(), flat[f"{i}.weight"]) for i, value in zip((0, 2, 4), scores.values(), strict=True)
    )
    prune.global_unstructured(scores.keys(), fp.GradientNormIncreaseUnstructured, scores, amount=10)
    expected = oracles.lowest(list(flat.values()), 10)
    assert [model[i].weight_mask.bool().flatten().tolist() for i in (0, 2, 4)] == [keep.tolist() for keep in expected]


def test_importance_scores_of_chosen_parameters():
    model = cases.mlp()
    pairs = [(model[2], "weight"), (model[0], "bias")]
    assert set(fp.importance_scores(model, parameters=pairs)) == set(pairs)
    assert set(fp.importance_scores(model, parameters=iter(pairs))) == set(pairs), "pairs may come from a generator"
    assert list(fp.importance_scores(model, exclude="0")) == [(model[2], "weight"), (model[4], "weight")]


def test_importance_scores_are_of_single_weights():
    with pytest.raises(ValueError, match="prune.global_unstructured prunes single weights: leave granularity= out"):
        fp.importance_scores(cases.mlp(), granularity="filter")


# The value


def test_scores_are_a_mapping():
    found = fp.scores(cases.mlp())
    assert len(found) == 3
    assert "0.weight" in found
    assert found["0.weight"].shape == (20,)
    with pytest.raises(KeyError):
        found["0"]


def test_print():
    text = str(fp.scores(cases.mlp(), "magnitude", granularity="filter"))
    head, columns, *rows = text.splitlines()
    assert head == "magnitude scores of 12 units (filter)"
    assert columns.split() == ["parameter", "units", "lowest", "median", "highest", "zero"]
    assert [row.split()[:2] for row in rows] == [["0.weight", "5"], ["2.weight", "4"], ["4.weight", "3"]]


def test_save_and_load(tmp_path):
    pytest.importorskip("safetensors")
    found = fp.scores(cases.mlp(), "grasp", CASES["mlp"].batch(4), granularity="filter")
    found.save(tmp_path / "scores.safetensors")
    again = fp.Scores.load(tmp_path / "scores.safetensors")
    assert (again.method, again.granularity, list(again)) == ("gradient_norm_increase", "filter", list(found))
    assert all(torch.equal(again[name], found[name]) for name in found)
    report = fp.global_prune(cases.mlp(), scores=again, sparsity=0.5)
    assert (report.method, report.granularity, report.pruned) == ("gradient_norm_increase", "filter", 6)


def test_load_of_another_file(tmp_path):
    torch_file = pytest.importorskip("safetensors.torch")
    torch_file.save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors holds no scores: expected a file written by Scores.save"):
        fp.Scores.load(tmp_path / "other.safetensors")


def test_temperature_changes_the_ranking():
    """At T = 200 the curvature of the logits decides, at T = 1 the Gauss-Newton part does (paper_facts A1)."""
    model, batches = cases.mlp(), CASES["mlp"].batches((8, 8))
    hot, cold = (fp.scores(model, "grasp", batches, temperature=t)["0.weight"] for t in (200.0, 1.0))
    assert hot.abs().max() < 1e-3 * cold.abs().max()
    assert hot.argsort().tolist() != cold.argsort().tolist()


def test_scoring_a_pruned_model_is_scoring_its_effective_weights():
    model, batches = cases.cnn(), CASES["cnn"].batches((4, 3))
    fp.global_prune(model, sparsity=0.5)
    before = fp.scores(model, ["taylor", "magnitude", "grasp"], batches)
    dense = fp.remove(model)
    after = fp.scores(dense, ["taylor", "magnitude"], batches)
    for method, expected in after.items():
        for name, value in expected.items():
            torch.testing.assert_close(before[method][name], value, rtol=1e-10, atol=1e-15)


def test_hg_of_a_pruned_model_is_within_what_is_left():
    """The pruned coordinates take no part: H·g is that of the smaller net."""
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 3))
    fp.global_prune(model, sparsity=0.5)
    found = oracles.flatten(fp.flow(model, batches).Hg)
    kept = torch.cat(
        [
            (target.mask if target.mask is not None else torch.ones_like(target.theta).bool()).flatten()
            for target in parameters_of(model).values()
        ]
    )
    dense = oracles.dense(fp.remove(model), batches)
    g = oracles.flatten(dense.g) * kept
    torch.testing.assert_close(found, (dense.H @ g) * kept, rtol=1e-9, atol=1e-14)


def test_closure_and_options_reach_the_flow():
    model, (x, y) = cases.mlp(), CASES["mlp"].batch(6)
    by_closure = fp.scores(
        model, "taylor", {"x": x, "y": y}, closure=lambda m, b: F.cross_entropy(m(b["x"])[:2] / 3, b["y"][:2])
    )
    by_options = fp.scores(model, "taylor", [(x, y)], max_samples=2, temperature=3.0, loss=F.cross_entropy)
    for name, value in by_options.items():
        torch.testing.assert_close(by_closure[name], value, rtol=1e-10, atol=1e-15)


@pytest.mark.filterwarnings("ignore::torch_flowprune.TiedScoresWarning")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_numbers_that_have_no_real_gradient(dtype):
    """Their size can be ranked; a derivative of them is refused, with a way out."""
    layer = nn.Linear(4, 4, bias=False)
    value = torch.randn(4, 4) * 50
    layer.weight = nn.Parameter(
        torch.complex(value, value.flip(0)) if dtype.is_complex else value.to(dtype), requires_grad=False
    )
    model = nn.Sequential(nn.Linear(4, 4), layer)
    found = fp.scores(model, "magnitude")
    torch.testing.assert_close(found["1.weight"], layer.weight.abs().float().flatten())
    assert fp.global_prune(model, amount=5, include="1").pruned == 5
    with pytest.raises(
        ValueError,
        match=f"1.weight: derivatives are of real numbers, not {dtype}; use a measure that reads only theta, ",
    ):
        fp.scores(model, "taylor", torch.ones(1, 4), closure=lambda m, x: m[0](x).sum())
    assert list(fp.scores(model, "taylor", torch.ones(1, 4), closure=lambda m, x: m[0](x).sum(), exclude="1")) == [
        "0.weight"
    ]
