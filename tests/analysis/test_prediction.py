"""What a mask is predicted to cost, against the dense Hessian and against cutting it."""

import copy
import math

import cases
import oracles
import pytest
import torch
from cases import CASES, every_case
from torch import nn

import torch_flowprune as fp


def random_masks(model, seed=0):
    source = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=source) < 0.6 for name, p in model.named_parameters() if p.dim() > 1}


@every_case
@pytest.mark.parametrize("sizes", [(6,), (5, 2, 3)], ids=["one batch", "uneven"])
def test_every_term_is_the_dense_one(case, sizes):
    model, batches = case.model(), case.batches(sizes)
    masks, dense = random_masks(model), oracles.dense(model, batches)
    theta = oracles.trainable(model)
    v = oracles.flatten(
        {
            name: torch.where(masks[name], 0, value) if name in masks else torch.zeros_like(value)
            for name, value in theta.items()
        }
    )
    g, tolerance = oracles.flatten(dense.g), 100 * case.tolerance
    found = fp.predict(model, masks, batches)
    assert found.samples == sum(sizes)
    assert found.loss == pytest.approx(dense.loss, rel=tolerance)
    assert found.first_order == pytest.approx(-(v @ g).item(), rel=tolerance, abs=1e-12)
    assert found.curvature == pytest.approx((v @ dense.H @ v).item() / 2, rel=tolerance, abs=1e-12)
    assert found.gradient_norm == pytest.approx((g @ g).item(), rel=tolerance)
    assert found.gradient_norm_change == pytest.approx(-2 * (v @ dense.H @ g).item(), rel=tolerance, abs=1e-12)
    assert found.gradient_norm_curvature == pytest.approx((dense.H @ v).square().sum().item(), rel=tolerance, abs=1e-12)
    kept = oracles.flatten(
        {name: masks.get(name, torch.ones_like(value).bool()) for name, value in theta.items()}
    ).bool()
    assert found.gradient_norm_lost == pytest.approx(
        (g - dense.H @ v)[~kept].square().sum().item(), rel=tolerance, abs=1e-12
    )
    assert found.pruned_gradient_norm == pytest.approx(
        (g - dense.H @ v)[kept].square().sum().item(), rel=tolerance, abs=1e-12
    )
    assert found.loss_change == found.first_order + found.curvature
    masked = torch.cat([theta[name].flatten() for name in masks])
    assert found.removed_norm == pytest.approx((v.norm() / masked.norm()).item(), rel=1e-10)


def test_the_error_bar():
    """The standard error of a sample-weighted mean over equal batches is that of their values."""
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 4, 4, 4))
    masks, theta = random_masks(model), oracles.trainable(model)
    each = []
    for batch in batches:
        g = oracles.gradients(model, [batch])
        each.append(-sum((theta[name] * g[name])[~mask].sum().item() for name, mask in masks.items()))
    found = fp.predict(model, masks, batches)
    assert found.standard_error == pytest.approx(torch.tensor(each, dtype=torch.float64).std().item() / 2, rel=1e-9)
    assert found.error == 2 * found.standard_error + abs(found.curvature)
    single = fp.predict(model, masks, batches[0])
    assert math.isnan(single.standard_error)
    assert single.error == abs(single.curvature)
    assert single.gradient_norm_error == single.gradient_norm_curvature > 0


def test_of_a_quadratic_loss_the_prediction_is_exact():
    """Linear least squares: its gradient is linear in θ."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False).double()
    data, loss = [(torch.randn(6, 4).double(), torch.randn(6, 2).double())], nn.functional.mse_loss
    masks = {"weight": torch.rand(2, 4) < 0.5}
    found = fp.predict(model, masks, data, loss=loss)
    fp.apply_masks(model, masks)
    after = fp.flow(model, data, loss=loss, needs=("g",))
    assert (after.g["weight"] ** 2).sum().item() == pytest.approx(found.pruned_gradient_norm, rel=1e-10)
    assert after.loss == pytest.approx(found.loss + found.loss_change, rel=1e-10)


def test_second_order_is_better_than_first():
    model, batches = cases.mlp(), CASES["mlp"].batches((6, 4))
    for p in (model[2].weight,):
        p.data *= 0.1
    masks = {"2.weight": torch.zeros(4, 5, dtype=torch.bool)}
    found = fp.predict(model, masks, batches)
    before = oracles.dense(model, batches).loss
    fp.apply_masks(model, masks)
    actual = oracles.dense(fp.remove(model), batches).loss - before
    assert abs(found.loss_change - actual) < 0.2 * abs(found.first_order - actual)


def test_what_is_masked_already_costs_nothing():
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 3))
    fp.global_prune(model, sparsity=0.5)
    found = fp.predict(model, fp.masks(model), batches)
    assert (found.first_order, found.curvature, found.gradient_norm_change, found.removed_norm) == (0, 0, 0, 0)
    assert found.pruned_gradient_norm == pytest.approx(found.gradient_norm, rel=1e-12), (
        "there it has no gradient already"
    )


def test_the_text_holds_every_number():
    text = str(fp.predict(cases.mlp(), random_masks(cases.mlp()), CASES["mlp"].batches((4, 3))))
    for part in ("predicted change", "first order", "curvature", "standard error", "‖g‖²", "‖v‖/‖θ‖", "7 samples"):
        assert part in text


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ({"nope": torch.ones(2).bool()}, "nope"),
        ({"0.weight": torch.ones(2).bool()}, "0.weight"),
        ({"0.weight": torch.ones(5, 4)}, "bool|packed"),
    ],
)
def test_masks_that_do_not_fit(masks, text):
    with pytest.raises(ValueError, match=text):
        fp.predict(cases.mlp(), masks, CASES["mlp"].batch(3))


def test_a_report_predicts_the_same():
    """global_prune's first-order terms are those of predict for the masks it chose."""
    model, batches = cases.cnn(), CASES["cnn"].batches((4, 3))
    copy = cases.cnn()
    report = fp.global_prune(copy, "gradient_norm_preservation", 0.3, data=batches)
    found = fp.predict(model, fp.masks(copy), batches)
    assert found.first_order == pytest.approx(report.predicted_loss_change, rel=1e-9)
    assert found.gradient_norm_change == pytest.approx(report.predicted_gradient_norm_change, rel=1e-9)


@pytest.mark.parametrize("frozen", [(), (0,), (0, 2), (4,)], ids=str)
@pytest.mark.parametrize("include", ["2", "*"])
def test_a_report_and_a_prediction_have_one_gradient_norm(frozen, include):
    """That over what requires a gradient and what is masked: a frozen layer that is not asked for is a constant."""
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 3))
    for index in frozen:
        model[index].requires_grad_(False)
    pruned = copy.deepcopy(model)
    report = fp.global_prune(pruned, "grasp", 0.5, data=batches, include=f"{include}.weight")
    found = fp.predict(model, fp.masks(pruned), batches)
    assert found.gradient_norm_change == pytest.approx(report.predicted_gradient_norm_change, rel=1e-9)
    assert found.first_order == pytest.approx(report.predicted_loss_change, rel=1e-9)
    proposed = fp.diagnose(model, batches, masks=fp.masks(pruned)).prediction
    for word in ("gradient_norm", "gradient_norm_change", "gradient_norm_curvature", "gradient_norm_lost"):
        assert getattr(proposed, word) == pytest.approx(getattr(found, word), rel=1e-9), word
    g = fp.flow(model, batches, needs=("g",), parameters=fp.masks(pruned)).g
    assert found.gradient_norm == pytest.approx(sum(value.square().sum().item() for value in g.values()), rel=1e-9)


def test_a_frozen_model_can_be_asked():
    batches = CASES["mlp"].batches((4, 3))
    frozen = cases.mlp().requires_grad_(False)
    found, whole = (fp.predict(model, random_masks(model), batches) for model in (frozen, cases.mlp()))
    expected = (whole.first_order, whole.curvature, whole.loss)
    assert (found.first_order, found.curvature, found.loss) == pytest.approx(expected, rel=1e-12)
    assert found.gradient_norm < whole.gradient_norm, "biases are constants now"
    assert not any(p.requires_grad for p in frozen.parameters())
    assert isinstance(frozen[0], nn.Linear)
