"""A vision transformer that two optimizers train, Muon and AdamW, each with its schedule, in bfloat16 arithmetic."""

import copy

import pytest
import torch
from stripes import CLASSES, SIZE, accuracy, images, loader_of
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import torch_flowprune as fp

pytestmark = pytest.mark.slow

timm = pytest.importorskip("timm")
if not hasattr(torch.optim, "Muon"):
    pytest.skip("this torch has no Muon", allow_module_level=True)

STEPS = 8 * 16


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=4, depth=3, embed_dim=48, num_heads=4, num_classes=CLASSES,
        drop_path_rate=0.1,
    )  # fmt: skip


def optimizers_of(model):
    """Matrices of the blocks to Muon, all else to AdamW."""
    # guide: several_models
    named = list(model.named_parameters())
    matrices = [p for name, p in named if "blocks" in name and p.dim() > 1]
    others = [p for name, p in named if "blocks" not in name or p.dim() == 1]
    second = torch.optim.AdamW(others, lr=2e-3)
    # end
    first = torch.optim.Muon(matrices, lr=5e-3, momentum=0.9)
    schedules = [CosineAnnealingLR(first, STEPS), LambdaLR(second, lambda step: max(0.02, 1 - step / STEPS))]
    return [first, second], schedules


def train(model, optimizers, schedules, loader, pruner=None):
    model.train()
    for inputs, labels in loader:
        for one in optimizers:
            one.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(inputs).float(), labels)
        loss.backward()
        if pruner is not None:
            pruner.track()
        for one in (*optimizers, *schedules):
            one.step()


def pruner_of(model, example):
    return fp.Pruner(model, "taylor", 0.4, rounds=2, schedule="linear", granularity="channel", cost="parameters",
                     example_inputs=example, exclude=model.patch_embed)  # fmt: skip


def test_both_optimizers_and_their_schedules_go_on(tmp_path):
    torch.manual_seed(0)
    data, held_out = images(1024, 0), images(512, 1)
    loader, example, model = loader_of(*data), data[0][:2], vit()
    dense = copy.deepcopy(model)
    optimizers, schedules = optimizers_of(model)
    for _ in range(3):
        train(model, optimizers, schedules, loader)
    assert accuracy(model, *held_out) > 0.9

    pruner = pruner_of(model, example)
    train(model, optimizers, schedules, loader, pruner)
    rates = [one.param_groups[0]["lr"] for one in optimizers]
    pruner.step()
    first, second = optimizers
    # guide: several_models
    small = fp.shrink(model, example, optimizer=[first, second], pruner=pruner)
    # end
    held = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
    assert not held[0] & held[1] and held[0] | held[1] == set(map(id, small.parameters()))
    for one in optimizers:
        for parameter, state in one.state.items():
            assert all(value.shape == parameter.shape for value in state.values() if value.dim())
    assert [one.param_groups[0]["lr"] for one in optimizers] == rates
    train(small, optimizers, schedules, loader, pruner)
    assert all(one.param_groups[0]["lr"] < rate for one, rate in zip(optimizers, rates, strict=True))

    fp.save_pruned(small, tmp_path / "small.safetensors")
    torch.save({"optimizers": [one.state_dict() for one in optimizers], "pruner": pruner.state_dict(),
                "schedules": [one.state_dict() for one in schedules]}, tmp_path / "run.pt")  # fmt: skip
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = fp.load_pruned(copy.deepcopy(dense), tmp_path / "small.safetensors")
    (its_optimizers, its_schedules), its_pruner = optimizers_of(resumed), pruner_of(resumed, example)
    for kind, ones in (("optimizers", its_optimizers), ("schedules", its_schedules)):
        for one, saved in zip(ones, state[kind], strict=True):
            one.load_state_dict(saved)
    its_pruner.load_state_dict(state["pruner"])
    assert str(its_pruner.step()) == str(pruner.step())
    runs = [(small, optimizers, schedules, pruner), (resumed, its_optimizers, its_schedules, its_pruner)]
    ends = []
    for one, its, plans, own in runs:
        end = fp.shrink(one, example, optimizer=its, pruner=own)
        torch.manual_seed(1)
        loader.generator.manual_seed(1)
        for _ in range(2):
            train(end, its, plans, loader)
        ends.append(end)
    assert all(torch.equal(value, ends[1].state_dict()[name]) for name, value in ends[0].state_dict().items())
    final = ends[1]
    left = sum(p.numel() for p in final.parameters()) / sum(p.numel() for p in dense.parameters())
    assert 0.5 < left <= 0.6
    assert accuracy(final, *held_out) > 0.9
    assert fp.export(final, example, tmp_path / "final.onnx").difference < 1e-3
