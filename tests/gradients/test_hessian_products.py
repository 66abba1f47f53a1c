"""H·v along any vector, and the diagonal by probes, against the whole Hessian."""

import warnings

import cases
import oracles
import pytest
import torch
from cases import CASES, every_case
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_flowprune as fp

UNEVEN = (5, 2, 1, 3)


@every_case
@pytest.mark.parametrize("sizes", [(6,), UNEVEN], ids=["one batch", "uneven"])
def test_products_are_the_dense_ones(case, sizes):
    model, batches = case.model(), case.batches(sizes)
    expected = oracles.dense(model, batches)
    torch.manual_seed(0)
    v = {name: torch.randn_like(value) for name, value in expected.g.items()}
    found = fp.hessian_vector(model, batches, v)
    oracles.assert_named_close(found, oracles.unflatten(expected.H @ oracles.flatten(v), v), case.tolerance)


def test_along_some_parameters_of_a_pruned_model():
    model, batches = cases.mlp(), CASES["mlp"].batches()
    name = next(name for name, p in model.named_parameters() if p.dim() == 2)
    v = {name: torch.randn_like(dict(model.named_parameters())[name])}
    expected = fp.hessian_vector(model, batches, v)
    fp.global_prune(model, "magnitude", 0)
    oracles.assert_named_close(fp.hessian_vector(model, batches, v), expected)
    oracles.assert_named_close(fp.hessian_vector(model, batches, {f"{name}_orig": v[name]}), expected)


def test_vectors_that_do_not_fit():
    model, batches = cases.mlp(), CASES["mlp"].batches()
    with pytest.raises(ValueError, match="no such parameter: other"):
        fp.hessian_vector(model, batches, {"other": torch.zeros(2)})
    name = next(iter(dict(model.named_parameters())))
    with pytest.raises(ValueError, match=r"should have the parameter's shape .*, got \(7,\)"):
        fp.hessian_vector(model, batches, {name: torch.zeros(7)})
    with pytest.raises(TypeError, match="v should be a mapping of parameter names to tensors"):
        fp.hessian_vector(model, batches, [torch.zeros(7)])


@pytest.mark.parametrize("sizes", [(6,), UNEVEN])
def test_the_diagonal_lies_within_its_error(sizes):
    model, batches = cases.mlp(), CASES["mlp"].batches(sizes)
    expected = oracles.unflatten(oracles.dense(model, batches).H.diagonal(), oracles.trainable(model))
    torch.manual_seed(0)
    found = fp.flow(model, batches, needs=("diagH",), probes=400)
    assert found.samples == sum(sizes)
    for name, value in expected.items():
        sigmas = (found.diagH[name] - value).abs() / found.diagH_error[name].clamp(min=1e-12)
        assert (sigmas < 4.5).all(), name
        assert sigmas.square().mean() < 2.5, name


def test_the_seed_is_torchs_and_more_probes_are_better():
    model, batches = cases.mlp(), CASES["mlp"].batches()
    flows = []
    for probes in (1, 8, 8, 128):
        torch.manual_seed(1)
        flows.append(fp.flow(model, batches, needs=("diagH",), probes=probes))
    one, few, same, many = flows
    assert oracles.flatten(one.diagH_error).isnan().all()
    oracles.assert_named_close(few.diagH, same.diagH, 1e-15)
    assert oracles.flatten(many.diagH_error).norm() < oracles.flatten(few.diagH_error).norm() / 2.5
    with pytest.raises(ValueError, match="probes should be a whole number of at least 1, got 0"):
        fp.flow(model, batches, needs=("diagH",), probes=0)


def test_beside_other_derivatives():
    model, batches = cases.mlp(), CASES["mlp"].batches(UNEVEN)
    torch.manual_seed(1)
    found = fp.flow(model, batches, needs=("diagH", "Hg", "g2"))
    expected = fp.flow(model, batches, needs=("Hg", "g2"))
    oracles.assert_named_close(found.Hg, expected.Hg, 1e-14)
    assert found.loss == expected.loss
    with pytest.raises(ValueError, match="diagH takes a sweep of its own"):
        fp.flow(model, iter(batches), needs=("diagH", "g"))
    assert fp.global_prune(model, "obd", 0.5, data=batches, probes=4).method == "obd"


def a_vision_transformer():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, depth=1).double().eval()
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    return model, [(x[:3], y[:3]), (x[3:], y[3:])], lambda: F.cross_entropy(model(x), y)


def a_residual_net():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=4).double()
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    fp.recalibrate(model, (x, y)).eval()
    return model, [(x[:3], y[:3]), (x[3:], y[3:])], lambda: F.cross_entropy(model(x), y)


def a_language_model():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=24, max_position_embeddings=32)
    model = transformers.BertForSequenceClassification(config).double().eval()
    ids, y = torch.randint(3, 60, (4, 8)), torch.arange(4)
    batches = [{"input_ids": ids[a:b], "labels": y[a:b]} for a, b in ((0, 3), (3, 4))]
    return model, batches, lambda: model(input_ids=ids, labels=y).loss


@pytest.mark.filterwarnings("ignore:the diagonal of H from")
@pytest.mark.parametrize("make", [a_residual_net, a_vision_transformer, a_language_model])
def test_of_models_people_have_it_lies_within_its_error(make):
    """Some entries, each a product of its own with a unit vector."""
    torch.manual_seed(0)
    model, batches, loss = make()
    found = fp.flow(model, batches, needs=("diagH",), probes=16)
    parameters, sigmas = dict(model.named_parameters()), []
    with sdpa_kernel(SDPBackend.MATH):
        g = dict(
            zip(parameters, torch.autograd.grad(loss(), list(parameters.values()), create_graph=True), strict=True)
        )
        for name in list(parameters)[:: max(1, len(parameters) // 20)]:
            for place in torch.randint(parameters[name].numel(), (4,)).tolist():
                (row,) = torch.autograd.grad(g[name].flatten()[place], parameters[name], retain_graph=True)
                error = found.diagH_error[name].flatten()[place]
                if error > 1e-14:
                    sigmas.append((found.diagH[name].flatten()[place] - row.flatten()[place]) / error)
    assert len(sigmas) > 40
    assert torch.stack(sigmas).square().mean() < 2.5
    assert torch.stack(sigmas).abs().max() < 7


def test_a_diagonal_that_is_mostly_noise_is_told_of():
    """By its error bars; the more probes the less it is."""
    model, batches = cases.mlp(), CASES["mlp"].batches()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=r"the diagonal of H from 2 probes is \d+% noise, by its own error bars"):
        fp.flow(model, batches, needs=("diagH",), probes=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.flow(model, batches, needs=("diagH",), probes=400)
