"""One model from its first prune to its export: shrunk in mid-training, killed and resumed, written and read."""

import copy

import pytest
import stripes
import torch
from stripes import accuracy, images, loader_of, network

import torch_flowprune as fp

pytestmark = pytest.mark.slow


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def train(model, optimizer, loader, pruner=None):
    stripes.train(model, optimizer, loader, *([] if pruner is None else [pruner.track]))


def pruner_of(model, images):
    # guide: resnet
    options = dict(granularity="channel", cost="flops", example_inputs=images)
    pruner = fp.Pruner(model, "taylor", 0.5, rounds=2, schedule="linear", **options)
    # end
    return pruner, options


def test_the_whole_life_of_a_classifier(tmp_path):
    torch.manual_seed(0)
    (inputs, labels), held_out = images(1024, 0), images(512, 1)
    loader = loader_of(inputs, labels)
    example, model = inputs[:2], network()
    dense = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    for _ in range(3):
        train(model, optimizer, loader)
    assert accuracy(model, *held_out) > 0.9

    pruner, _ = pruner_of(model, example)
    train(model, optimizer, loader, pruner)
    first = pruner.step()
    small = fp.shrink(model, example, optimizer=optimizer, pruner=pruner)
    train(small, optimizer, loader, pruner)

    # killed here, and resumed from files
    fp.save_pruned(small, tmp_path / "small.safetensors")
    torch.save({"optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, tmp_path / "run.pt")
    resumed = fp.load_pruned(copy.deepcopy(dense), tmp_path / "small.safetensors")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    its_optimizer, (its_pruner, _) = optimizer_of(resumed), pruner_of(resumed, example)
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
    fp.save_pruned(final, tmp_path / "kept.safetensors", kept_only=True)
    again = fp.load_pruned(copy.deepcopy(dense), tmp_path / "kept.safetensors")
    assert torch.equal(again.eval()(held_out[0]), final.eval()(held_out[0]))
    assert fp.export(final, example, tmp_path / "final.pt2").difference < 1e-3
