"""What a state dict has to be to be loaded: all of it, of the model's shapes, or nothing is touched."""

from __future__ import annotations

import re

import pytest
import torch
from hosts import mlp, pruned, snapshot
from torch import nn

import torch_flowprune as fp

MODELS = {"dense": mlp, "pruned": pruned}


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


FAULTS = {
    "another shape": (
        lambda state: {**state, "2.bias": torch.zeros(5)},
        "other shape 2.bias: (5,) for (4,)",
    ),
    "one that would be spread over the model's": (
        lambda state: {**state, "2.bias": torch.zeros(1)},
        "other shape 2.bias: (1,) for (4,)",
    ),
    "transposed": (
        lambda state: {
            **state,
            next(name for name in state if name in {"2.weight", "2.weight_orig"}): torch.ones(8, 4),
        },
        "other shape 2.weight: (8, 4) for (4, 8)",
    ),
    "missing": (lambda state: without(state, "0.bias"), "missing 0.bias"),
    "unexpected": (lambda state: {**state, "3.bias": torch.zeros(4)}, "unexpected 3.bias"),
    "all three": (
        lambda state: {**without(state, "0.bias"), "b": torch.ones(()), "a": torch.ones(()), "2.bias": torch.zeros(5)},
        "missing 0.bias; unexpected a, b; other shape 2.bias: (5,) for (4,)",
    ),
    "more than five": (
        lambda state: {**state, **{f"x{i}": torch.zeros(()) for i in range(6)}},
        "unexpected x0, x1, x2, x3, x4 ...",
    ),
    "five": (
        lambda state: {**state, **{f"x{i}": torch.zeros(()) for i in range(5)}},
        "unexpected x0, x1, x2, x3, x4",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("source", MODELS)
@pytest.mark.parametrize("target", MODELS)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(target, source, fault):
    """``0.weight`` fits and comes first: loaded entry by entry, it would be in the model when the fault is met."""
    spoil, text = FAULTS[fault]
    model = MODELS[target]()
    state, before = spoil(fp.state_dict(MODELS[source]())), snapshot(model)
    expected = f"^{re.escape(f'the state dict does not fit the model, and nothing was loaded: {text}')}$"
    with pytest.raises(ValueError, match=expected):
        fp.load_state_dict(model, state)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (
            torch.ones(7, dtype=torch.uint8),
            "a packed mask of shape (8, 8) is 8 bytes (uint8), got torch.uint8 of shape",
        ),
        (torch.ones(4, 8), "a packed mask of shape (8, 8) is 8 bytes (uint8), got torch.float32 of shape (4, 8)"),
        (torch.ones(8).bool(), "a packed mask of shape (8, 8) is 8 bytes (uint8), got torch.bool of shape (8,)"),
        (torch.ones(1, 8, dtype=torch.uint8), "got torch.uint8 of shape (1, 8)"),
    ],
)
def test_a_mask_of_another_shape_is_refused_and_nothing_is_loaded(mask, text):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(text)):
        fp.load_state_dict(model, {**fp.state_dict(pruned()), "0.weight_mask": mask})
    assert snapshot(model) == before


@pytest.mark.parametrize("target", MODELS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8, torch.int64])
def test_masks_of_any_dtype_are_loaded_in_place_of_those_there_are(target, dtype):
    """Of other layers, too: what was pruned and is not in the state is dense again."""
    model, source = MODELS[target](), mlp()
    mask = torch.arange(64).view(8, 8) % 3 != 0
    fp.apply_masks(source, {"0.weight": mask})
    state = {**source.state_dict(), "0.weight_mask": mask.to(dtype)}
    assert fp.load_state_dict(model, state) is model
    assert {name: found.tolist() for name, found in fp.masks(model).items()} == {"0.weight": mask.tolist()}
    assert list(model.state_dict()) == list(source.state_dict())
    assert torch.equal(model[0].weight, source[0].weight)
    assert torch.equal(model[0].weight_orig, source[0].weight_orig)


def test_a_dense_state_sets_the_values_under_the_masks():
    model, dense = pruned(), mlp()
    masks = fp.masks(model)
    fp.load_state_dict(model, dense.state_dict())
    assert torch.equal(model[0].weight_orig, dense[0].weight)
    assert all(torch.equal(mask, masks[name]) for name, mask in fp.masks(model).items())


class Named(nn.Module):
    """Names that end as masks and originals do, and are neither."""

    def __init__(self):
        super().__init__()
        self.attention_mask = nn.Parameter(torch.zeros(3, 3))
        self.register_buffer("weight_orig", torch.zeros(2))
        self.layer = nn.Linear(3, 2)


def test_a_name_that_ends_in_mask_is_not_taken_for_one():
    model, source = Named(), Named()
    nn.init.ones_(source.attention_mask)
    source.weight_orig.fill_(2)
    fp.global_prune(source, "magnitude", 0.5, include="layer.weight")
    state = fp.state_dict(source)
    assert {name for name, value in state.items() if value.dtype is torch.uint8} == {"layer.weight_mask"}
    fp.load_state_dict(model, state)
    assert set(fp.masks(model)) == {"layer.weight"}
    assert model.attention_mask.all()
    assert model.weight_orig.tolist() == [2, 2]
    assert torch.equal(model.layer.weight, source.layer.weight)


def test_masks_are_a_new_tensor_each_time():
    model = pruned()
    fp.masks(model)["0.weight"].fill_(False)
    assert model[0].weight_mask.any()


class Versioned(nn.Linear):
    """Refuses states of an older version, as modules do whose buffers have changed their meaning."""

    _version = 3

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get("version") != 3:
            raise RuntimeError(f"{prefix} is of version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *args)


def versioned():
    return nn.Sequential(nn.Linear(8, 8), Versioned(8, 4))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
@pytest.mark.parametrize("dense", [False, True])
def test_versions_of_modules_are_kept(dense, wrap):
    source = pruned(versioned())
    state = fp.state_dict(wrap(source), dense=dense)
    assert state._metadata == source.state_dict()._metadata
    fp.load_state_dict(model := versioned(), state)
    assert torch.equal(model[1].weight, source[1].weight)
    fp.load_state_dict(model := versioned(), wrap(source).state_dict())
    assert torch.equal(model[1].weight, source[1].weight)


def test_a_state_that_says_no_versions_is_of_these_modules():
    """As safetensors has it; every entry fits, so it is no older one."""
    source = pruned(versioned())
    fp.load_state_dict(model := versioned(), dict(fp.state_dict(source)))
    assert torch.equal(model[1].weight, source[1].weight)


def test_an_older_state_is_the_modules_own_to_refuse():
    state = fp.state_dict(pruned(versioned()))
    state._metadata = {**state._metadata, "1": {"version": 2}}
    model = pruned(versioned(), 0.3)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"1\. is of version 2"):
        fp.load_state_dict(model, state)
    assert snapshot(model) == before, "also what was loaded before: the first layer's values and masks"


class Extra(nn.Linear):
    """State of its own, that it may refuse when other modules are loaded."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.table = ["as made"]

    def get_extra_state(self):
        return self.table

    def set_extra_state(self, state):
        self.table[:] = state
        if state == ["bad"]:
            raise ArithmeticError("bad table")


def hooked():
    def refuse(module, incompatible):
        raise ArithmeticError("bad table")

    model = mlp()
    model[2].register_load_state_dict_post_hook(refuse)
    return model


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), Extra(8, 4)), hooked])
def test_all_or_nothing_when_a_module_raises_while_it_is_loaded(make):
    source, model = pruned(make()), pruned(make(), 0.3)
    state, before = fp.state_dict(source), snapshot(model)
    state |= {"2._extra_state": ["bad"]} if "2._extra_state" in state else {}
    with pytest.raises(ArithmeticError, match="bad table"):
        fp.load_state_dict(model, state)
    assert snapshot(model) == before
    assert getattr(model[2], "table", ["as made"]) == ["as made"]


def test_nothing_is_copied_where_only_torch_loads(monkeypatch):
    """A copy of all weights for an error that cannot come would be one too many."""
    source, model = (
        pruned(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
    )
    monkeypatch.setattr(torch.Tensor, "clone", None)
    fp.load_state_dict(model, source.state_dict())


def strictly(model, state):
    model.load_state_dict(state)


def assigned(model, state):
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("load", [strictly, assigned, fp.load_state_dict])
def test_a_dense_state_is_taken_by_any_strict_loader(load):
    """And the masks of a second file make the pruned model of it."""
    source, model = pruned(nn.Sequential(nn.LSTM(4, 4), nn.BatchNorm1d(8), nn.Linear(8, 4)), include="*"), None
    state, stored = fp.state_dict(source, dense=True), fp.masks(source, packed=True)
    model = nn.Sequential(nn.LSTM(4, 4), nn.BatchNorm1d(8), nn.Linear(8, 4))
    assert list(state) == list(model.state_dict())
    load(model, state)
    assert {name for name, value in model.named_parameters() if (value == 0).any()} >= set(stored)
    assert not fp.masks(model)
    fp.apply_masks(model, stored)
    assert {name: mask.tolist() for name, mask in fp.masks(model).items()} == {
        name: mask.tolist() for name, mask in fp.masks(source).items()
    }
    assert torch.equal(model[2].weight, source[2].weight)


def test_a_dense_state_has_a_tied_weight_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    state = fp.state_dict(pruned(model), dense=True)
    assert state["0.weight"] is state["1.weight"]


def test_a_mask_of_one_element_packed():
    """One entry and its byte have one shape."""
    for kept in (True, False):
        fp.apply_masks(source := nn.PReLU(), {"weight": torch.tensor([kept])})
        fp.apply_masks(model := nn.PReLU(), fp.masks(source, packed=True))
        assert model.weight_mask.tolist() == [kept]
        fp.load_state_dict(other := nn.PReLU(), fp.state_dict(source))
        assert other.weight_mask.tolist() == [kept]


def _with_head(classes):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes))


@pytest.mark.parametrize("form", ["packed", "torch's", "without the head"])
def test_a_pruned_backbone_under_another_head(form):
    source, target = _with_head(10), _with_head(3)
    fp.global_prune(source, "magnitude", 0.5)
    state = source.state_dict() if form == "torch's" else fp.state_dict(source)
    if form == "without the head":
        state = {name: value for name, value in state.items() if not name.startswith("4.")}
    head = {name: value.clone() for name, value in target[4].state_dict().items()}
    with pytest.warns(UserWarning, match=r"^what fits of the state dict was loaded; left out: .*4\.bias"):
        assert fp.load_state_dict(target, state, strict=False) is target
    assert all(torch.equal(target[i].weight, source[i].weight) for i in (0, 2))
    assert fp.masks(target).keys() == {"0.weight", "2.weight"}
    assert all(torch.equal(value, head[name]) for name, value in target[4].state_dict().items())


def test_what_a_state_lacks_keeps_its_mask():
    source, target = _with_head(10), _with_head(3)
    fp.global_prune(source, "magnitude", 0.5)
    fp.l1_unstructured(target[4], "weight", 7)
    with pytest.warns(UserWarning, match="left out"):
        fp.load_state_dict(target, fp.state_dict(source), strict=False)
    assert int((~fp.masks(target)["4.weight"]).sum()) == 7
    with pytest.warns(UserWarning, match="left out"):
        fp.load_state_dict(target, _with_head(10).state_dict(), strict=False, lift_masks=True)
    assert fp.masks(target).keys() == {"4.weight"}


def test_where_all_fits_nothing_is_said_and_where_nothing_does_it_is_refused():
    source, target = pruned(mlp()), mlp()
    fp.load_state_dict(target, fp.state_dict(source), strict=False)
    assert fp.masks(target).keys() == fp.masks(source).keys()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match="nothing of the state dict fits"):
        fp.load_state_dict(target, {"other": torch.ones(3)}, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_a_buffer_of_the_models_own_is_no_mask():
    """Of a shard the parameter keeps its name, and its mask is called as this buffer is."""
    model = nn.Linear(2, 2)
    model.register_buffer("weight_mask", torch.ones(2, 2, dtype=torch.bool))
    state = {**model.state_dict(), "weight_mask": torch.eye(2, dtype=torch.bool)}
    fp.load_state_dict(model, state)
    assert torch.equal(model.weight_mask, state["weight_mask"])
    assert not fp.masks(model)
    assert torch.equal(fp.state_dict(model)["weight_mask"], state["weight_mask"])
