"""A selection that the model itself makes of its weight counts, on a pruned model too."""

import oracles
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import torch_flowprune as fp
from torch_flowprune.torch_internals import keep_where_positive


class OwnSelection(nn.Linear):
    """Half of the weight is used, by the model's own ``torch.where``."""

    def forward(self, x):
        return nn.functional.linear(x, torch.where(torch.arange(6) % 2 == 0, self.weight, 0), self.bias)


def net():
    torch.manual_seed(0)
    return nn.Sequential(OwnSelection(6, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize("pruned", [False, True])
def test_the_models_own_where(pruned):
    model, dense = net(), net()
    if pruned:
        fp.global_prune(model, "magnitude", sparsity=0.3)
    used = {f"{i}.{name}": getattr(model[i], name).detach() for i in (0, 2) for name in ("weight", "bias")}
    dense.load_state_dict(used)
    gR = fp.flow(model, needs=("gR",), example_inputs=torch.ones(1, 6)).gR
    found = {name.replace("_orig", ""): value for name, value in gR.items()}
    expected = oracles.synflow(dense, (6,))
    oracles.assert_named_close({name: found[name] * used[name].double().abs() for name in expected}, expected, 1e-6)


def test_a_mask_is_not_put_on_twice():
    """The pass is given weights with zeros in them: masking them at each access would take as long as scoring."""
    seen = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model = net()
    fp.global_prune(model, "magnitude", sparsity=0.3)
    with Seen():
        fp.flow(model, needs=("gR",), example_inputs=torch.ones(1, 6))
        before = seen.count(keep_where_positive)
        model(torch.ones(1, 6))
    assert before == 0 and seen.count(keep_where_positive) == 2
