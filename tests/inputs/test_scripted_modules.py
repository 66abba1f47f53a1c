"""A scripted submodule leaves the state of a model as it was, after a flow too."""

import pytest
import torch
from torch import nn

import torch_flowprune as fp


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_scripted_part(mode):
    scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))
    model = nn.Sequential(scripted, nn.Tanh(), nn.Linear(6, 4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fp.flow(model, (torch.randn(8, 5), torch.arange(8) % 4), needs=("g",), mode=mode)
    assert all(value.isfinite().all() for value in found.g.values())
    assert model.training
    assert scripted.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
