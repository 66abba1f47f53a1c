"""One model from its first prune to its export: shrunk in mid-training, killed and resumed, written and read."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import torch_flowprune as fp

pytestmark = pytest.mark.slow

CLASSES, SIZE = 4, 16


def images(count, seed):
    """Stripes of four directions under noise, each with a phase of its own: small, and not learnt by a linear model."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=source)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    ways = torch.stack([rows, columns, rows + columns, rows - columns])[labels]
    phase = torch.rand(count, 1, 1, generator=source) * 6.28
    stripes = torch.sin(ways * 1.2 + phase)[:, None].expand(-1, 3, -1, -1)
    return stripes + 0.7 * torch.randn(count, 3, SIZE, SIZE, generator=source), labels


def network():
    def block(inputs, outputs, stride):
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(3, 16, 1), *block(16, 32, 2), *block(32, 32, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def train(model, optimizer, loader, pruner=None):
    model.train()
    for inputs, labels in loader:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        if pruner is not None:
            pruner.track()
        optimizer.step()


@torch.no_grad()
def accuracy(model, inputs, labels):
    return (model.eval()(inputs).argmax(1) == labels).float().mean().item()


def pruner_of(model, example):
    return fp.Pruner(
        model, "taylor", 0.5, rounds=2, schedule="linear", granularity="channel", cost="flops", example_inputs=example
    )


def test_the_whole_life_of_a_classifier(tmp_path):
    torch.manual_seed(0)
    (inputs, labels), held_out = images(1024, 0), images(512, 1)
    loader = DataLoader(TensorDataset(inputs, labels), 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    example, model = inputs[:2], network()
    dense = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    for _ in range(3):
        train(model, optimizer, loader)
    assert accuracy(model, *held_out) > 0.9

    pruner = pruner_of(model, example)
    train(model, optimizer, loader, pruner)
    first = pruner.step()
    small = fp.shrink(model, example, optimizer=optimizer, pruner=pruner)
    train(small, optimizer, loader, pruner)

    # killed here, and resumed from files
    fp.save_shrunk(small, tmp_path / "small.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, tmp_path / "run.pt")
    resumed = fp.load_shrunk(copy.deepcopy(dense), tmp_path / "small.safetensors")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    its_optimizer, its_pruner = optimizer_of(resumed), pruner_of(resumed, example)
    its_optimizer.load_state_dict(state["optimizer"])
    its_pruner.load_state_dict(state["pruner"])
    last, expected = its_pruner.step(), pruner.step()
    assert str(last) == str(expected)
    assert last.left.flops <= 0.5 * last.dense.flops < first.left.flops
    assert its_pruner.done

    final = fp.shrink(resumed, example, optimizer=its_optimizer, pruner=its_pruner)
    for _ in range(2):
        train(final, its_optimizer, loader)
    assert accuracy(final, *held_out) > 0.9

    # single weights on top, whose zeros an optimizer keeps, and the file that holds what is kept
    fp.keep_zeros(final, its_optimizer)
    fp.global_prune(final, "magnitude", 0.8, allocation="erk")
    train(final, its_optimizer, loader)
    assert all(not p[~fp.masks(final)[name.removesuffix("_orig")]].any() for name, p in final.named_parameters()
               if name.endswith("_orig"))  # fmt: skip
    fp.save_pruned(dense, tmp_path / "kept.safetensors", shrunk=final, kept_only=True)
    again = fp.load_pruned(copy.deepcopy(dense), tmp_path / "kept.safetensors")
    assert torch.equal(again.eval()(held_out[0]), final.eval()(held_out[0]))
    assert fp.export(final, example, tmp_path / "final.pt2").difference < 1e-3
