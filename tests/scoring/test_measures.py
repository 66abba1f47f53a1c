"""Each formula against a loop over single numbers, and how a measure is named, found and refused."""

import oracles
import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.scoring import measure_lookup, measures

FORMULAS = [name for name in fp.MEASURES if name != "random"]


def rows(name, *shape):
    values = {
        kind: torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, kind in enumerate(measure_lookup.needs(name))
    }
    return {kind: value.square() if kind.startswith(("g2", "x2")) else value for kind, value in values.items()}


def test_every_formula_has_an_oracle():
    assert set(FORMULAS) == set(oracles.PAPER)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_is_the_papers(name):
    arguments = rows(name, 7, 5)
    torch.testing.assert_close(fp.MEASURES[name](**arguments), oracles.PAPER[name](**arguments), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_reduces_only_the_last_axis(name):
    arguments = rows(name, 2, 3, 4)
    found = fp.MEASURES[name](**arguments)
    assert found.shape == (2, 3)
    each = [fp.MEASURES[name](**{kind: value[i] for kind, value in arguments.items()}) for i in range(2)]
    torch.testing.assert_close(found, torch.stack(each), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", FORMULAS)
def test_zero_parameters_score_zero(name):
    """Identity B.7: every measure is multiplied by theta, so what is gone scores 0, which need not be the lowest."""
    arguments = rows(name, 3, 4)
    arguments["theta"][1] = 0
    assert fp.MEASURES[name](**arguments)[1] == 0


@pytest.mark.parametrize("name", ["gradient_norm_increase", "fisher", "l1", "loss_preservation"])
def test_additive_measures_add_over_a_group(name):
    """Identity B.6: a filter's score is the sum of its weights' where the absolute value stands inside, or nowhere."""
    arguments = rows(name, 4, 6)
    weights = fp.MEASURES[name](**{kind: value.reshape(-1, 1) for kind, value in arguments.items()})
    torch.testing.assert_close(fp.MEASURES[name](**arguments), weights.view(4, 6).sum(-1))


@pytest.mark.parametrize("name", ["taylor", "gradient_norm_preservation"])
def test_absolute_value_outside_is_not_additive(name):
    arguments = rows(name, 4, 6)
    weights = fp.MEASURES[name](**{kind: value.reshape(-1, 1) for kind, value in arguments.items()})
    assert (fp.MEASURES[name](**arguments) < weights.view(4, 6).sum(-1) * 0.999).all()


def test_only_the_signed_measures_give_negative_scores():
    signed = {name for name in FORMULAS if (fp.MEASURES[name](**rows(name, 50, 3)) < 0).any()}
    assert signed == {"gradient_norm_increase", "obd"}


def test_on_single_weights_loss_preservation_is_taylor():
    arguments = rows("taylor", 9, 1)
    assert torch.equal(measures.taylor(**arguments), measures.loss_preservation(**arguments))


def test_random_is_uniform_and_repeats_with_its_seed():
    theta = torch.zeros(10_000, 3)
    one, two = (measures.random(theta, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (10_000,)
    assert 0 <= one.min() < 0.01 < 0.99 < one.max() < 1
    assert abs(one.mean().item() - 0.5) < 0.02
    assert not torch.equal(one, measures.random(theta, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(
    ("alias", "name"),
    [("l2", "magnitude"), ("snip", "loss_preservation"), ("tfo", "taylor"), ("grasp", "gradient_norm_increase")],
)
def test_aliases(alias, name):
    assert measure_lookup.resolve(alias) is fp.MEASURES[name]
    assert measure_lookup.name_of(alias) == name
    assert measure_lookup.needs(alias) == measure_lookup.needs(name)


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("magnitude", ("theta",)),
        ("distance_biased_loss_preservation", ("theta", "theta0", "g")),
        ("gradient_norm_increase", ("theta", "Hg")),
        ("fisher", ("theta", "g2")),
        ("fisher_sample", ("theta", "g2_sample")),
        ("wanda", ("theta", "x2")),
        ("obd", ("theta", "diagH")),
        ("random", ("theta", "generator")),
        ("synflow", ("theta", "gR")),
    ],
)
def test_needs(name, reads):
    assert measure_lookup.needs(name) == reads


def test_a_users_function_is_a_measure():
    def mine(g, theta, power=2, *, Hg=None):
        return (theta * g).abs().pow(power).sum(-1)

    assert measure_lookup.resolve(mine) is mine
    assert measure_lookup.needs(mine) == ("g", "theta", "Hg"), "known names are read even where they have a default"
    assert measure_lookup.name_of(mine) == "mine"


def test_a_measure_may_ask_whose_rows_it_gets():
    """Layer-aware measures: by the name of a parameter, and its whole shape."""
    model, seen = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4)), {}

    def by_fan_in(theta, name, shape, power=2):
        seen[name] = shape
        return theta.abs().sum(-1) / shape[1]

    assert measure_lookup.needs(by_fan_in) == ("theta",)
    found = fp.scores(model, by_fan_in)
    assert seen == {"0.weight": (2, 3), "2.weight": (4, 2)}
    torch.testing.assert_close(found["2.weight"], model[2].weight.detach().abs().flatten() / 2)
    assert fp.global_prune(model, by_fan_in, 0.5).pruned == 7


def test_a_callable_object_is_a_measure():
    class Cubed:
        def __call__(self, theta):
            return theta.abs().pow(3).sum(-1)

    assert measure_lookup.needs(Cubed()) == ("theta",)
    assert measure_lookup.name_of(Cubed()) == "Cubed"


def test_unknown_name_says_what_is_near():
    with pytest.raises(
        ValueError,
        match=r"unknown measure 'magnitud'; did you mean 'magnitude'\? Known: magnitude, l1, .*snip.*or pass a "
        r"function",
    ):
        measure_lookup.resolve("magnitud")


def test_unknown_name_near_nothing_lists_all():
    with pytest.raises(ValueError, match=r"unknown measure 'qqq'. Known: magnitude, .*") as error:
        measure_lookup.resolve("qqq")
    assert all(name in str(error.value) for name in [*fp.MEASURES, *measures.ALIASES])


def test_unknown_argument_says_what_can_be_read():
    with pytest.raises(ValueError, match=r"the measure 'wrong' asks for 'weights'; .*theta, theta0, .*Hg"):
        measure_lookup.resolve(wrong)


def wrong(weights):
    return weights


@pytest.mark.parametrize("method", [3, None, torch.zeros(3)])
def test_neither_name_nor_function(method):
    with pytest.raises(TypeError, match="method should be a measure's name or a function of rows, got"):
        measure_lookup.resolve(method)
