"""Warnings name the user's line, whichever call they come out of and however deep."""

import warnings

import pytest
import torch
from torch import nn

import torch_flowprune as fp

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]
WORDS = {"loss": lambda output, target: nn.functional.cross_entropy(output, target, reduction="sum")}


class OneLayerUnread(nn.Module):
    """Its norm has seen no batch, and the loss does not reach one of its layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        self.unread = nn.Linear(3, 3)

    def forward(self, x):
        return self.net(x)


CALLS = {
    "flow": lambda net: fp.flow(net, BATCHES, max_samples=100, **WORDS),
    "flow, a gradient": lambda net: fp.flow(net, BATCHES, needs=("g",), **WORDS),
    "flow, one batch": lambda net: fp.flow(net, BATCHES[0], **WORDS),
    "flow, a diagonal": lambda net: fp.flow(net, BATCHES, needs=("diagH",), probes=2, **WORDS),
    "scores": lambda net: fp.scores(net, "grasp", BATCHES, **WORDS),
    "importance_scores": lambda net: fp.importance_scores(net, "grasp", data=BATCHES, **WORDS),
    "global_prune": lambda net: fp.global_prune(net, "grasp", 0.5, data=BATCHES, include="net*", **WORDS),
    "Pruner": lambda net: fp.Pruner(net, "taylor", 0.5, include="net*", **WORDS).step(BATCHES),
    "diagnose": lambda net: fp.diagnose(net, BATCHES, **WORDS),
    "predict": lambda net: fp.predict(net, {"net.0.weight": torch.ones(6, 4) > 0}, BATCHES, **WORDS),
    "hessian_vector": lambda net: fp.hessian_vector(net, BATCHES, {"net.0.weight": torch.ones(6, 4)}, **WORDS),
    "compare": lambda net: fp.compare(net, "taylor", 0.5, BATCHES, include="net*", **WORDS),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_names_the_line_that_called(name):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        CALLS[name](OneLayerUnread())
    places = {str(one.message): one.filename for one in seen}
    assert places == dict.fromkeys(places, __file__)
    assert any("the loss does not reach unread" in text for text in places)
