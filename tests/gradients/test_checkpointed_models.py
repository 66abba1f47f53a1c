"""Activation checkpointing as libraries switch it on: the same derivatives, or an error that says what to do."""

import pytest
import torch

import torch_flowprune as fp

TIMM = ("test_vit", "test_convnext", "test_resnet", "test_efficientnet", "test_mambaout", "test_byobnet")


def assert_same(found, expected):
    for kind in ("g", "Hg"):
        scale = max(value.abs().max() for value in getattr(expected, kind).values())
        for name, value in getattr(expected, kind).items():
            assert (getattr(found, kind)[name] - value).abs().max() <= 1e-11 * scale, name


@pytest.mark.parametrize("count", [1, 2], ids=["one batch", "two"])
@pytest.mark.parametrize("name", [TIMM[0], *(pytest.param(name, marks=pytest.mark.slow) for name in TIMM[1:])])
def test_timms_switch(name, count):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).double()
    side = model.default_cfg["input_size"][-1]
    data = [(torch.randn(2, 3, side, side, dtype=torch.float64), torch.tensor([0, 1])) for _ in range(count)]
    with torch.no_grad():
        model.train()(torch.cat([x for x, _ in data] * 2))
    expected = fp.flow(model.eval(), data)
    model.set_grad_checkpointing(True)
    assert_same(fp.flow(model, data), expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2"])
def test_transformers_switch(name, reentrant):
    """It works in train mode alone; by default it is not reentrant."""
    language_models = pytest.importorskip("language_models")
    model = language_models.build(name).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = [torch.randint(3, 60, (2, 9)) for _ in range(2)]
    data = [{"input_ids": one, "labels": one} for one in ids]
    expected = fp.flow(model, data, mode="train")
    words = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model.gradient_checkpointing_enable(**words)
    if reentrant:
        with pytest.raises(RuntimeError, match="checkpoints activations with use_reentrant=True"):
            fp.flow(model, data, mode="train")
    else:
        assert_same(fp.flow(model, data, mode="train"), expected)
    assert_same(fp.flow(model, data), fp.flow(model.eval(), data))
