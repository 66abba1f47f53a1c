"""The flow's tools on a model that is pruned already: only what is left is judged."""

import cases
import pytest
import torch
from cases import CASES
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.analysis.rank_correlation import spearman

BATCHES = CASES["cnn"].batches((4, 3))


def pruned(granularity="weight"):
    model = cases.cnn()
    fp.global_prune(model, "magnitude", 0.5, granularity=granularity)
    return model


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_zeros_and_stability_are_of_the_units_that_are_left(granularity):
    model = pruned(granularity)
    found = fp.diagnose(model, BATCHES, granularity=granularity)
    parts = [
        fp.scores(model, "loss_preservation", part, granularity=granularity)
        for part in (BATCHES, BATCHES[:1], BATCHES[1:])
    ]
    masks = {
        name: mask if granularity == "weight" else mask.flatten(1).any(1) for name, mask in fp.masks(model).items()
    }
    whole, *halves = (
        torch.cat([part[name][masks[name].flatten()] if name in masks else part[name] for name in part])
        for part in parts
    )
    assert found.total.zero_share == (whole == 0).double().mean().item() < 0.25
    assert found.total.stability == pytest.approx(spearman(*halves), abs=1e-12)


def test_correlation_is_over_the_units_that_are_left():
    model = pruned()
    found = fp.compare(model, ["magnitude", "taylor"], [0.7], BATCHES).correlation["magnitude"]["taylor"]
    scores, masks = fp.scores(model, ["magnitude", "taylor"], BATCHES), fp.masks(model)
    both = (torch.cat([value[name][mask.flatten()] for name, mask in masks.items()]) for value in scores.values())
    assert found == pytest.approx(spearman(*both), abs=1e-12)


def test_random_rounds_go_on_from_a_saved_state():
    """Drawn from the pruner's own generator, whose place is part of the state."""

    def make(model):
        return fp.Pruner(model, "random", 0.8, rounds=3, generator=torch.Generator().manual_seed(4))

    one, other = cases.cnn(), cases.cnn()
    whole, first = make(one), make(other)
    for pruner, times in ((whole, 3), (first, 1)):
        for _ in range(times):
            pruner.step()
    resumed = make(other)
    resumed.load_state_dict(first.state_dict())
    resumed.step()
    resumed.step()
    assert all(torch.equal(mask, fp.masks(other)[name]) for name, mask in fp.masks(one).items())


# Scaling a group to (1 − ε) of itself: the expansion that predictions stop at, and the identities behind it.


def scaled(model, masks, step):
    known = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            known[name].copy_(torch.where(mask, known[name], (1 - step) * known[name]))
    return model


def loss_and_norm(model, batches):
    loss = sum(len(y) * F.cross_entropy(model(x), y) for x, y in batches) / sum(len(y) for _, y in batches)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), sum(g.square().sum().item() for g in grads)


def slope(errors, steps):
    logs = torch.tensor([errors, steps], dtype=torch.float64).log()
    return ((logs[0, 0] - logs[0, -1]) / (logs[1, 0] - logs[1, -1])).item()


@pytest.mark.parametrize("name", ["mlp", "residual", "attention"])
def test_the_errors_of_the_expansions_fall_as_they_should(name):
    """Of the loss with ε³, of its first order with ε², and of ‖g‖² to first order with ε²."""
    case = CASES[name]
    batches, source = case.batches((5, 4)), torch.Generator().manual_seed(1)
    masks = {
        key: torch.rand(p.shape, generator=source) < 0.5 for key, p in case.model().named_parameters() if p.dim() > 1
    }
    found, (loss, norm) = fp.predict(case.model(), masks, batches), loss_and_norm(case.model(), batches)
    steps = [2.0**-k for k in range(5, 9)]
    errors = {"second": [], "first": [], "norm": []}
    for step in steps:
        now, then = loss_and_norm(scaled(case.model(), masks, step), batches)
        errors["first"].append(abs(now - loss - step * found.first_order))
        errors["second"].append(abs(now - loss - step * found.first_order - step**2 * found.curvature))
        errors["norm"].append(abs(then - norm - step * found.gradient_norm_change))
    assert slope(errors["first"], steps) == pytest.approx(2, abs=0.2)
    assert slope(errors["second"], steps) == pytest.approx(3, abs=0.3)
    assert slope(errors["norm"], steps) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_a_diagnosis_is_how_the_norms_move_along_the_flow(name):
    """One short step of dθ/dt = −g forwards and one backwards: central differences of ‖θ‖² layer by layer."""
    case, h = CASES[name], 1e-3
    batches = case.batches((5, 4))
    found = fp.diagnose(case.model(), batches)

    def velocity(parameters, model):
        with torch.no_grad():
            for p, value in zip(model.parameters(), parameters, strict=True):
                p.copy_(value)
        loss = sum(len(y) * F.cross_entropy(model(x), y) for x, y in batches) / 9
        return [-g for g in torch.autograd.grad(loss, list(model.parameters()))]

    def after(time):  # one Runge-Kutta step
        model = case.model()
        start = [p.detach().clone() for p in model.parameters()]
        k1 = velocity(start, model)
        k2 = velocity([s + time / 2 * k for s, k in zip(start, k1, strict=True)], model)
        k3 = velocity([s + time / 2 * k for s, k in zip(start, k2, strict=True)], model)
        k4 = velocity([s + time * k for s, k in zip(start, k3, strict=True)], model)
        ends = [s + time / 6 * (a + 2 * b + 2 * c + d) for s, a, b, c, d in zip(start, k1, k2, k3, k4, strict=True)]
        return {
            key: value.square().sum().item() for (key, _), value in zip(model.named_parameters(), ends, strict=True)
        }

    back, now, ahead = after(-h), after(0.0), after(h)
    for layer in found.layers:
        assert layer.theta_norm == pytest.approx(now[layer.name], rel=1e-12)
        assert layer.theta_norm_rate == pytest.approx(
            (ahead[layer.name] - back[layer.name]) / (2 * h), rel=1e-4, abs=1e-6
        )
        second = (ahead[layer.name] - 2 * now[layer.name] + back[layer.name]) / h**2
        assert layer.theta_norm_acceleration == pytest.approx(second, rel=1e-3, abs=1e-5)
