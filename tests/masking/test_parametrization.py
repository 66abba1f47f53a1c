"""The class in which a weight is computed on access: what torch and its users do to a module of that class."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp

LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), "weight"),
    "bias": (lambda: nn.Linear(3, 2), "bias"),
    "lstm": (lambda: nn.LSTM(3, 2), "weight_ih_l0"),
}


def by_hand(layer, name):
    """As torch's ``remove`` does it, and code that was copied from it."""
    weight = getattr(layer, name)
    delattr(layer, name)
    original = layer._parameters[f"{name}_orig"]
    original.data = weight.data
    del layer._parameters[f"{name}_orig"]
    del layer._buffers[f"{name}_mask"]
    setattr(layer, name, original)


def by_the_method(layer, name):
    """What ``apply`` returns has torch's own ``remove``."""
    fp.MagnitudeUnstructured.apply(layer, name, 0.25).remove(layer)


@pytest.mark.parametrize("remove", [by_hand, by_the_method])
@pytest.mark.parametrize("case", LAYERS)
def test_torchs_own_removal_gives_the_parameter_back_to_its_place(case, remove):
    """Optimizers and ``vector_to_parameters`` go by the order; torch itself moves the parameter to the end."""
    make, name = LAYERS[case]
    layer, dense = make(), make()
    names, parameters = list(layer._parameters), list(layer.parameters())
    fp.magnitude_unstructured(layer, name, 0.5)
    remove(layer, name)
    assert list(layer._parameters) == names
    assert all(one is other for one, other in zip(layer.parameters(), parameters, strict=True))
    assert (getattr(layer, name) == 0).sum() >= getattr(layer, name).numel() // 2
    assert type(layer) is type(dense)
    assert not layer._buffers
    assert vars(layer).keys() == vars(dense).keys(), "nothing is left of it"


def test_of_two_masked_tensors_the_other_stays_masked():
    layer = nn.Linear(3, 2)
    for name in ("weight", "bias"):
        fp.magnitude_unstructured(layer, name, 0.5)
    by_hand(layer, "weight")
    assert list(layer._parameters) == ["weight", "bias_orig"]
    assert (isinstance(layer.bias, nn.Parameter), type(layer.weight)) == (False, nn.Parameter)
    prune.remove(layer, "bias")
    assert list(layer._parameters) == ["weight", "bias"]
    assert type(layer) is nn.Linear


def test_a_parameter_that_is_not_masked_is_registered_as_ever():
    layer = nn.Linear(3, 2)
    fp.magnitude_unstructured(layer, "weight", 0.5)
    layer.bias = nn.Parameter(torch.ones(2))
    layer.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert list(layer._parameters) == ["weight_orig", "bias", "scale"]
    assert layer.bias.tolist() == [1, 1]


def test_a_parameter_given_to_a_masked_name_is_what_lies_under_the_mask():
    layer = nn.Linear(3, 2)
    fp.magnitude_unstructured(layer, "weight", 0.5)
    layer.weight = given = nn.Parameter(torch.full((2, 3), 7.0))
    assert layer.weight_orig is given
    assert torch.equal(layer.weight, 7.0 * layer.weight_mask)


def test_one_class_for_each_class_and_set_of_names():
    one, other = nn.Linear(3, 2), nn.Linear(5, 5)
    for layer, names in ((one, ("weight", "bias")), (other, ("bias", "weight"))):
        for name in names:
            fp.magnitude_unstructured(layer, name, 0.5)
    assert type(one) is type(other) is not nn.Linear
    assert (type(one).__name__, type(one).__qualname__, type(one).__module__, type(one).__doc__) == (
        nn.Linear.__name__,
        nn.Linear.__qualname__,
        nn.Linear.__module__,
        nn.Linear.__doc__,
    )


def test_only_what_the_module_hands_out_can_be_assigned():
    layer = nn.Linear(3, 2)
    fp.magnitude_unstructured(layer, "weight", 0.5)
    layer.weight_orig.data[0, 0] = torch.nan
    layer.weight = layer.weight
    layer.weight = next(iter(layer._forward_pre_hooks.values())).apply_mask(layer)
    equal = layer.weight.detach().clone()
    others = [equal, layer.weight[:1], equal.to("meta"), equal.to_sparse(), torch.ones(2, 3), 1.0, None]
    for value in others:
        with pytest.raises(
            TypeError,
            match=r"^'weight' is pruned, so it is computed from weight_orig and weight_mask: set weight_orig instead "
            r"\(also in functional_call\)$",
        ):
            layer.weight = value


def test_a_dense_key_of_functional_call_is_an_error_also_where_its_value_is_the_weight():
    layer = nn.Linear(3, 2)
    fp.magnitude_unstructured(layer, "weight", 0.5)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, torch.ones(1, 3)).sum()

    for value in (layer.weight.detach(), layer.weight, layer.weight.detach().clone().requires_grad_()):
        with pytest.raises(TypeError, match="set weight_orig instead"):
            torch.func.grad(loss)({"weight": value})
    assert torch.equal(torch.func.grad(loss)({"weight_orig": layer.weight_orig})["weight_orig"] != 0, layer.weight_mask)
