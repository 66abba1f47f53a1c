"""Numbers of numpy and tensors, arrays and lists, in every argument that takes a number or a tensor."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import torch_flowprune as fp

BATCH = (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def prune(**words):
    return fp.global_prune(net(), **{"sparsity": 0.5, **words})


ALIKE = {
    "amount": ({"amount": 3, "sparsity": None}, {"amount": np.int64(3), "sparsity": None}),
    "min_keep": ({"min_keep": 12}, {"min_keep": np.int64(12)}),
    "min_keep of a tensor": ({"min_keep": 0.4}, {"min_keep": torch.tensor(0.4)}),
    "min_keep by name": ({"min_keep": {"0.weight": 20}}, {"min_keep": {"0.weight": np.int32(20)}}),
    "max_sparsity": ({"max_sparsity": 0.5}, {"max_sparsity": np.float32(0.5)}),
    "rounds": ({"rounds": 2}, {"rounds": np.int64(2)}),
    "schedule": ({"schedule": [0.2, 0.5]}, {"schedule": np.array([0.2, 0.5])}),
    "schedule of a tensor": ({"schedule": [0.2, 0.5]}, {"schedule": torch.tensor([0.2, 0.5])}),
    "a schedule that gives a tensor": (
        {"rounds": 2, "schedule": "linear"},
        {"rounds": 2, "schedule": lambda rounds, start, end: torch.linspace(start, end, rounds + 1)[1:]},
    ),
    "round_to": ({"round_to": 2, "granularity": "filter"}, {"round_to": np.int64(2), "granularity": "filter"}),
}


@pytest.mark.parametrize("case", ALIKE)
def test_numbers_are_numbers_whoever_made_them(case):
    plain, others = ({"sparsity": 0.5, **words} for words in ALIKE[case])
    if "schedule" in plain and not isinstance(plain["schedule"], str):
        plain, others = ({**words, "sparsity": None} for words in (plain, others))
    assert str(prune(**plain)) == str(prune(**others))


@pytest.mark.parametrize(
    "made",
    [
        lambda value: value.numpy(),
        lambda value: value.tolist(),
        lambda value: value.double(),
        lambda value: value.half(),
    ],
    ids=["numpy", "list", "float64", "float16"],
)
def test_scores_are_tensors_arrays_or_lists(made):
    order = torch.randperm(64)
    scores = {"0.weight": order[:32], "2.weight": order[32:]}
    expected, report = prune(scores=scores), prune(scores={name: made(value) for name, value in scores.items()})
    assert str(report) == str(expected)


@pytest.mark.filterwarnings("ignore::torch_flowprune.TiedScoresWarning")
def test_scores_of_eight_bits_are_taken():
    scores = fp.scores(net(), "magnitude")
    assert prune(scores={name: value.to(torch.float8_e4m3fn) for name, value in scores.items()}).pruned == 32


def test_importance_scores_of_numpy():
    layer = nn.Linear(2, 2)
    fp.taylor_unstructured(layer, "weight", 1, importance_scores=np.array([[-5.0, 1.0], [2.0, 3.0]]))
    assert layer.weight_mask.tolist() == [[False, True], [True, True]]


REFUSED = {
    "scores= a tensor": (lambda: prune(scores=torch.rand(64)), "scores= should be tensors by parameter name"),
    "theta0= a model": (
        lambda: fp.scores(net(), "distance_biased_loss_preservation", BATCH, theta0=net()),
        "theta0 should be tensors by parameter name",
    ),
    "complex": (lambda: given(torch.ones(2, 2) * 1j), "importance_scores should be numbers with values"),
    "bool": (lambda: given(torch.ones(2, 2, dtype=torch.bool)), "importance_scores should be numbers with values"),
    "meta": (lambda: given(torch.ones(2, 2, device="meta")), "importance_scores should be numbers with values"),
    "words": (lambda: given("high"), "importance_scores should be numbers in a tensor, an array or a list"),
    "a number": (lambda: given(0), r"importance_scores of 'weight' should have shape \(2, 2\) or \(4,\), got \(\)"),
    "infinities of both signs": (
        lambda: fp.taylor_structured(
            nn.Linear(2, 2), "weight", 1, importance_scores=torch.tensor([[float("inf"), -float("inf")], [1, 2]])
        ),
        "infinities of both signs",
    ),
    "a schedule with nan": (
        lambda: prune(rounds=2, schedule=lambda *_: [float("nan"), 0.5]),
        "the schedule should give 2 sparsities rising",
    ),
    "rounding": (lambda: prune(sparsity=1.0000001), r"sparsity=1.0000001 should be from 0.0 to 1.0$"),
}


def given(scores):
    return fp.taylor_unstructured(nn.Linear(2, 2), "weight", 1, importance_scores=scores)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_number_is_an_error_that_names_the_argument(case):
    call, text = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=text):
        call()


def test_whole_weights_are_ranked_as_numbers():
    weights = torch.tensor([[-2, 1], [0, 2]])
    mask = fp.MagnitudeUnstructured(1).compute_mask(weights, torch.ones(2, 2))
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_comparisons_take_arrays_of_sparsities():
    found = [fp.compare(net(), ["l1"], levels, BATCH) for levels in ([0.5, 0.75], np.array([0.5, 0.75]))]
    assert str(found[0]) == str(found[1])


def test_what_is_no_number_is_none_in_json():
    diagnosis = fp.diagnose(net(), BATCH, masks={"0.weight": torch.ones(8, 4) > 0})
    assert json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
