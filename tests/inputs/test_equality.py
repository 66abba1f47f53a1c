"""Flows, scores and couplings equal one another when they hold the same."""

from dataclasses import replace

import cases
import pytest
import torch
from cases import CASES

import torch_flowprune as fp

MAKE = {
    "flow": lambda model: fp.flow(model, CASES["cnn"].batches((4, 3))),
    "scores": lambda model: fp.scores(model, "snip", CASES["cnn"].batches((4, 3))),
    "coupling": lambda model: fp.couple(model, CASES["cnn"].batch(4)[0]),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_made_twice_they_are_equal(make):
    model = cases.cnn()
    assert make(model) == make(model)
    with pytest.raises(TypeError, match="unhashable"):
        hash(make(model))


def test_one_number_apart_they_are_not():
    model = cases.cnn()
    flow, scores, coupling = (make(model) for make in MAKE.values())
    other = flow.g | {"0.weight": flow.g["0.weight"].nextafter(torch.tensor(9.0, dtype=flow.g["0.weight"].dtype))}
    assert flow != replace(flow, g=other)
    assert scores != fp.Scores(dict(scores) | {"0.weight": scores["0.weight"] * 2}, scores.method, scores.granularity)
    assert scores != fp.Scores(dict(scores), "taylor", scores.granularity)
    assert coupling != replace(coupling, groups=coupling.groups[1:])
    assert flow != scores
    assert scores != dict(scores)
