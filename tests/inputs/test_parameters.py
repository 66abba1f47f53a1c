"""Which parameters are pruned: by default, by pair, by glob, by type; each once, under its dense name."""

import re
import warnings

import cases
import pytest
import torch
from cases import CASES, every_case
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_flowprune as fp
from torch_flowprune.inputs import clear, masked, parameters_of, prunable, wide


class Net(nn.Module):
    """One of everything."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.body = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1, bias=False))
        self.up = nn.ConvTranspose1d(2, 3, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.rnn = nn.LSTM(2, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("table", torch.zeros(3))


DEFAULT = [
    "body.0.weight",
    "body.2.weight",
    "up.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "cross.q_proj_weight",
    "cross.k_proj_weight",
    "cross.v_proj_weight",
    "cross.out_proj.weight",
    "rnn.weight_ih_l0",
    "rnn.weight_hh_l0",
    "head.weight",
]


def names(model, **options):
    return [target.name for target in prunable(model, **options)]


def test_default():
    assert names(Net()) == DEFAULT


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("head.weight", ["head.weight"]),
        ("head", ["head.weight"]),
        ("body.*", ["body.0.weight", "body.2.weight"]),
        ("*", DEFAULT),
        (["head", "body.0"], ["body.0.weight", "head.weight"]),
        (("head.weight", "head"), ["head.weight"]),
        ("embed", ["embed.weight"]),
        ("head.bias", ["head.bias"]),
        ("rnn.weight_*", ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        (
            "*.bias",
            [
                "body.0.bias",
                "body.1.bias",
                "up.bias",
                "attention.out_proj.bias",
                "cross.out_proj.bias",
                "norm.bias",
                "head.bias",
            ],
        ),
        (nn.Linear, ["attention.out_proj.weight", "cross.out_proj.weight", "head.weight"]),
        (nn.LSTM, ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        (nn.LayerNorm, ["norm.weight"]),
        ([nn.Embedding, "head"], ["embed.weight", "head.weight"]),
        (nn.Module, None),
    ],
)
def test_include(include, expected):
    found = names(Net(), include=include)
    if expected is None:
        assert set(found) > set(DEFAULT)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        ("head", ["head.weight"]),
        (nn.Linear, ["attention.out_proj.weight", "cross.out_proj.weight", "head.weight"]),
        (["body.*", "up"], ["body.0.weight", "body.2.weight", "up.weight"]),
        ("*.bias", []),
        (
            "*_proj_weight",
            ["attention.in_proj_weight", "cross.q_proj_weight", "cross.k_proj_weight", "cross.v_proj_weight"],
        ),
    ],
)
def test_exclude(exclude, gone):
    assert names(Net(), exclude=exclude) == [name for name in DEFAULT if name not in gone]


@pytest.mark.parametrize(
    ("pick", "expected"),
    [
        (lambda net: net.head, ["head.weight"]),
        (lambda net: net.body, ["body.0.weight", "body.2.weight"]),  # a Sequential is one pattern, not several
        (lambda net: [net.up, net.head], ["up.weight", "head.weight"]),
        (lambda net: net.cross, [name for name in DEFAULT if name.startswith("cross.")]),
        (lambda net: net.norm, ["norm.weight", "norm.bias"]),
        (lambda net: net, DEFAULT),
    ],
)
def test_modules(pick, expected):
    """A module stands for all that is in it, as a glob of its name does, under a wrapper too."""
    net = Net()
    assert names(net, include=pick(net)) == expected
    assert names(nn.Sequential(net), include=pick(net)) == [f"0.{name}" for name in expected]
    if expected != DEFAULT:
        assert names(net, exclude=pick(net)) == [name for name in DEFAULT if name not in expected]


def test_a_module_that_holds_a_tied_weight_names_it():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.append(nn.Linear(3, 2))
    assert names(model, exclude=model[1]) == ["2.weight"]


def test_include_and_exclude():
    assert names(Net(), include="*", exclude=[nn.MultiheadAttention, "*out_proj"]) == [
        "body.0.weight",
        "body.2.weight",
        "up.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "head.weight",
    ]


def test_pairs():
    model = Net()
    pairs = [(model.head, "bias"), (model.body[0], "weight"), (model.head, "bias")]
    assert names(model, parameters=pairs) == ["body.0.weight", "head.bias"]
    assert names(model, parameters=iter(pairs)) == ["body.0.weight", "head.bias"]
    assert names(model, parameters=pairs, exclude="head.bias") == ["body.0.weight"]
    assert names(model, parameters=[(model.rnn, "weight_hh_l0"), (model.attention, "in_proj_weight")]) == [
        "attention.in_proj_weight",
        "rnn.weight_hh_l0",
    ]


MODEL = Net()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"include": "hed"}, ValueError, "include='hed' matches no parameter; near: head"),
        ({"include": "zzzzzz"}, ValueError, "include='zzzzzz' matches no parameter; see model.named_parameters()"),
        ({"exclude": "hed"}, ValueError, "exclude='hed' matches no parameter; near: head"),
        ({"include": nn.Conv3d}, ValueError, "include=: no weight of a Conv3d in this model"),
        ({"include": 3}, TypeError, "include= takes name globs, module types or modules, got 3"),
        (
            {"include": nn.Linear(4, 2)},
            ValueError,
            "include=: the Linear that was given is none of this model; give a part of the model, or its name",
        ),
        ({"exclude": nn.ReLU()}, ValueError, "exclude=: the ReLU that was given has no parameters"),
        ({"include": MODEL.head.weight}, TypeError, "name globs, module types or modules, got a tensor"),
        ({"include": [int]}, TypeError, "include= takes name globs, module types or modules, got <class 'int'>"),
        (
            {"include": "head", "exclude": "head"},
            ValueError,
            "nothing to prune: by default the weights of Linear, Conv1d",
        ),
        ({"include": "head", "parameters": []}, ValueError, "give parameters= or include=, not both"),
        (
            {"parameters": []},
            ValueError,
            "parameters= is empty: expected (module, name) pairs such as (model.fc, 'weight')",
        ),
        (
            {"parameters": MODEL.parameters()},
            TypeError,
            "parameters= takes (module, name) pairs such as (model.fc, 'weight'), got a tensor; to prune all",
        ),
        (
            {"parameters": [MODEL.head]},
            TypeError,
            "parameters= takes (module, name) pairs such as (model.fc, 'weight'), got Linear(",
        ),
        ({"parameters": ["head.weight"]}, TypeError, "got 'head.weight'"),
        (
            {"parameters": [(MODEL.head, "wieght")]},
            ValueError,
            "Linear has no parameter 'wieght'; its parameters are ['weight', 'bias']",
        ),
        (
            {"parameters": [(MODEL.body[2], "bias")]},
            ValueError,
            "Conv2d has no 'bias': it is None (made with bias=False?); its parameters are ['weight']",
        ),
        (
            {"parameters": [(MODEL, "table")]},
            ValueError,
            "'table' of Net is a buffer: only parameters can be pruned; its parameters are []",
        ),
        (
            {"parameters": [(nn.Linear(2, 2), "weight")]},
            ValueError,
            "(Linear, 'weight') is not part of this model: take the module from the model",
        ),
        (
            {"parameters": [(nn.ReLU(), "weight")]},
            ValueError,
            "ReLU has no parameter 'weight'; its parameters are none",
        ),
    ],
)
def test_bad_choices(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        prunable(MODEL, **options)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.LayerNorm(3)])
def test_nothing_to_prune(model):
    with pytest.raises(
        ValueError,
        match="nothing to prune: .*this model's parameters are (none at all|weight, bias); pick with include=",
    ):
        prunable(model)


# Tied


def test_tied_parameters_are_one_with_every_owner():
    model = CASES["tied"].model()
    (mix, tied) = sorted(prunable(model), key=lambda target: target.name != "mix.weight")
    assert mix.name == "mix.weight"
    assert tied.name == "embed.weight", "named after the first owner, chosen because the second is a Linear"
    assert tied.owners == ((model.embed, "weight"), (model.decode, "weight"))
    by_either = [prunable(model, parameters=[(owner, "weight")])[0].name for owner in (model.embed, model.decode)]
    assert by_either == ["embed.weight"] * 2
    assert len(prunable(model, parameters=[(model.embed, "weight"), (model.decode, "weight")])) == 1


def test_a_module_used_twice_is_one():
    layer = nn.Linear(3, 3)
    (target,) = prunable(nn.Sequential(layer, nn.ReLU(), layer))
    assert target.owners == ((layer, "weight"),)
    assert target.name == "0.weight"


# Names and masks


@every_case
def test_names_are_torchs(case):
    model = case.model()
    assert list(parameters_of(model)) == [name for name, _ in model.named_parameters()]
    assert [target.parameter for target in parameters_of(model).values()] == list(model.parameters())


@every_case
def test_names_stay_when_pruned(case):
    model = case.model()
    before = list(parameters_of(model))
    fp.global_prune(model, sparsity=0.5)
    assert list(parameters_of(model)) == before
    for target in parameters_of(model).values():
        for module, attribute in target.owners:
            assert torch.equal(target.theta, getattr(module, attribute).detach())


def test_a_model_pruned_by_torch_is_understood():
    model = cases.mlp()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    target = parameters_of(model)["0.weight"]
    assert target.parameter is model[0].weight_orig
    assert torch.equal(target.theta, model[0].weight.detach())
    assert names(model) == ["0.weight", "2.weight", "4.weight"]
    assert names(model, parameters=[(model[0], "weight")]) == ["0.weight"]


def test_theta_is_exactly_zero_under_a_mask():
    value = torch.tensor([float("nan"), float("inf"), -3.0, 2.0])
    for mask in (torch.tensor([False, False, False, True]), torch.tensor([0.0, 0.0, 0.0, 1.0])):
        found = masked(value, mask)
        assert found.tolist() == [0.0, 0.0, 0.0, 2.0]
        assert not torch.signbit(found).any()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_wide(dtype, expected):
    assert wide(torch.zeros(2, dtype=dtype)).dtype is expected


def test_a_glob_is_case_sensitive():
    with pytest.raises(ValueError, match="include='HEAD' matches no parameter"):
        prunable(MODEL, include="HEAD")


def test_transformers_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(6, 4), nn.Linear(6, 2))
    assert names(model) == ["0.weight", "1.weight"]
    assert prunable(model)[0].output_axis == 1
    assert fp.scores(model, granularity="filter")["0.weight"].shape == (6,)


def test_output_axes():
    axes = {target.name: target.output_axis for target in prunable(MODEL, include="*")}
    assert axes == {name: int(name == "up.weight") for name in DEFAULT}


def test_the_entries_of_a_bias_are_its_filters_whatever_the_layer():
    for layer in (nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)):
        assert fp.global_prune(layer, "l1", 0.5, include="bias", granularity="filter").pruned == 3


@pytest.mark.parametrize("which", [("embed",), ("decode",), ("embed", "decode")])
def test_a_tied_parameter_masked_by_torch(which):
    """Torch masks one owner, or each differently: what any of them removed counts as removed, once."""
    model = CASES["tied"].model()
    for name in which:
        prune.random_unstructured(getattr(model, name), "weight", amount=4)
    expected = torch.ones(5, 3, dtype=torch.bool)
    for name in which:
        expected &= getattr(model, name).weight_mask != 0
    target = parameters_of(model)["embed.weight"]
    assert torch.equal(target.mask != 0, expected)
    assert torch.equal(target.theta == 0, ~expected)
    assert len(target.owners) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])  # by bits, and without
def test_clearing_goes_past_autograd(dtype):
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    assert clear(weight, torch.tensor([1.0, 0, 1])) is weight
    assert weight.tolist() == [1, 0, 1]
    assert weight.is_leaf
    assert weight.requires_grad


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_clearing_by_bits_selects_whatever_the_values(dtype, mask_dtype):
    source = torch.Generator().manual_seed(0)
    value = torch.randn(6, 8, generator=source).to(dtype)
    value[0, :4] = torch.tensor([float("inf"), float("nan"), -0.0, -1.0])
    mask = torch.rand(6, 8, generator=source) < 0.5
    mask[0, :4] = torch.tensor([False, False, False, True])
    for laid in (value, value.t().contiguous().t(), value[:, ::2]):
        kept = mask[:, ::2] if laid.shape != mask.shape else mask
        found = clear(laid.clone(memory_format=torch.preserve_format), kept.to(mask_dtype))
        assert torch.equal(found, torch.where(kept, laid, torch.zeros((), dtype=dtype)))
        assert (
            not torch.view_as_real(found).signbit()[~kept].any()
            if dtype.is_complex
            else not found.signbit()[~kept].any()
        )


def computed_net(kind):
    make = {"hook": nn.utils.weight_norm, "parametrized": parametrizations.weight_norm}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(make(nn.Linear(4, 4)), nn.Linear(4, 2), nn.Sequential(make(nn.Linear(2, 2))))


@pytest.mark.parametrize("kind", ["hook", "parametrized"])
@pytest.mark.parametrize("include", ["0", ["1", "0"], "0*", "2.*"])
def test_a_layer_whose_weight_is_computed_is_not_named_by_what_stands_beside_it(kind, include):
    """Its bias, or the factors of its weight, were pruned in the weight's place."""
    remover = {"hook": "remove_weight_norm", "parametrized": "remove_parametrizations"}[kind]
    with pytest.raises(ValueError, match=f"picks no weight: .*{remover} first; or name a parameter in full"):
        names(computed_net(kind), include=include)


@pytest.mark.parametrize("kind", ["hook", "parametrized"])
def test_a_type_all_of_whose_weights_are_computed_is_answered_with_the_reason(kind):
    with pytest.raises(ValueError, match=r"no weight.*: 'weight' of .* is .* first"):
        names(nn.Sequential(computed_net(kind)[0]), include=nn.Linear)


@pytest.mark.parametrize("kind", ["hook", "parametrized"])
@pytest.mark.parametrize("include", ["*", nn.Linear, ["1", "*"]])
def test_others_are_pruned_and_a_word_says_that_it_stays_dense(kind, include):
    with pytest.warns(UserWarning, match=r"0\.weight is .* first; it stays dense"):
        assert names(computed_net(kind), include=include) == ["1.weight"]


@pytest.mark.parametrize("kind", ["hook", "parametrized"])
def test_what_stands_beside_a_computed_weight_can_be_named_in_full(kind):
    assert names(computed_net(kind), include="*.bias") == ["0.bias", "1.bias", "2.0.bias"]
    assert names(computed_net(kind), include="0.bias") == ["0.bias"]
    factor = {"hook": "0.weight_v", "parametrized": "0.parametrizations.weight.original1"}[kind]
    assert names(computed_net(kind), include=factor) == [factor]
