"""One argument list: every call takes every word of a flow, of the units and of an allocation that it can use."""

import inspect
from dataclasses import fields
from typing import get_args, get_type_hints

import cases
import pytest
import torch
from cases import CASES

import torch_flowprune as fp
from torch_flowprune.analysis.comparison import CompareOptions
from torch_flowprune.analysis.diagnosis import DiagnoseOptions
from torch_flowprune.analysis.layer_losses import SensitivityOptions
from torch_flowprune.gradients import FlowOptions, FlowSource, LossOptions
from torch_flowprune.inputs.options import check_options
from torch_flowprune.pruning.training.pruner import PrunerOptions
from torch_flowprune.scoring import PrunableUnits, ScoreOptions, UnitOptions
from torch_flowprune.selection import Allocation, AllocationOptions

BATCHES = [CASES["mlp"].batch(6), CASES["mlp"].batch(6)]
OF_FLOW, OF_UNITS, OF_ALLOCATION = (set(kind.__annotations__) for kind in (FlowOptions, UnitOptions, AllocationOptions))
TAKEN = {
    "flow": OF_FLOW,
    "scores": OF_FLOW | OF_UNITS,
    "global_prune": OF_FLOW | OF_UNITS | OF_ALLOCATION,
    "importance_scores": OF_FLOW | OF_UNITS,
    "Pruner": OF_FLOW | OF_UNITS | OF_ALLOCATION,
    "compare": OF_FLOW | OF_UNITS | OF_ALLOCATION,
    "diagnose": OF_FLOW | OF_UNITS,
    "sensitivity": OF_FLOW | OF_UNITS,
    "predict": set(LossOptions.__annotations__),
}
PASSED_ON = {
    "importance_scores": ScoreOptions,
    "Pruner": PrunerOptions,
    "compare": CompareOptions,
    "diagnose": DiagnoseOptions,
    "sensitivity": SensitivityOptions,
    "predict": LossOptions,
}


@pytest.mark.parametrize(
    ("value", "options"), [(FlowSource, OF_FLOW), (PrunableUnits, OF_UNITS), (Allocation, OF_ALLOCATION)]
)
def test_the_values_and_the_typed_options_have_the_same_words(value, options):
    assert {field.name for field in fields(value)} - {"data", "under_masks"} == options  # `flow` alone takes that


@pytest.mark.parametrize("call", TAKEN)
def test_a_call_takes_every_word(call):
    own = set(inspect.signature(getattr(fp, call)).parameters)
    taken = own | set(PASSED_ON[call].__annotations__ if call in PASSED_ON else ())
    assert TAKEN[call] - taken == set()


@pytest.mark.parametrize("call", ["flow", "scores", "global_prune"])
def test_what_is_written_out_is_typed_as_the_options_are(call):
    hints, options = (_without_none(get_type_hints(typed)) for typed in (getattr(fp, call), FlowOptions))
    assert {word: hints[word] for word in options} == options


def _without_none(hints):
    """Python 3.10 adds None to what has it for a default."""
    return {word: {one for one in get_args(hint) or [hint] if one is not type(None)} for word, hint in hints.items()}


@pytest.mark.parametrize(
    "words",
    [{"max_memory": "1MB"}, {"offload": True}, {"autocast": torch.bfloat16}, {"parameters": True}],
    ids=lambda words: next(iter(words)),
)
def test_what_was_refused_by_the_looks_ahead_gives_what_the_plain_call_gives(words):
    """A model that fits only with max_memory= can be pruned, so it can be diagnosed, compared and predicted."""
    model = cases.mlp()
    if "parameters" in words:
        words = {
            "parameters": [(module, "weight") for module in model.modules() if isinstance(module, torch.nn.Linear)]
        }
    near = {"rel": 0.05 if "autocast" in words else 1e-5, "abs": 1e-2 if "autocast" in words else 1e-7}
    plain, asked = (fp.diagnose(model, BATCHES, **given) for given in ({}, words))
    assert asked.total.theta_Hg == pytest.approx(plain.total.theta_Hg, **near)
    plain, asked = (fp.compare(model, "snip", 0.5, BATCHES, **given) for given in ({}, words))
    assert asked.outcomes[0].predicted == pytest.approx(plain.outcomes[0].predicted, **near)
    if "parameters" not in words:
        masks = {name: p > 0 for name, p in model.named_parameters() if p.dim() == 2}
        plain, asked = (fp.predict(model, masks, BATCHES, **given) for given in ({}, words))
        for word in ("first_order", "curvature", "gradient_norm_change", "standard_error"):
            assert getattr(asked, word) == pytest.approx(getattr(plain, word), **near), word


def test_predict_cuts_batches_where_memory_is_short():
    """The standard error stays that over the user's batches, not over the parts they are cut into."""
    model, seen = cases.mlp(), []
    batches = [CASES["mlp"].batch(16), CASES["mlp"].batch(8)]
    masks = {name: p > 0 for name, p in model.named_parameters() if p.dim() > 1}
    whole = fp.predict(model, masks, batches)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    limit = fp.predict(model, masks, batches, max_memory="4kB")
    assert seen[-1] < 8
    for word in ("loss", "first_order", "curvature", "standard_error", "gradient_norm", "gradient_norm_lost"):
        assert getattr(limit, word) == pytest.approx(getattr(whole, word), rel=1e-4, abs=1e-7), word
    assert limit.samples == whole.samples == 24


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("max_memroy", r"call does not take max_memroy=: did you mean max_memory=\?"),
        ("wholly_else", "call does not take wholly_else=: it takes mode, max_memory"),
    ],
)
def test_a_mistyped_word_is_answered(word, text):
    with pytest.raises(TypeError, match=text):
        check_options("call", {word: 1}, ["mode", "max_memory"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"temperature": -1}, "temperature should be above 0"),
        ({"mode": "evaluation"}, "mode should be 'eval' or 'train'"),
        ({"max_samples": 0}, "max_samples should be a whole number of at least 1"),
        ({"max_memory": "much"}, "max_memory should be a number of bytes above 0"),
        ({"autocast": torch.float16}, "autocast should be torch.bfloat16 or None"),
        ({"loss": "ce"}, "loss should be a function"),
        ({"scope": "layers"}, "scope should be"),
        ({"min_keep": -3}, "min_keep should be"),
        ({"scored_by": "norm"}, "scored_by='norm' is for granularity='channel'"),
    ],
)
def test_a_pruner_finds_a_word_out_of_range_when_it_is_made(words, text):
    with pytest.raises((ValueError, TypeError), match=text):
        fp.Pruner(cases.mlp(), "magnitude", 0.5, **words)


MLP, X = cases.mlp(), torch.ones(2, 4, dtype=torch.float64)
ASKED = {
    "flow": ({}, {"dataloader": "data", "criterion": "loss", "max_sample": "max_samples"}),
    "scores": ({}, {"dataloader": "data", "loss_fn": "loss"}),
    "importance_scores": ({}, {"dataloader": "data", "loss_fn": "loss"}),
    "global_prune": ({}, {"dataloader": "data", "pruning_ratio": "sparsity", "max_sample": "max_samples"}),
    "Pruner": ({}, {"loss_fn": "loss", "include_": "include"}),
    "compare": ({}, {"train_loader": "data", "loss_fn": "loss"}),
    "diagnose": ({}, {"train_loader": "data", "loss_fn": "loss"}),
    "predict": ({"masks": {}}, {"dataloader": "data", "criterion": "loss"}),
    "hessian_vector": ({"data": BATCHES, "v": {}}, {"loader": "data", "criterion": "loss"}),
    "recalibrate": ({}, {"dataloader": "data", "samples": "max_samples"}),
    "reconstruct": ({}, {"dataloader": "data", "dampening": "damping"}),
    "regrow": ({"fraction": 0.1}, {"dataloader": "data", "optimiser": "optimizer"}),
    "couple": ({}, {"inputs": "example_inputs", "example_input": "example_inputs"}),
    "shrink": ({}, {"inputs": "example_inputs", "optimiser": "optimizer"}),
    "export": ({"example_inputs": X, "path": "x.onnx"}, {"dynamic_axes": "dynamic_shapes"}),
    "report": ({}, {"dummy_input": "example_inputs"}),
    "fold_constants": ({}, {"dataloader": "data", "criterion": "loss"}),
    "remove_experts": ({}, {"dataloader": "data", "pruning_ratio": "sparsity"}),
    "apply_masks": ({"masks": {}}, {"replaces": "replace"}),
    "masks": ({}, {"pack": "packed"}),
    "state_dict": ({}, {"densely": "dense"}),
    "load_state_dict": ({"state": {}}, {"lift_mask": "lift_masks", "strictly": "strict"}),
    "keep_zeros": ({"optimizer": None}, {"mask": "masks"}),
    "export_ready": ({}, {"inputs": "example_inputs"}),
    "to_semi_structured": ({}, {"strictly": "strict"}),
}


def test_every_call_on_a_model_answers_so():
    """But those with torch's own signature, of one module."""
    calls = {name: getattr(fp, name) for name in fp.__all__ if inspect.isfunction(getattr(fp, name))}
    for name, call in calls.items():
        words = inspect.signature(call).parameters.values()
        optional = any(word.default is not word.empty for word in words)
        if optional and next(iter(words)).name in ("model", "source"):
            assert any(word.kind is word.VAR_KEYWORD for word in words), name


@pytest.mark.parametrize("call", ASKED)
def test_an_unknown_word_is_answered_with_the_one_meant(call):
    own, words = ASKED[call]
    for word, meant in words.items():
        with pytest.raises(TypeError, match=rf"{call} does not take {word}=: did you mean {meant}=\?"):
            getattr(fp, call)(MLP, **own, **{word: None})
    with pytest.raises(TypeError, match=f"{call} does not take wholly_else=: it takes model, "):
        getattr(fp, call)(MLP, **own, wholly_else=1)


def test_a_pruner_says_which_call_takes_the_data():
    for word in ("data", "dataloader", "train_loader"):
        with pytest.raises(
            TypeError, match=rf"Pruner does not take {word}=, which step\(\w+\) and track\(batch\) take"
        ):
            fp.Pruner(cases.mlp(), "snip", 0.5, **{word: BATCHES})


@pytest.mark.parametrize("call", ["predict", "diagnose", "recalibrate", "reconstruct"])
def test_data_left_out_are_asked_for(call):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    fp.global_prune(model, sparsity=0.5)
    own = {"predict": {"masks": fp.masks(model)}}.get(call, {})
    with pytest.raises(ValueError, match="this needs data: pass data= an iterable"):
        getattr(fp, call)(model, **own)
