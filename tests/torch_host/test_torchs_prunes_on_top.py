"""Torch's own pruning functions before, on top of, and after ours."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp


def _order(module):
    return [name for name, _ in module.named_parameters()]


_MADE = {
    "linear": lambda: nn.Linear(4, 4),
    "convolution": lambda: nn.Conv2d(2, 2, 1),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
}


@pytest.mark.parametrize("kind", _MADE)
def test_remove_gives_what_torch_moved_its_place_back(kind):
    module = _MADE[kind]()
    dense = _order(module)
    name = dense[0]
    prune.random_unstructured(module, name, 1)
    assert _order(module) != dense  # torch moves it to the end
    fp.remove(module)
    assert _order(module) == dense


def test_both_parameters_come_back_in_order():
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "bias", 1)
    prune.l1_unstructured(layer, "weight", 1)
    fp.remove(layer)
    assert _order(layer) == ["weight", "bias"]


def test_recurrent_weights_come_back_in_order():
    layer = nn.LSTM(3, 4)
    dense = _order(layer)
    prune.l1_unstructured(layer, "weight_hh_l0", 1)
    fp.remove(layer)
    assert _order(layer) == dense


def test_torchs_remove_after_ours_on_top_of_torchs():
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 3)
    fp.l1_unstructured(layer, "weight", 2)
    prune.remove(layer, "weight")
    assert _order(layer) == ["weight", "bias"] and int((layer.weight == 0).sum()) == 5


def test_an_optimizer_state_of_the_dense_layer_loads_after_remove():
    layer = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    prune.l1_unstructured(layer, "weight", 3)
    fp.remove(layer)
    again = torch.optim.Adam(layer.parameters())
    again.load_state_dict(optimizer.state_dict())
    assert all(again.state[parameter]["exp_avg"].shape == parameter.shape for parameter in layer.parameters())


class _Own(nn.Module):
    """Parameters of which its constructor names none."""

    def __init__(self):
        super().__init__()
        for name in ("b", "a"):
            setattr(self, name * 2, nn.Parameter(torch.ones(2)))


def test_where_the_constructor_tells_no_order_it_stays():
    module = _Own()
    prune.l1_unstructured(module, "bb", 1)
    fp.remove(module)
    assert _order(module) == ["aa", "bb"]


@pytest.mark.parametrize("copied", [False, True])
def test_a_prune_of_torchs_that_fails_leaves_the_hook(copied):
    layer = nn.Linear(4, 4)
    fp.l1_unstructured(layer, "weight", 10)
    (hook,) = layer._forward_pre_hooks.values()
    methods = len(hook)
    if copied:
        layer = copy.deepcopy(layer)
        fp.apply_masks(layer, fp.masks(layer))
        (hook,) = layer._forward_pre_hooks.values()
    with pytest.raises(ValueError, match="6"):
        prune.l1_unstructured(layer, "weight", 7)
    assert prune.is_pruned(layer) and list(layer._forward_pre_hooks.values()) == [hook] and len(hook) == methods
    prune.l1_unstructured(layer, "weight", 2)
    assert int((layer.weight == 0).sum()) == 12
    prune.remove(layer, "weight")
    assert int((layer.weight == 0).sum()) == 12 and _order(layer) == ["weight", "bias"]


def test_where_torchs_constructor_refuses_its_next_prune_says_how_the_hook_comes_back():
    layer = nn.Linear(4, 4)
    fp.l1_unstructured(layer, "weight", 10)
    with pytest.raises(ValueError, match="amount"):
        prune.l1_unstructured(layer, "weight", -1)
    with pytest.raises(TypeError, match="the pruning hook is not"):
        prune.l1_unstructured(layer, "weight", 2)
    assert int((layer.weight == 0).sum()) == 10
    fp.apply_masks(layer, fp.masks(layer))
    prune.l1_unstructured(layer, "weight", 2)
    assert int((layer.weight == 0).sum()) == 12


def test_torchs_methods_that_hold_a_mask_share_the_modules():
    layer = nn.Linear(8, 8)
    fp.l1_unstructured(layer, "weight", 0.1)
    for _ in range(2):
        prune.custom_from_mask(layer, "weight", torch.rand(8, 8) > 0.1)
    fp.l1_unstructured(layer, "weight", 0.1)
    (hook,) = layer._forward_pre_hooks.values()
    assert all(method.mask is layer.weight_mask for method in hook if hasattr(method, "mask"))
