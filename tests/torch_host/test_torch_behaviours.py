"""The 34 behaviours that PyTorch tests of its own pruning, asked of this package.

The names are the behaviours'; docs/explanation/host.md has the table.
"""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from hosts import hooks_of, snapshot
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.selection.schedules import to_prune

BEHAVIOURS = {
    1: ("validate_pruning_amount_init", "holds"),
    2: ("validate_pruning_amount", "holds"),
    3: ("compute_nparams_to_prune", "holds"),
    4: ("random_pruning_sizes", "holds"),
    5: ("random_pruning_orig", "holds"),
    6: ("random_pruning_new_weight", "holds"),
    7: ("identity_pruning", "holds, by a mask of ones"),
    8: ("random_pruning_0perc", "holds"),
    9: ("random_pruning", "holds"),
    10: ("random_pruning_forward", "holds"),
    11: ("remove_pruning_forward", "holds"),
    12: ("pruning_id_consistency", "holds, for every parameter and its place"),
    13: ("random_pruning_pickle", "holds"),
    14: (
        "multiple_pruning_calls",
        "differs: the hook is a `PruningContainer` from the first call, so that torch's methods can join it",
    ),
    15: ("pruning_container", "holds"),
    16: ("pruning_container_compute_mask", "holds"),
    17: ("l1_unstructured_pruning", "holds"),
    18: (
        "l1_unstructured_pruning_with_importance_scores",
        "differs: scores are signed, the lowest go; torch takes their abs",
    ),
    19: ("unstructured_pruning_same_magnitude", "holds"),
    20: ("random_structured_pruning_amount", "holds"),
    21: ("ln_structured_pruning", "holds for n = 2 (`magnitude`) and n = 1 (`l1`)"),
    22: (
        "ln_structured_pruning_importance_scores",
        "differs: scores are summed over the slice, signed, or given one a slice; torch takes their norm",
    ),
    23: ("remove_pruning", "holds, with the order of parameters"),
    24: (
        "remove_pruning_exception",
        "holds for `prune.remove`; `fp.remove` is of the whole model, where nothing to remove is no error",
    ),
    25: ("global_pruning", "holds"),
    26: (
        "global_pruning_importance_scores",
        "differs: signed, as 18 (and through `prune.global_unstructured` for measures that read more than the weights)",
    ),
    27: (
        "custom_from_mask_pruning",
        "differs: `apply_masks` takes bool masks; torch's `custom_from_mask` on top works",
    ),
    28: ("pruning_rollback", "holds, on every round"),
    29: ("pruning_serialization_model", "holds"),
    30: ("pruning_serialization_state_dict", "holds"),
    31: ("prune", "holds"),
    32: ("prune_importance_scores", "holds"),
    33: ("prune_importance_scores_mimic_default", "holds"),
    34: ("rnn_pruning", "holds"),
}

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv": lambda: nn.Conv3d(2, 4, 2),
}
each = pytest.mark.parametrize(
    ("make", "name"), [(make, name) for make in LAYERS.values() for name in ("weight", "bias")]
)


def with_weight(rows):
    """A linear layer whose weight is these rows."""
    values = torch.tensor(rows, dtype=torch.float32)
    layer = nn.Linear(values.shape[1], values.shape[0])
    layer.weight = nn.Parameter(values)
    return layer


def counting(bias=0.5):
    """Weights 1 to 6, signs mixed."""
    return with_weight([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])


def with_mask(layer, pruned_at):
    """Pruned at these places through torch's interface: scores say where."""
    scores = torch.ones_like(layer.weight)
    for place in pruned_at:
        scores[place] = 0.0
    fp.random_unstructured(layer, "weight", len(pruned_at), importance_scores=scores)
    return layer


@pytest.mark.parametrize(
    ("amount", "error"),
    [("half", TypeError), (None, TypeError), (1.5, ValueError), (-0.5, ValueError), (-3, ValueError)],
)
def test_01_amount_is_validated_when_the_method_is_made(amount, error):
    with pytest.raises(error):
        fp.L1Unstructured(amount)


def test_01_good_amounts():
    for amount in (0, 1, 12_345, 0.0, 0.25, 1.0):
        assert fp.L1Unstructured(amount).amount == amount


def test_02_amount_is_validated_against_the_size():
    with pytest.raises(ValueError, match="expected 0 to 7"):
        to_prune(8, 7)
    assert [to_prune(*case) for case in ((7, 7), (0, 0), (0.5, 0), (6, 7))] == [7, 0, 0, 6]


def test_03_how_many_go():
    assert [to_prune(amount, 20) for amount in (0, 7, 1, 1.0, 0.3, 0.26)] == [0, 7, 1, 20, 6, 5]


@each
def test_04_sizes(make, name):
    layer = make()
    shape = getattr(layer, name).shape
    fp.random_unstructured(layer, name, 0.25)
    assert {getattr(layer, key).shape for key in (name, f"{name}_orig", f"{name}_mask")} == {shape}


@each
def test_05_orig_is_the_parameter(make, name):
    layer = make()
    parameter, values = getattr(layer, name), getattr(layer, name).detach().clone()
    fp.random_unstructured(layer, name, 0.25)
    assert getattr(layer, f"{name}_orig") is parameter
    assert torch.equal(parameter, values)


@each
def test_06_the_weight_is_orig_times_mask(make, name):
    layer = make()
    fp.random_unstructured(layer, name, 0.5)
    assert torch.equal(getattr(layer, name), getattr(layer, f"{name}_orig") * getattr(layer, f"{name}_mask"))


def dense_and_masked(prune_nothing):
    layer, inputs = counting(), torch.randn(3, 3)
    outputs = layer(inputs)
    outputs.square().sum().backward()
    dense = outputs.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()
    layer.zero_grad()
    prune_nothing(layer)
    outputs = layer(inputs)
    outputs.square().sum().backward()
    assert torch.equal(layer(inputs), layer(inputs))
    return dense, (outputs.detach(), layer.weight_orig.grad, layer.bias.grad)


def test_07_a_mask_of_ones_changes_nothing():
    dense, masked = dense_and_masked(
        lambda layer: fp.apply_masks(layer, {"weight": torch.ones(2, 3, dtype=torch.bool)})
    )
    assert all(map(torch.equal, dense, masked))


def test_08_an_amount_of_nothing_changes_nothing():
    dense, masked = dense_and_masked(lambda layer: fp.random_unstructured(layer, "weight", 0.0))
    assert all(map(torch.equal, dense, masked))


def test_09_gradients_and_plain_steps_are_masked():
    layer = with_mask(counting(), [(0, 1), (1, 2)])
    before = layer.weight_orig.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight_orig.grad, layer.weight_mask.float())
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert torch.equal(layer.weight_orig == before, ~layer.weight_mask)


def test_10_forward_by_hand():
    layer = with_mask(counting(), [(0, 1), (1, 0), (1, 2)])
    expected = torch.tensor([1.0 + 3.0, 5.0]) + layer.bias
    torch.testing.assert_close(layer(torch.ones(1, 3))[0], expected)


@pytest.mark.parametrize("remove", [lambda layer: prune.remove(layer, "weight"), fp.remove])
def test_11_remove_leaves_the_forward(remove):
    layer, inputs = with_mask(counting(), [(0, 1), (1, 2)]), torch.randn(4, 3)
    expected = layer(inputs)
    remove(layer)
    assert torch.equal(layer(inputs), expected)


def test_12_the_parameter_keeps_its_identity():
    layer = counting()
    before = [id(parameter) for parameter in layer.parameters()]
    fp.random_unstructured(layer, "weight", 0.5)
    assert [id(parameter) for parameter in layer.parameters()] == before
    prune.remove(layer, "weight")
    assert [id(parameter) for parameter in layer.parameters()] == before


@each
def test_13_pickle(make, name):
    layer = make()
    fp.random_unstructured(layer, name, 0.25)
    back = pickle.loads(pickle.dumps(layer))
    assert type(back) is type(layer)
    assert torch.equal(getattr(back, name), getattr(layer, name))


def test_14_pruning_again_and_again_is_one_container():
    layer = nn.Conv3d(2, 4, 2)
    fp.l1_unstructured(layer, "weight", 0.2)
    first = layer.weight_mask.clone()
    fp.magnitude_structured(layer, "weight", 1, dim=0)
    second = layer.weight_mask.clone()
    prune.ln_structured(layer, "weight", 0.5, n=2, dim=1)
    (hook,) = hooks_of(layer)
    assert isinstance(hook, prune.PruningContainer)
    assert hook._tensor_name == "weight"
    assert [type(method) for method in hook] == [fp.L1Unstructured, fp.MagnitudeStructured, prune.LnStructured]
    assert not (second & ~first).any()
    assert not (layer.weight_mask & ~second).any()


def test_15_containers_take_methods_of_their_tensor_alone():
    layer = counting()
    fp.l1_unstructured(layer, "weight", 2)
    (hook,) = hooks_of(layer)
    other = fp.L1Unstructured(1)
    other._tensor_name = "bias"
    with pytest.raises(ValueError, match="bias"):
        hook.add_pruning_method(other)
    for value in (7, "method"):
        with pytest.raises(TypeError):
            hook.add_pruning_method(value)
    assert len(hook) == 1


def test_16_torch_containers_run_our_methods():
    container = prune.PruningContainer()
    values = torch.tensor([[1.0, 6.0, 3.0], [4.0, 2.0, 5.0]])
    mask = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    for method, expected in (
        (fp.L1Unstructured(1), [[0, 1, 1], [1, 0, 1]]),  # the 2: of what is left the lowest
        (fp.MagnitudeStructured(1, dim=0), [[0, 1, 1], [0, 0, 0]]),  # √41 against √45
        (fp.MagnitudeStructured(1, dim=1), [[0, 1, 0], [0, 0, 0]]),  # 3 against 6
    ):
        method._tensor_name = container._tensor_name = "weight"
        container.add_pruning_method(method)
        mask = container.compute_mask(values * mask, mask)
        assert mask.tolist() == expected


def test_17_l1_by_hand_and_again():
    layer = counting()
    fp.l1_unstructured(layer, "weight", 2)
    assert layer.weight.tolist() == [[0, 0, 3], [-4, 5, -6]]
    fp.l1_unstructured(layer, "weight", 2)
    assert layer.weight.tolist() == [[0, 0, 0], [0, 5, -6]]


def test_18_given_scores_choose_and_are_signed():
    layer, scores = counting(), torch.tensor([[3.0, 2.0, 1.0], [-1.0, -9.0, 0.0]])
    fp.l1_unstructured(layer, "weight", 2, importance_scores=scores)
    assert layer.weight.tolist() == [[1, -2, 3], [0, 0, -6]], "torch would take |scores|: 0 and a 1"
    fp.l1_unstructured(layer, "weight", 2, importance_scores=scores)
    assert layer.weight.tolist() == [[1, -2, 0], [0, 0, 0]]


def test_19_equal_magnitudes_go_by_number_and_not_by_threshold():
    layer = with_weight((torch.arange(60).view(6, 10) % 3 - 1.0).tolist())
    fp.l1_unstructured(layer, "weight", 0.4)
    assert (~layer.weight_mask).sum() == 24


def test_20_random_slices():
    weight = torch.ones(3, 5, 4)
    mask = fp.RandomStructured(0.5, dim=1).compute_mask(weight, torch.ones_like(weight))
    gone = (mask == 0).sum((0, 2))
    assert sorted(gone.tolist()) == [0, 0, 0, 12, 12]


def conv():
    layer = nn.Conv2d(3, 1, 2, bias=False)
    layer.weight.data = torch.tensor([[[[1.0, 9.0], [1.0, 9.0]], [[2.0, 3.0], [2.0, 3.0]], [[4.0, 4.0], [4.0, 4.0]]]])
    return layer


def test_21_slices_by_norm_along_any_axis():
    layer = conv()
    fp.magnitude_structured(layer, "weight", 1, dim=1)
    assert layer.weight_mask.flatten(2).all(-1).tolist() == [[True, False, True]]
    fp.l1_structured(layer, "weight", 1, dim=-1)
    assert layer.weight_mask[0, 0].tolist() == [[False, True], [False, True]]


def test_22_slices_by_given_scores():
    scores = torch.zeros(1, 3, 2, 2)
    scores[:, 0], scores[:, 1], scores[:, 2] = 1.0, 5.0, -8.0
    layer = conv()
    fp.magnitude_structured(layer, "weight", 1, dim=1, importance_scores=scores)
    assert layer.weight_mask.flatten(2).all(-1).tolist() == [[True, True, False]], (
        "summed over the slice, signed; torch takes their norm"
    )
    other = conv()
    fp.magnitude_structured(other, "weight", 1, dim=1, importance_scores=torch.tensor([1.0, 0.0, 2.0]))
    assert other.weight_mask.flatten(2).all(-1).tolist() == [[True, False, True]]


@each
def test_23_remove(make, name):
    layer = make()
    names = [key for key, _ in layer.named_parameters()]
    fp.random_unstructured(layer, name, 0.5)
    assert f"{name}_orig" in dict(layer.named_parameters())
    assert f"{name}_mask" in dict(layer.named_buffers())
    assert name not in dict(layer.named_parameters())
    values = getattr(layer, name)
    prune.remove(layer, name)
    assert [key for key, _ in layer.named_parameters()] == names
    assert not list(layer.buffers())
    assert torch.equal(getattr(layer, name), values)


@each
def test_24_remove_of_what_is_not_pruned(make, name):
    layer = make()
    assert not prune.is_pruned(layer)
    with pytest.raises(ValueError, match="has to be pruned before pruning can be removed"):
        prune.remove(layer, name)  # torch's function
    before = snapshot(layer)
    assert fp.remove(layer) is layer, "the whole-model function takes any model"
    assert snapshot(layer) == before


def two():
    return nn.Sequential(with_weight([[1.0, -4.0, 5.0]]), with_weight([[-2.0], [3.0], [-0.5]]))


def test_25_global():
    model = two()
    fp.global_prune(model, "l1", amount=3)
    assert (model[0].weight.tolist(), model[1].weight.tolist()) == ([[0, -4, 5]], [[0], [3], [0]])
    theirs = two()
    prune.global_unstructured([(theirs[0], "weight"), (theirs[1], "weight")], fp.L1Unstructured, amount=3)
    assert torch.equal(theirs[1].weight, model[1].weight), "and by torch's function with our class"


def test_26_global_with_scores():
    scores = torch.tensor([[1.0, -1.0, 5.0]]), torch.tensor([[0.0], [9.0], [-2.0]])
    model = two()
    fp.global_prune(model, amount=3, scores={(model[0], "weight"): scores[0], (model[1], "weight"): scores[1]})
    assert (model[0].weight.tolist(), model[1].weight.tolist()) == ([[1, 0, 5]], [[0], [3], [0]])
    theirs = two()
    pairs = [(theirs[0], "weight"), (theirs[1], "weight")]
    prune.global_unstructured(pairs, fp.LossPreservationUnstructured, dict(zip(pairs, scores, strict=True)), amount=3)
    assert [layer.weight.tolist() for layer in theirs] == [layer.weight.tolist() for layer in model], "signed there too"


def test_27_a_custom_mask_joins_the_one_there_is():
    layer = counting()
    fp.apply_masks(layer, {"weight": torch.tensor([[True, False, True], [True, False, True]])})
    fp.apply_masks(layer, {"weight": torch.tensor([[False, False, True], [True, True, True]])})
    assert layer.weight_mask.tolist() == [[False, False, True], [True, False, True]]
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 1, 1], [0, 1, 1]]))
    assert layer.weight_mask.tolist() == [[False, False, True], [False, False, True]]


@each
def test_28_an_error_in_the_middle_leaves_the_module(make, name, monkeypatch):
    def raises(self, *args, **kwargs):
        raise RuntimeError("in the middle")

    layer = make()
    before = snapshot(layer)
    monkeypatch.setattr(fp.L1Unstructured, "_mask", raises)
    with pytest.raises(RuntimeError, match="in the middle"):
        fp.l1_unstructured(layer, name, 0.5)
    assert snapshot(layer) == before


def model_of_two():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


def test_29_whole_models_saved():
    model, inputs = model_of_two(), torch.randn(3, 5)
    fp.l1_unstructured(model[0], "weight", 0.7)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    back = torch.load(buffer, weights_only=False)
    assert list(back.state_dict()) == list(model.state_dict())
    assert {"0.weight_orig", "0.weight_mask"} < set(back.state_dict())
    assert torch.equal(back(inputs), model(inputs))


def test_30_state_dicts_saved_after_remove():
    model, fresh, inputs = model_of_two(), model_of_two(), torch.randn(3, 5)
    names = list(model.state_dict())
    fp.l1_unstructured(model[0], "weight", 0.7)
    expected = model(inputs)
    prune.remove(model[0], "weight")
    torch.save(model.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer))
    assert list(fresh.state_dict()) == names
    assert torch.equal(fresh(inputs), expected)


VALUES = torch.tensor([[7.0, 1.0, 3.0], [2.0, 9.0, 4.0]])
LEFT = torch.tensor([[1, 0, 1], [1, 1, 1]])


def test_31_a_tensor_without_a_module():
    assert fp.L1Unstructured(2).prune(VALUES, LEFT).tolist() == [[7, 0, 0], [0, 9, 4]]


def test_32_a_tensor_with_scores():
    scores = torch.tensor([[1.0, 0.0, 6.0], [2.0, 3.0, 4.0]])
    assert fp.L1Unstructured(2).prune(VALUES, LEFT, importance_scores=scores).tolist() == [[0, 0, 3], [0, 9, 4]]


def test_33_scores_that_are_the_weights():
    method = fp.L1Unstructured(2)
    assert torch.equal(method.prune(VALUES, LEFT, importance_scores=VALUES), method.prune(VALUES, LEFT))


def test_34_recurrent_layers():
    layer = nn.LSTM(5, 4)
    names = list(layer._parameters)
    fp.l1_unstructured(layer, "weight_ih_l0", 0.5)
    assert [isinstance(weight, nn.Parameter) for weight in layer._flat_weights] == [False, True, True, True]
    assert torch.equal(layer._flat_weights[0], layer.weight_ih_l0)
    prune.remove(layer, "weight_ih_l0")
    assert all(isinstance(weight, nn.Parameter) for weight in layer._flat_weights)
    assert list(layer._parameters) == names
