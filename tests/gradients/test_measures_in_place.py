"""A measure of a user's own may write where it likes: the model and the flow are as they were."""

import pytest
import torch
from torch import nn

import torch_flowprune as fp

DATA = torch.ones(3, 5), torch.tensor([0, 1, 2])


def in_place(theta, g):
    return theta.abs_().mul_(g.abs_()).sum(-1)


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_it_changes_nothing(granularity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fp.scores(model, in_place, DATA, granularity=granularity)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = fp.scores(model, "loss_preservation", DATA, granularity=granularity)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
