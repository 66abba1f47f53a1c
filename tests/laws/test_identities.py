"""The statements about gradient flow that the measures rest on, integrated and differenced numerically."""

import oracles
import pytest
import torch
from cases import CASES

import torch_flowprune as fp

CASE = CASES["mlp"]
BATCHES = CASE.batches((6, 4))


def at(theta):
    """The net at a point of the flow."""
    model = CASE.model()
    model.load_state_dict(theta)
    return model


def gradient(theta):
    return fp.flow(at(theta), BATCHES, needs=("g",))


def moved(theta, direction, step):
    return {name: value + step * direction[name] for name, value in theta.items()}


def velocity(theta):
    return {name: -value for name, value in gradient(theta).g.items()}


def rk4(theta, step):
    """One step of dθ/dt = −g."""
    k1 = velocity(theta)
    k2 = velocity(moved(theta, k1, step / 2))
    k3 = velocity(moved(theta, k2, step / 2))
    k4 = velocity(moved(theta, k3, step))
    return {name: theta[name] + step / 6 * (k1[name] + 2 * k2[name] + 2 * k3[name] + k4[name]) for name in theta}


@pytest.fixture(scope="module")
def here():
    return fp.flow(CASE.model(), BATCHES)


STEP = 1e-3


@pytest.fixture(scope="module")
def around(here):
    """θ a step back and a step ahead in time."""
    return rk4(here.theta, -STEP), rk4(here.theta, STEP)


def norm2(values):
    return sum(value.square().sum().item() for value in values.values())


def dot(one, two):
    return sum((one[name] * two[name]).sum().item() for name in one)


def rate(before, after):
    return (after - before) / (2 * STEP)


def test_b1_the_loss_falls_by_the_squared_gradient(here, around):
    before, after = (gradient(theta).loss for theta in around)
    assert rate(before, after) == pytest.approx(-norm2(here.g), rel=1e-5)


def test_b2_the_norm_of_every_group_moves_by_theta_g(here, around):
    back, ahead = around
    for name, theta in here.theta.items():
        expected = -2 * (theta * here.g[name]).sum().item()
        assert rate(back[name].square().sum().item(), ahead[name].square().sum().item()) == pytest.approx(
            expected, rel=1e-4, abs=1e-8
        ), name


def test_b2_loss_preservation_ranks_weights_by_the_speed_of_their_square(around):
    """Observation 2 of the paper: up to the constant 2 they are equal."""
    back, ahead = around
    score = fp.scores(CASE.model(), "loss_preservation", BATCHES)["0.weight"]
    speed = ((ahead["0.weight"].square() - back["0.weight"].square()) / (2 * STEP)).abs().flatten()
    torch.testing.assert_close(2 * score, speed, rtol=1e-3, atol=1e-7)


def test_b3_the_gradient_moves_by_minus_Hg(here, around):
    back, ahead = (gradient(theta).g for theta in around)
    for name, Hg in here.Hg.items():
        torch.testing.assert_close((ahead[name] - back[name]) / (2 * STEP), -Hg, rtol=1e-4, atol=1e-7)
    assert rate(norm2(back), norm2(ahead)) == pytest.approx(-2 * dot(here.g, here.Hg), rel=1e-4)


def test_b4_the_second_derivative_of_the_norm(here, around):
    back, ahead = around
    for name, theta in here.theta.items():
        second = (ahead[name].square().sum() - 2 * theta.square().sum() + back[name].square().sum()).item() / STEP**2
        expected = 2 * (here.g[name].square().sum() + (theta * here.Hg[name]).sum()).item()
        assert second == pytest.approx(expected, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "4.bias"])
def test_b5_shrinking_a_group_changes_loss_and_gradient_norm_as_predicted(here, name):
    eps = 1e-5
    less = {**here.theta, name: here.theta[name] * (1 - eps)}
    more = {**here.theta, name: here.theta[name] * (1 + eps)}
    one, two = gradient(more), gradient(less)
    assert (two.loss - one.loss) / (2 * eps) == pytest.approx(-(here.theta[name] * here.g[name]).sum().item(), rel=1e-6)
    change = (norm2(two.g) - norm2(one.g)) / (2 * eps)
    assert change == pytest.approx(-2 * (here.theta[name] * here.Hg[name]).sum().item(), rel=1e-6)


def test_b5_all_scores_add_up_to_the_quadratic_form(here):
    """Σ θ·Hg over everything is θᵀHg, by the whole Hessian."""
    expected = oracles.dense(CASE.model(), BATCHES)
    total = sum(
        value.sum().item() for value in fp.scores(CASE.model(), "gradient_norm_increase", BATCHES, include="*").values()
    )
    biases = sum((here.theta[name] * here.Hg[name]).sum().item() for name in here.theta if "bias" in name)
    quadratic = oracles.flatten(here.theta) @ expected.H @ oracles.flatten(expected.g)
    assert total + biases == pytest.approx(quadratic.item(), rel=1e-10)


def test_b6_filter_scores_are_sums_of_weight_scores():
    model = CASE.model()
    weights = fp.scores(model, "gradient_norm_increase", BATCHES)
    filters = fp.scores(model, "gradient_norm_increase", BATCHES, granularity="filter")
    for name, module in model.named_modules():
        if (key := f"{name}.weight") in weights:
            torch.testing.assert_close(filters[key], weights[key].view(module.weight.shape).sum(1))


def test_b7_what_is_pruned_scores_zero_and_is_not_the_lowest():
    model = CASE.model()
    fp.global_prune(model, sparsity=0.5)
    found = fp.scores(model, "gradient_norm_increase", BATCHES)
    for name, score in found.items():
        mask = model.get_submodule(name.rpartition(".")[0]).weight_mask.flatten()
        assert not score[~mask].any()
    assert min(score.min().item() for score in found.values()) < 0


def test_b8_the_distance_moved_bounds_the_fall_of_the_loss(here):
    """‖θ_p(T) − θ_p(0)‖² ≤ T ∫‖g_p‖² dt, and ∫‖g‖² dt = L(0) − L(T)."""
    steps, step = 40, 0.05
    theta, trail = here.theta, [gradient(here.theta)]
    for _ in range(steps):
        theta = rk4(theta, step)
        trail.append(gradient(theta))

    def integral(values):
        return step * (sum(values) - (values[0] + values[-1]) / 2)

    assert integral([norm2(point.g) for point in trail]) == pytest.approx(trail[0].loss - trail[-1].loss, rel=1e-3)
    for name in theta:
        moved2 = (theta[name] - here.theta[name]).square().sum().item()
        assert (
            0 < moved2 <= steps * step * integral([point.g[name].square().sum().item() for point in trail]) * (1 + 1e-6)
        )
