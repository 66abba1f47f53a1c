"""Sparse training from the first step on: RigL, killed and resumed, with an average beside it, and what is written."""

import copy
import math

import pytest
import torch
from stripes import accuracy, images, loader_of, network
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_flowprune as fp

pytestmark = pytest.mark.slow

SPARSITY, EVERY, LAST, STEPS = 0.9, 8, 72, 96


def begin():
    torch.manual_seed(0)
    model = network(24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    fp.global_prune(model, "random", SPARSITY, allocation="erk", generator=torch.Generator().manual_seed(0))
    fp.keep_zeros(model, optimizer)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    return model, optimizer, average


def one_update(model, optimizer, inputs, target, step):
    before = fp.masks(model)
    fraction = 0.15 * (1 + math.cos(math.pi * step / LAST))
    # guide: sparse_training
    report = fp.global_prune(model, "magnitude", amount=fraction, scope="layer")
    dropped = {layer.name: layer.newly_pruned for layer in report.layers}
    fp.regrow(model, dropped, "gradient", (inputs, target), optimizer=optimizer)
    # end
    before |= {name: torch.ones_like(mask) for name, mask in fp.masks(model).items() if name not in before}
    assert {k: int(mask.sum()) for k, mask in fp.masks(model).items()} == {k: int(m.sum()) for k, m in before.items()}
    grown = {k: mask & ~before[k] for k, mask in fp.masks(model).items()}
    for name, where in grown.items():
        parameter = dict(model.named_parameters())[f"{name}_orig"]
        assert not parameter[where].any() and not optimizer.state[parameter]["exp_avg"][where].any()
    return sum(int(where.sum()) for where in grown.values())


def run(model, optimizer, average, batches, steps):
    moved = 0
    for step in steps:
        inputs, labels = batches[step]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(inputs), labels).backward()
        optimizer.step()
        if step % EVERY == EVERY - 1 and step < LAST:
            moved += one_update(model, optimizer, inputs, labels, step)
            fp.sync_masks(model, average)
        average.update_parameters(model)
    return moved


def test_sparse_training_is_resumed_and_written(tmp_path):
    data, held_out = images(1024, 0), images(512, 1)
    source = loader_of(*data)
    batches = [batch for _ in range(6) for batch in source]
    assert len(batches) == STEPS
    model, optimizer, average = begin()
    weights = sum(mask.numel() for mask in fp.masks(model).values())
    first = fp.masks(model)

    moved = run(model, optimizer, average, batches, range(STEPS // 2))
    torch.save(
        {"model": fp.state_dict(model), "average": fp.state_dict(average.module), "n": average.n_averaged,
         "optimizer": optimizer.state_dict()},
        tmp_path / "run.pt",
    )  # fmt: skip
    moved += run(model, optimizer, average, batches, range(STEPS // 2, STEPS))
    assert moved > 0.05 * 0.1 * weights

    # killed half way: the same end, bit for bit
    resumed, its_optimizer, resumed_average = begin()
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    fp.load_state_dict(resumed, state["model"], lift_masks=True)
    fp.load_state_dict(resumed_average.module, state["average"], lift_masks=True)
    resumed_average.n_averaged.copy_(state["n"])
    its_optimizer.load_state_dict(state["optimizer"])
    run(resumed, its_optimizer, resumed_average, batches, range(STEPS // 2, STEPS))
    for one, other in ((model, resumed), (average.module, resumed_average.module)):
        assert all(torch.equal(value, fp.state_dict(other)[name]) for name, value in fp.state_dict(one).items())

    assert fp.report(model).sparsity == pytest.approx(SPARSITY, abs=1e-3)
    assert fp.report(average.module).sparsity == fp.report(model).sparsity
    assert any(not torch.equal(mask, fp.masks(model)[name]) for name, mask in first.items())
    optimizer_zeros = [parameter[~fp.masks(model)[name.removesuffix("_orig")]]
                       for name, parameter in model.named_parameters() if name.endswith("_orig")]  # fmt: skip
    assert not torch.cat(optimizer_zeros).any()
    assert accuracy(model, *held_out) > 0.9
    assert accuracy(average.module, *held_out) > 0.9

    fp.save_pruned(model, tmp_path / "sparse.safetensors", kept_only=True)
    again = fp.load_pruned(network(24), tmp_path / "sparse.safetensors").eval()
    assert torch.equal(again(held_out[0]), model.eval()(held_out[0]))
    assert (tmp_path / "sparse.safetensors").stat().st_size < 0.25 * 4 * weights
    assert fp.export(copy.deepcopy(model), held_out[0][:2], tmp_path / "sparse.pt2").difference < 1e-3
