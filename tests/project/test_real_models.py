"""Models as people use them, at small inputs: scored by all three families, pruned, trained, copied, saved, removed."""

import copy

import pytest
import torch
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of, prunable

timm = pytest.importorskip("timm")

MODELS = {  # name: (input size, options of the model)
    "resnet18": (64, {}),  # at 32 the last maps are one pixel, and most of a kernel never sees any
    "vit_tiny_patch16_224": (32, {"img_size": 32}),
    "convnext_atto": (32, {}),
    "mobilenetv3_small_050": (32, {}),  # hardsigmoid
    "eva02_tiny_patch14_224": (28, {"img_size": 28}),  # reads qkv.weight without a call of qkv
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "window_size": 2}),  # the same
}
SHALLOW = {
    "vit_tiny_patch16_224": {"depth": 3},
    "eva02_tiny_patch14_224": {"depth": 3},
    "swinv2_tiny_window8_256": {"depths": (1, 1, 1, 1)},
}
FAMILIES = ["magnitude", "loss_preservation", "gradient_norm_preservation"]

every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    """Off the zeros of initialisation, where branches carry no gradient and rectifiers sit exactly on their kinks."""
    _, options = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options, **SHALLOW.get(name, {}))
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        for p in module.parameters(recurse=False):
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
    if (head := model.get_classifier()).weight.abs().max() < 0.01:
        torch.nn.init.normal_(head.weight, std=0.05)
    return model.eval()


def batches(name, sizes=(3, 2)):
    size = MODELS[name][0]
    source = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, size, size, generator=source), torch.randint(5, (n,), generator=source)) for n in sizes]


def effective(model):
    """The weights the forward uses, by name."""
    return {target.name: getattr(*target.owners[0]).detach().clone() for target in prunable(model)}


@every_model
def test_the_three_families_score(name):
    model, data = build(name), batches(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = fp.scores(model, FAMILIES, data)
    assert list(found) == FAMILIES
    for scores in found.values():
        assert all(value.isfinite().all() and value.any() for value in scores.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


@every_model
def test_Hg_is_the_derivative_of_the_gradient(name):
    """In float64, by finite differences along g, which need no second derivative of any operator."""
    model = build(name).double()
    x, y = batches(name, (2,))[0]
    batch = (x.double(), y)
    point = fp.flow(model, batch)
    norm = sum(value.square().sum() for value in point.g.values()).sqrt()
    sides = []
    for step in (1e-7, -1e-7):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for key, p in moved.named_parameters():
                p.add_(point.g[key], alpha=step / norm.item())
        sides.append(fp.flow(moved, batch, needs=("g",)).g)
    error = sum(
        ((a - b) / 2e-7 * norm - point.Hg[key]).square().sum()
        for (key, a), b in zip(sides[0].items(), sides[1].values(), strict=True)
    ).sqrt()
    total = sum(value.square().sum() for value in point.Hg.values()).sqrt()
    assert total > 0
    assert error / total < 1e-5


@every_model
@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.filterwarnings("ignore::torch_flowprune.LayerCollapseWarning")
def test_a_pruned_model_lives(name, method):
    """Two training steps, a copy, a checkpoint, and the masks made permanent: the zeros stay where they are."""
    model, data = build(name), batches(name)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    report = fp.global_prune(model, method, 0.6, data=data)
    assert report.pruned == round(0.6 * report.units)
    zeros = {key: value == 0 for key, value in effective(model).items()}
    assert sum(int(value.sum()) for value in zeros.values()) >= report.pruned

    model.train()
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    trained = effective(model)
    masks = {target.name: target.mask for target in parameters_of(model).values() if target.mask is not None}
    for key, mask in masks.items():
        assert not trained[key][~mask].any(), key
    assert any(not torch.equal(trained[key], value) for key, value in effective(build(name)).items())
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True)), (
        "the same parameters in the same order"
    )

    x = data[0][0]
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        other = build(name)
        fp.global_prune(other, sparsity=0.1)
        other = fp.remove(other)
        fp.apply_masks(other, masks)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected), (
            "a checkpoint of the pruned model loads into another with the same parameters pruned"
        )
        removed = fp.remove(model)
        assert torch.equal(removed(x), expected)
    assert [key for key, _ in removed.named_parameters()] == [key for key, _ in build(name).named_parameters()]
    assert all(one is other for one, other in zip(removed.parameters(), parameters, strict=True))
    for key, mask in masks.items():
        assert not removed.get_parameter(key)[~mask].any()


@every_model
@pytest.mark.filterwarnings("ignore::torch_flowprune.LayerCollapseWarning")
def test_filters(name):
    model = build(name)
    report = fp.global_prune(model, "taylor", 0.3, data=batches(name), granularity="filter", min_keep=1)
    assert report.pruned == round(0.3 * report.units)
    assert all(layer.pruned < layer.units for layer in report.layers)
    with torch.no_grad():
        assert model(batches(name)[0][0]).isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_synflow(name):
    model = build(name)
    found = fp.scores(model, "synflow", example_inputs=batches(name)[0][0])
    assert all(value.isfinite().all() for value in found.values())
    assert sum(bool(value.any()) for value in found.values()) > len(found) // 2


def test_train_mode_scores_with_batch_statistics():
    model, data = build("resnet18"), batches("resnet18", (8,))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    one, other = (fp.scores(model, "grasp", data, mode=mode) for mode in ("eval", "train"))
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Hugging Face: dict batches, the model's own loss, transposed linear layers, a head tied to the embedding


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    tokens = torch.randint(50, (6, 8))
    return transformers.GPT2LMHeadModel(config).eval(), [
        {"input_ids": part, "labels": part} for part in tokens.split([4, 2])
    ]


def test_a_language_model_with_its_own_loss():
    model, data = gpt2()
    with torch.no_grad():
        expected = sum(len(batch["input_ids"]) * model(**batch).loss.item() for batch in data) / 6
    point = fp.flow(model, data)
    assert point.loss == pytest.approx(expected, rel=1e-6)
    assert point.samples == 6
    found = fp.scores(model, FAMILIES, data)
    assert next(iter(found["magnitude"])) == "transformer.wte.weight", (
        "the head is a Linear, so the embedding it is tied to is prunable"
    )
    assert len(found["magnitude"]) == 1 + 2 * 4


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_a_language_model_is_pruned_and_trained(granularity):
    model, data = gpt2()
    report = fp.global_prune(model, "gradient_norm_preservation", 0.5, data=data, granularity=granularity, min_keep=1)
    assert report.pruned == report.units // 2
    assert model.lm_head.weight_mask is model.transformer.wte.weight_mask
    layer = {one.name: one for one in report.layers}["transformer.h.0.attn.c_attn.weight"]
    assert layer.shape == (16, 48)
    assert layer.units == (48 if granularity == "filter" else 768), "a filter of a Conv1D is a column"
    zeros = {key: value == 0 for key, value in effective(model).items()}
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert all(torch.equal(value == 0, zeros[key]) for key, value in effective(model).items())
    model.eval()
    with torch.no_grad():
        expected = model(data[0]["input_ids"]).logits
        assert torch.equal(copy.deepcopy(model)(data[0]["input_ids"]).logits, expected)
        assert torch.equal(fp.remove(model)(data[0]["input_ids"]).logits, expected)
    assert model.lm_head.weight is model.transformer.wte.weight
