"""Rows 3.16 to 3.19 of docs/explanation/host.md: modules whose class somebody else counts on, or lays another over."""

from __future__ import annotations

import abc
import copy
import gc
import pickle
import weakref

import pytest
import torch
from hosts import assert_in_force, mlp, pruned, snapshot, train
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

import torch_flowprune as fp

ROWS = {
    "3.16": (
        (
            "a class with a registry of its subclasses (`__init_subclass__`, a metaclass), with `__reduce__` or "
            "`__deepcopy__` of its own, or with another library's class laid over it (no fault)"
        ),
        "handled",
        (
            "registries and metaclasses do not see the masked class. A class that copies itself copies a dense "
            "twin, and the masks are put on that. A class laid over it stays over it; where its methods call "
            "`super()`, changing the masks is refused. Classes are freed with their models"
        ),
    ),
    "3.17": (
        "a parametrization of another tensor of the layer, before or after the mask (no fault)",
        "handled",
        (
            "each can be added and removed without the other. torch's copies of a parametrized layer share its "
            "class, so removing a parametrization from one breaks the other, pruned or not"
        ),
    ),
    "3.18": (
        "a weight that the class computes when it is read (`__getattr__`): the mask has no effect",
        "refused",
        "make it an ordinary parameter, or `exclude=` it",
    ),
    "3.19": (
        "root parameters of a model traced by `torch.fx`: copies fail after a forward with gradients",
        "handled",
        "copies, pickles, edits and `fp.remove` work, and edits are still there without masks",
    ),
}

X = torch.linspace(-1, 1, 24).view(3, 8)

REGISTRY = {}


class Registered(nn.Linear):
    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        REGISTRY[cls.__name__] = cls


class Mine(Registered):
    pass


class Keyed(nn.Linear):
    def __init_subclass__(cls, *, key, **options):
        super().__init_subclass__(**options)
        cls.key = key


class One(Keyed, key=1):
    pass


class Counting(type):
    made = 0

    def __new__(cls, *args):
        cls.made += 1
        return super().__new__(cls, *args)


class Counted(nn.Linear, metaclass=Counting):
    pass


class Abstract(nn.Linear, abc.ABC):
    pass


class Slotted(nn.Linear):
    __slots__ = ("extra",)


class Rebuilt(nn.Linear):
    """Copied and pickled as it was made, with new values."""

    def __reduce__(self):
        return (_filled, (self.in_features, self.out_features))


def _filled(*sizes):
    layer = Rebuilt(*sizes)
    nn.init.constant_(layer.weight, 2)
    return layer


class Exact(nn.Linear):
    """Copied by way of its state, under the names that a dense layer has."""

    def __deepcopy__(self, memo):
        twin = type(self)(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return twin


@pytest.mark.parametrize("kind", [Mine, One, Counted, Abstract, Slotted, Exact])
def test_row_3_16_classes_of_all_kinds(kind):
    layer = kind(8, 8)
    known, made = dict(REGISTRY), Counting.made
    pruned(layer)
    assert isinstance(layer, kind)
    assert (REGISTRY, Counting.made) == (known, made)
    train(layer, X)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight)
    assert twin.weight_orig is not layer.weight_orig
    assert prune.is_pruned(twin)
    assert_in_force(layer, lambda: layer(X))
    back = pickle.loads(pickle.dumps(layer))
    assert torch.equal(back(X), layer(X))
    assert type(fp.remove(layer)) is type(fp.remove(twin)) is kind


def test_row_3_16_a_class_with_a_reduce_of_its_own_is_copied_as_it_says_and_masked():
    model = pruned(nn.Sequential(Rebuilt(8, 8)))
    (layer,) = model
    for twin in (copy.deepcopy(model)[0], pickle.loads(pickle.dumps(model))[0]):
        assert torch.equal(twin.weight, 2.0 * layer.weight_mask)
        assert twin.weight_mask is not layer.weight_mask
        assert prune.is_pruned(twin)
        assert list(twin._parameters) == ["weight_orig", "bias"]
        assert type(fp.remove(twin)) is Rebuilt


def test_row_3_16_classes_go_with_their_models():
    def one():
        class Local(nn.Linear):
            pass

        layer = pruned(Local(8, 8))
        return [weakref.ref(kind) for kind in (Local, type(layer))]

    kinds = [kind for _ in range(3) for kind in one()]
    gc.collect()
    assert [kind() for kind in kinds] == [None] * 6


def test_row_3_16_a_class_laid_over_the_masked_one_stays_over_the_dense_one():
    layer = pruned(nn.Linear(8, 8))
    layer.__class__ = type("Wrapped", (type(layer),), {"extra": lambda self: self.weight.sum()})
    assert torch.equal(layer.extra(), layer.weight.sum())
    pruned(layer, 0.75)
    assert layer.extra() == copy.deepcopy(layer).extra() == fp.remove(layer).extra()
    assert (type(layer).__name__, type(layer).__bases__) == ("Wrapped", (nn.Linear,))


def test_row_3_16_a_class_that_cannot_be_laid_over_another_is_refused():
    layer = pruned(nn.Linear(8, 8))

    class Bound(type(layer)):
        def forward(self, x):
            return super().forward(x)

    layer.__class__ = Bound
    before = snapshot(layer)
    for attempt in (lambda: fp.remove(layer), lambda: prune.remove(layer, "weight")):
        with pytest.raises(ValueError, match="Bound was made a subclass of a masked module's class"):
            attempt()
        assert snapshot(layer) == before


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class Shifted(nn.Module):
    """As torch's ``right_inverse`` has it: assigned values are put under the parametrization."""

    def forward(self, x):
        return x + 1

    def right_inverse(self, x):
        return x - 1


def masked_then_parametrized():
    layer = pruned(nn.Linear(8, 8))
    return parametrize.register_parametrization(layer, "bias", Shifted())


def parametrized_then_masked():
    layer = parametrize.register_parametrization(nn.Linear(8, 8), "bias", Shifted())
    return pruned(layer)


AFTER = {
    "remove": fp.remove,
    "remove by torch": lambda layer: prune.remove(layer, "weight"),
    "prune again": lambda layer: pruned(layer, 0.75),
    "deepcopy": copy.deepcopy,
    "unparametrize": lambda layer: parametrize.remove_parametrizations(layer, "bias"),
    "another": lambda layer: parametrize.register_parametrization(layer, "bias", Twice()),
    "bias too": lambda layer: layer,
}


@pytest.mark.parametrize("make", [masked_then_parametrized, parametrized_then_masked])
@pytest.mark.parametrize("case", AFTER)
def test_row_3_17_a_parametrization_beside_a_mask(make, case):
    layer = make()
    dense, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    other = copy.deepcopy(layer)
    after = AFTER[case](layer) or layer
    if case != "unparametrize":  # torch's copies share their class with the model, and lose its property with it
        assert torch.equal(other(X), functional.linear(X, dense, bias))
    if case != "prune again":
        assert torch.equal(after.weight, dense)
    assert torch.equal(after.bias, 2 * bias if case == "another" else bias)
    assert prune.is_pruned(after) is (not case.startswith("remove"))
    assert parametrize.is_parametrized(after) is (case != "unparametrize")
    train(after, X)
    if prune.is_pruned(after):
        assert_in_force(after, lambda: after(X))
        fp.remove(after)
    if parametrize.is_parametrized(after):
        parametrize.remove_parametrizations(after, "bias")
    assert type(after) is nn.Linear
    assert sorted(after._parameters) == ["bias", "weight"]


def test_row_3_17_a_mask_and_a_parametrization_of_torch_on_one_layer():
    layer = pruned(parametrizations.weight_norm(nn.Linear(8, 8), "bias", dim=None))
    expected = layer(X)
    torch.testing.assert_close(fp.remove(layer)(X), expected)
    assert parametrize.is_parametrized(layer, "bias")


class Computing(nn.Linear):
    def __getattr__(self, name):
        value = super().__getattr__(name)
        return 3 * value if name == "weight" else value


def test_row_3_18_a_weight_computed_when_it_is_asked_for():
    layer = Computing(8, 8)
    before = snapshot(layer)
    with pytest.raises(ValueError, match="'weight' is not what Computing gives when it is asked for 'weight'"):
        pruned(layer)
    assert snapshot(layer) == before


def traced():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return functional.linear(self.inner(x), self.w).relu()

    return torch.fx.symbolic_trace(Root())


def edit(model):
    for node in model.graph.nodes:
        if node.target == "relu":
            node.target = "neg"
    model.recompile()
    return model


def test_row_3_19_root_parameters_of_a_traced_model():
    model = traced()
    values = model.w.detach().clone()
    pruned(model, include=["w", "inner.weight"])
    expected = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), expected)
        assert prune.is_pruned(twin)
        assert fp.masks(twin).keys() == {"w", "inner.weight"}
        assert torch.equal(twin.w_orig, values)
        assert torch.equal(fp.remove(twin)(X), expected)
    assert torch.equal(model.w_orig, values)
    assert_in_force(model, lambda: model(X))


@pytest.mark.parametrize("remove_first", [False, True])
def test_row_3_19_edits_of_a_traced_model(remove_first):
    model = pruned(traced(), include="w")
    before = functional.linear(model.inner(X), model.w).detach()
    if remove_first:
        fp.remove(model)
    assert torch.equal(edit(model)(X), -before)
    assert torch.equal(fp.remove(model)(X), -before)
    assert torch.equal(edit(copy.deepcopy(model))(X), -before)


def test_row_3_19_a_root_parameter_called_weight():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return functional.linear(x, self.weight)

    model = pruned(torch.fx.symbolic_trace(Root()), include="weight")
    assert torch.equal(copy.deepcopy(model)(X), functional.linear(X, model.weight_orig * model.weight_mask))


def test_row_3_19_classes_of_traced_models_go_with_them():
    kinds = [weakref.ref(type(fp.remove(pruned(traced(), include="w")))) for _ in range(3)]
    gc.collect()
    assert [kind() for kind in kinds] == [None] * 3


def test_a_plain_model_has_plain_classes_again():
    model = pruned()
    assert [type(module) for module in fp.remove(model)] == [type(module) for module in mlp()]
