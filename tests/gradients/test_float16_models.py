"""Models of float16 are scored in float32, and are of float16 again afterwards."""

import copy

import pytest
import torch
from torch import nn

import torch_flowprune as fp


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    return nn.Sequential(*layers).half().eval()


def batches(*sizes):
    torch.manual_seed(1)
    return [(torch.randn(size, 2, 6, 6).half(), torch.randint(4, (size,))) for size in sizes]


@pytest.mark.parametrize("sizes", [(5,), (4, 3)])
@pytest.mark.parametrize("options", [{}, {"max_memory": "1GB"}, {"offload": True}])
def test_derivatives_are_those_of_the_same_weights_in_float32(sizes, options):
    model, data = net(), batches(*sizes)
    wide = copy.deepcopy(model).float()
    expected = fp.flow(wide, [(x.float(), y) for x, y in data], temperature=200.0)
    found = fp.flow(model, data, temperature=200.0, **options)
    for name in expected.Hg:
        assert found.Hg[name].dtype is torch.float32
        torch.testing.assert_close(found.g[name], expected.g[name], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found.Hg[name], expected.Hg[name], rtol=1e-4, atol=1e-12)


def test_nothing_is_left_behind():
    model = net()
    fp.global_prune(model, "magnitude", 0.3)
    before = {
        name: (value, value.data_ptr(), value.clone()) for name, value in model.state_dict(keep_vars=True).items()
    }
    fp.scores(model, "grasp", batches(4, 4))
    for name, value in model.state_dict(keep_vars=True).items():
        same, address, values = before[name]
        assert value is same
        assert value.data_ptr() == address
        assert torch.equal(value, values)


def test_code_fixed_to_float16_is_told():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2).half()

        def forward(self, x):
            return self.layer(x.half())

    model = Fixed()
    with pytest.raises(RuntimeError, match="derivatives of a float16 model underflow, and are taken in float32"):
        fp.scores(model, "snip", (torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))
    assert model.layer.weight.dtype is torch.float16


def test_predictions_too():
    model = net()
    mask = {"4.weight": torch.rand(4, 96) > 0.5}
    data = batches(4, 3)
    wide = fp.predict(copy.deepcopy(model).float(), mask, [(x.float(), y) for x, y in data], temperature=200.0)
    found = fp.predict(model, mask, data, temperature=200.0)
    assert found.gradient_norm_change == pytest.approx(wide.gradient_norm_change, rel=1e-4)
