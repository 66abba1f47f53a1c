"""Modules as `include=` and `exclude=` in every call that takes them."""

import pytest
import torch
from torch import nn

import torch_flowprune as fp

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.arange(8) % 4)]
CHANNELS = {"granularity": "channel", "example_inputs": X[:2]}

CALLS = {
    "scores": lambda model, words: fp.scores(model, "taylor", DATA, **words),
    "importance_scores": lambda model, words: fp.importance_scores(model, "taylor", DATA, **words).values(),
    "report": lambda model, words: fp.report(model, **words),
    "compare": lambda model, words: fp.compare(model, "taylor", 0.5, DATA, **words).table().splitlines()[:3],
    "diagnose": lambda model, words: fp.diagnose(model, DATA, **words),
    "sensitivity": lambda model, words: fp.sensitivity(model, "taylor", DATA, sparsities=[0.5], **words).losses,
    "range": lambda model, words: fp.range(model, **CHANNELS, **words),
    "global_prune": lambda model, words: fp.global_prune(model, "taylor", 0.5, data=DATA, **words),
    "channels": lambda model, words: fp.global_prune(model, "magnitude", 0.5, **CHANNELS, **words),
    "Pruner": lambda model, words: fp.Pruner(model, "taylor", 0.5, **words).step(DATA),
}  # fmt: skip


def net():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), block, nn.Flatten(), nn.Linear(32, 4))


def same(call, one, other):
    found = [call(one[0], one[1]), call(other[0], other[1])]
    return str(found[0]) == str(found[1]) and found[0] is not None


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize(
    ("argument", "pick", "name"),
    [
        ("include", lambda model: model[2], "2.*"),
        ("exclude", lambda model: [model[0], model[4]], ["0.*", "4.*"]),
    ],
)
def test_a_module_says_what_the_glob_of_its_name_says(call, wrapped, argument, pick, name):
    model, other = net(), net()
    given = torch.compile(model) if wrapped else model
    assert same(CALLS[call], (given, {argument: pick(model)}), (other, {argument: name}))
