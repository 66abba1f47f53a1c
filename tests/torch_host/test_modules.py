"""Rows 3.1 to 3.12 of docs/explanation/host.md: parametrized, standardised, lazy and otherwise special modules."""

from __future__ import annotations

import pytest
import torch
from hosts import assert_in_force, hooks_of, masked_names, mlp, pruned, snapshot, train
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import torch_flowprune as fp

ROWS = {
    "3.1": (
        "parametrized weights, legacy norms, properties, buffers: a crash on assignment",
        "refused",
        (
            "the error names the call that removes the parametrization. A layer that is not named but would be "
            "pruned by default stays dense, with a warning"
        ),
    ),
    "3.2": (
        "in a global call the modules before it stay pruned",
        "refused",
        "everything is checked before the first module is touched",
    ),
    "3.3": (
        "pruning `parametrizations.weight.original` gives no zeros in the weight (orthogonal)",
        "refused",
        "a mask on the original is not one on the weight",
    ),
    "3.4": (
        "parametrizing a pruned layer fails",
        "documented",
        "torch's error is raised and nothing changes: call `fp.remove` first, or parametrize the dense layer",
    ),
    "3.5": (
        "a mask on `weight_v` of the legacy `weight_norm` comes one forward late",
        "refused",
        "`remove_weight_norm` first",
    ),
    "3.6": (
        "pruning again moves the hook behind the user's",
        "handled",
        (
            "the calls of this package keep the hook's place. torch's own functions on top move it to the end; no "
            "result depends on it"
        ),
    ),
    "3.8": (
        "a lazy module is destroyed",
        "refused",
        "run one batch first. Other layers of the model are scored by their weights alone, and take masks",
    ),
    "3.9": (
        "`bias=None`: the module is destroyed",
        "refused",
        "the text lists the parameters that exist",
    ),
    "3.10": (
        "a buffer of the user's called `weight_mask` is overwritten",
        "refused",
        (
            "rename it. The same holds for a parameter, a module or another attribute of that name, or called "
            "`weight_orig`"
        ),
    ),
    "3.11": (
        "masks of another shape are broadcast, or leave an orphan buffer",
        "refused",
        (
            "`apply_masks` and scores refuse them. A mask from a user's own method is shaped by torch's "
            "container, which broadcasts"
        ),
    ),
    "3.12": (
        "a mask that requires grad breaks the second backward",
        "handled",
        "masks have no graph",
    ),
}

X = torch.linspace(-1, 1, 24).view(3, 8)

old_weight_norm = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
stays_dense = pytest.mark.filterwarnings("ignore:0.weight is .* stays dense")


class Computed(nn.Module):
    """A weight that is a property of the class itself."""

    def __init__(self):
        super().__init__()
        self.root = nn.Parameter(torch.randn(8, 8))

    @property
    def weight(self):
        return 2 * self.root


def with_buffer(layer):
    del layer._parameters["weight"]
    layer.register_buffer("weight", torch.ones(8, 8))
    return layer


REWRITTEN = {
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations first"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations first"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations first"),
    "old weight_norm": (lambda layer: nn.utils.weight_norm(layer), "torch.nn.utils.remove_weight_norm first"),
    "old spectral_norm": (nn.utils.spectral_norm, "torch.nn.utils.remove_spectral_norm first"),
    "property": (lambda layer: Computed(), r"no parameter 'weight'; its parameters are \['root'\]"),
    "buffer": (with_buffer, "is a buffer"),
}


@pytest.mark.parametrize("case", REWRITTEN)
@old_weight_norm
@stays_dense
def test_row_3_1_and_3_2_a_weight_that_is_no_parameter_is_refused_before_anything_is_touched(case):
    make, text = REWRITTEN[case]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1] = make(model[1])
    before = snapshot(model)
    for attempt in (
        lambda: fp.l1_unstructured(model[1], "weight", 0.5),
        lambda: fp.random_structured(model[1], "weight", 0.5),
        lambda: fp.global_prune(model, sparsity=0.5, parameters=[(model[0], "weight"), (model[1], "weight")]),
    ):
        with pytest.raises(ValueError, match=text):
            attempt()
        assert snapshot(model) == before


@old_weight_norm
@pytest.mark.parametrize("case", [case for case in REWRITTEN if "norm" in case or case == "orthogonal"])
def test_row_3_1_left_dense_by_default_with_a_warning(case):
    model = mlp()
    REWRITTEN[case][0](model[0])
    with pytest.warns(UserWarning, match=r"0.weight is .* first; it stays dense"):
        report = fp.global_prune(model, sparsity=0.5)
    assert [layer.name for layer in report.layers] == ["2.weight"]


def test_row_3_1_after_removing_the_parametrization():
    model = mlp()
    parametrizations.weight_norm(model[0])
    parametrize.remove_parametrizations(model[0], "weight")
    assert masked_names(pruned(model)) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_row_3_3_originals_of_a_parametrization(norm):
    model = nn.Sequential(norm(nn.Linear(8, 8)))
    inner = model[0].parametrizations.weight
    name = "original1" if hasattr(inner, "original1") else "original"
    before = snapshot(model)
    for attempt in (
        lambda: fp.l1_unstructured(inner, name, 0.5),
        lambda: fp.global_prune(model, sparsity=0.5, include=f"*{name}"),
    ):
        with pytest.raises(
            ValueError, match="a mask on it would not be one on the weight|the weight made from it is parametrized"
        ):
            attempt()
        assert snapshot(model) == before


@old_weight_norm
def test_row_3_4_parametrizing_a_pruned_layer():
    model = pruned()
    expected, before = model(X), snapshot(model)
    with pytest.raises(ValueError, match="does not have a parameter"):  # torch's own text
        parametrizations.spectral_norm(model[0])
    with pytest.raises(KeyError):
        nn.utils.weight_norm(model[0])
    assert snapshot(model) == before
    assert torch.equal(model(X), expected)
    parametrizations.weight_norm(fp.remove(model)[0])


@old_weight_norm
def test_row_3_5_originals_of_a_legacy_hook():
    layer = nn.utils.weight_norm(nn.Linear(8, 8))
    before = snapshot(layer)
    for name in ("weight_v", "weight_g"):
        with pytest.raises(
            ValueError, match="rewritten by WeightNorm before every forward: torch.nn.utils.remove_weight_norm first"
        ):
            fp.l1_unstructured(layer, name, 0.5)
        assert snapshot(layer) == before


def test_row_3_6_hooks_keep_their_order():
    layer = nn.Linear(8, 8)
    fp.l1_unstructured(layer, "weight", 0.2)
    layer.register_forward_pre_hook(user := lambda module, inputs: None)
    fp.l1_unstructured(layer, "weight", 0.2)
    fp.global_prune(layer, sparsity=0.5)
    (first, second) = layer._forward_pre_hooks.values()
    assert first is hooks_of(layer)[0]
    assert second is user


def test_row_3_8_lazy_modules():
    layer = nn.LazyLinear(4)
    before = list(layer.__dict__)
    for attempt in (lambda: fp.l1_unstructured(layer, "weight", 0.5), lambda: fp.global_prune(layer, sparsity=0.5)):
        with pytest.raises(ValueError, match="run one batch through the model first"):
            attempt()
    assert list(layer.__dict__) == before
    layer(X)
    assert pruned(layer).weight_mask.sum() == 16


def test_row_3_8_beside_a_lazy_module():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    before = snapshot(model[0])
    assert fp.scores(model, "magnitude", include="0")["0.weight"].shape == (64,)
    for attempt in (
        lambda: fp.global_prune(model, sparsity=0.5, include="0"),
        lambda: fp.scores(model, "snip", (X, torch.zeros(len(X), dtype=torch.long)), include="0"),
    ):
        with pytest.raises(ValueError, match="'1.weight' has no shape yet .* run one batch through the model first"):
            attempt()
    assert snapshot(model[0]) == before
    fp.apply_masks(model, {"0.weight": torch.eye(8) == 0})


def test_row_3_9_no_bias():
    layer = nn.Linear(8, 8, bias=False)
    before = snapshot(layer)
    for attempt in (
        lambda: fp.l1_unstructured(layer, "bias", 0.5),
        lambda: fp.global_prune(layer, sparsity=0.5, parameters=[(layer, "bias")]),
    ):
        with pytest.raises(
            ValueError, match=r"has no 'bias': it is None \(made with bias=False\?\); its parameters are \['weight'\]"
        ):
            attempt()
    assert snapshot(layer) == before
    layer(X)


def test_row_3_10_a_buffer_with_the_name_of_a_mask():
    layer = nn.Linear(8, 8)
    layer.register_buffer("weight_mask", torch.ones(3))
    before = snapshot(layer)
    for attempt in (lambda: fp.l1_unstructured(layer, "weight", 0.5), lambda: pruned(layer)):
        with pytest.raises(
            ValueError, match="already has a buffer 'weight_mask' of its own, the name a mask needs: rename it"
        ):
            attempt()
    assert snapshot(layer) == before


class Method(nn.Linear):
    """A module with a method of that name."""

    def weight_mask(self):
        return None


def with_own(name, value):
    layer = nn.Linear(8, 8)
    setattr(layer, name, value)
    return layer


OWN = {
    "parameter weight_orig": lambda: with_own("weight_orig", nn.Parameter(torch.ones(8, 8))),
    "tensor weight_orig": lambda: with_own("weight_orig", torch.ones(8, 8)),
    "module weight_orig": lambda: with_own("weight_orig", nn.Identity()),
    "parameter weight_mask": lambda: with_own("weight_mask", nn.Parameter(torch.ones(8, 8))),
    "tensor weight_mask": lambda: with_own("weight_mask", torch.ones(8, 8)),
    "None weight_mask": lambda: with_own("weight_mask", None),
    "module weight_mask": lambda: with_own("weight_mask", nn.Identity()),
    "method weight_mask": lambda: Method(8, 8),
}


@pytest.mark.parametrize("build", OWN.values(), ids=OWN)
def test_row_3_10_anything_with_the_name_of_a_mask_or_an_original(build):
    layer = build()
    before, kind = dict(layer.__dict__), type(layer)
    for attempt in (lambda: fp.l1_unstructured(layer, "weight", 0.5), lambda: fp.global_prune(layer, sparsity=0.5)):
        with pytest.raises(ValueError, match=r"already has an? .* 'weight_(orig|mask)' of its own, the name a mask"):
            attempt()
    assert type(layer) is kind
    assert dict(layer.__dict__) == before


class Fixed(prune.BasePruningMethod):
    """A user's method on torch's base class that returns what it is told to."""

    PRUNING_TYPE = "global"

    def __init__(self, mask):
        self.mask = mask

    def compute_mask(self, t, default_mask):
        return self.mask


@pytest.mark.parametrize("shape", [(3,), (8, 1), (8, 8, 1)])
def test_row_3_11_masks_of_another_shape(shape):
    layer = pruned(nn.Linear(8, 8))
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"should have shape \(8, 8\)"):
        fp.apply_masks(layer, {"weight": torch.ones(shape, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"expected a score per unit, shape \(64,\)"):
        fp.global_prune(layer, lambda theta: theta.expand(-1, 2), sparsity=0.6)
    assert snapshot(layer) == before


@pytest.mark.parametrize("shape", [(3,), (8, 1)])
def test_row_3_11_a_user_method_that_returns_another_shape_leaves_no_orphan(shape):
    layer = pruned(nn.Linear(8, 8))
    expected = layer(X)
    if shape == (3,):
        with pytest.raises(RuntimeError, match="must match the existing size"):
            Fixed.apply(layer, "weight", torch.ones(shape))
    else:
        Fixed.apply(layer, "weight", torch.ones(shape))  # torch's container broadcasts what broadcasts
    assert layer.weight_mask.shape == (8, 8)
    assert torch.equal(layer(X), expected)
    assert list(fp.remove(layer)._buffers) == []


def test_row_3_12_a_mask_that_requires_grad():
    layer = pruned(nn.Linear(8, 8), sparsity=0.25)
    Fixed.apply(layer, "weight", (torch.arange(64).view(8, 8) % 2).float().requires_grad_())
    assert not layer.weight_mask.requires_grad
    train(layer, X, steps=3)
    assert_in_force(layer, lambda: layer(X))
