"""Amounts in torch's meaning, and what is gone after each round."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_flowprune as fp
from torch_flowprune.selection.schedules import fraction, steps, to_prune


@pytest.mark.parametrize("name", fp.SCHEDULES)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.floats(0, 1), st.floats(0, 1))
def test_every_schedule_rises_to_exactly_the_target(name, rounds, one, two):
    start, target = sorted((one, two))
    if name in ("exponential", "paper") and target == 1 and rounds > 1:
        target = 0.99
        start = min(start, target)
    found = steps(name, rounds, start, target)
    assert len(found) == rounds
    assert sorted(found) == found
    assert found[-1] == target
    assert start <= found[0]


@pytest.mark.parametrize(
    ("target", "rounds", "shares", "left"),
    [(0.75, 5, [0.375, 0.2727, 0.2143, 0.1765, 0.15], [0.625, 0.4545, 0.3571, 0.2941, 0.25])],
)
def test_the_papers_ratios(target, rounds, shares, left):
    densities = [1 - sparsity for sparsity in steps("paper", rounds, 0.0, target)]
    assert densities == pytest.approx(left, abs=5e-5)
    before = [1.0, *densities[:-1]]
    assert [1 - now / was for was, now in zip(before, densities, strict=True)] == pytest.approx(shares, abs=5e-5)


@pytest.mark.parametrize("target", [0.3, 0.75, 0.95])
@pytest.mark.parametrize("rounds", [1, 5, 25])
def test_the_papers_formula_round_by_round(target, rounds):
    density, found = 1.0, steps("paper", rounds, 0.0, target)
    for r, sparsity in enumerate(found, 1):
        density *= 1 - target / (r * target + rounds * (1 - target))
        assert 1 - sparsity == pytest.approx(density, rel=1e-12)
    if rounds == 25 and target == 0.75:
        assert found[0] == pytest.approx(0.107, abs=5e-4)
        assert 1 - (1 - found[-1]) / (1 - found[-2]) == pytest.approx(0.03, abs=5e-4)


def test_the_papers_ratios_of_what_was_left_before():
    """From a model that lost a fifth, down to a fifth: three quarters of what is left go, in the steps of above."""
    assert [1 - sparsity for sparsity in steps("paper", 5, 0.2, 0.8)] == pytest.approx(
        [0.8 * left for left in (0.625, 5 / 11, 5 / 14, 5 / 17, 0.25)]
    )


def test_the_others_formulas():
    assert steps("linear", 4, 0.2, 1.0) == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert [1 - s for s in steps("exponential", 3, 0.5, 0.9375)] == pytest.approx([0.25, 0.125, 0.0625])
    assert steps("cubic", 2, 0.0, 0.8) == pytest.approx([0.7, 0.8])
    assert steps("cubic", 4, 0.4, 0.8) == pytest.approx([0.8 - 0.4 * (1 - r / 4) ** 3 for r in (1, 2, 3, 4)])


@pytest.mark.parametrize("name", fp.SCHEDULES)
def test_from_an_already_empty_model(name):
    assert steps(name, 1, 1.0, 1.0) == [1.0]


@pytest.mark.parametrize("name", ["exponential", "paper"])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_a_schedule_that_never_empties(name, start):
    for rounds in (2, 3):
        with pytest.raises(ValueError, match="schedule never reaches sparsity 1.0: use schedule='linear'"):
            steps(name, rounds, start, 1.0)
    assert steps(name, 1, start, 1.0) == [1.0]


@pytest.mark.parametrize("name", ["linear", "cubic", "paper"])
def test_of_nothing_nothing_more_goes(name):
    assert steps(name, 3, 1.0, 1.0) == [1.0, 1.0, 1.0]


def test_ones_own_schedule():
    assert steps(lambda rounds, start, target: [target] * rounds, 3, 0.0, 0.5) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "own",
    [
        lambda r, s, t: [t],
        lambda r, s, t: [0.4, 0.3, t],
        lambda r, s, t: [0.1, 0.2, 0.3],
        lambda r, s, t: [-0.1, 0.2, t],
        lambda r, s, t: [0.1, 0.9, t],
    ],
    ids=["too few", "falling", "short of the target", "below the start", "past the target"],
)
def test_a_bad_schedule_of_ones_own(own):
    with pytest.raises(ValueError, match="the schedule should give 3 sparsities rising from 0 to exactly 0.5, got"):
        steps(own, 3, 0.0, 0.5)


def test_unknown_schedule():
    with pytest.raises(
        ValueError, match="unknown schedule 'cosine': expected one of linear, exponential, cubic, paper or a function"
    ):
        steps("cosine", 2, 0.0, 0.5)


@pytest.mark.parametrize("rounds", [0, -1, 2.0, True, "3", None])
def test_bad_rounds(rounds):
    with pytest.raises(ValueError, match="rounds should be a whole number of at least 1, got"):
        steps("linear", rounds, 0.0, 0.5)


# amount, in torch's meaning


@pytest.mark.parametrize(
    ("amount", "left", "expected"),
    [
        (0, 7, 0), (7, 7, 7), (3, 7, 3), (1, 16, 1), (1.0, 16, 16), (0.0, 7, 0), (0.5, 7, 4), (0.1, 5, 0), (0.1, 15, 2),
        (np.int64(3), 7, 3), (np.float32(0.5), 8, 4), (Fraction(1, 4), 8, 2),
    ],
)  # fmt: skip
def test_amounts(amount, left, expected):
    assert to_prune(amount, left) == expected


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.333, 0.5, 0.999])
@pytest.mark.parametrize("left", [1, 5, 15, 100])
def test_amounts_round_as_torch_does(amount, left):
    from torch.nn.utils import prune

    assert to_prune(amount, left) == prune._compute_nparams_toprune(amount, left)


@pytest.mark.parametrize("amount", [True, "3", None, [1], 1j])
def test_amounts_that_are_no_numbers(amount):
    with pytest.raises(
        TypeError, match=r"amount should be a fraction of what is left \(float\) or a number of units \(int\), got"
    ):
        to_prune(amount, 10)


@pytest.mark.parametrize("amount", [11, -1, np.int64(11)])
def test_amounts_of_too_many_units(amount):
    with pytest.raises(
        ValueError, match=f"amount={amount} units should be pruned: expected 0 to 10, the number of units left to prune"
    ):
        to_prune(amount, 10)


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan"), float("inf")])
def test_amounts_that_are_no_fractions(amount):
    with pytest.raises(ValueError, match=f"amount={amount} should be from 0.0 to 1.0"):
        to_prune(amount, 10)


def test_percent_for_a_fraction():
    with pytest.raises(ValueError, match="sparsity=90 should be from 0.0 to 1.0; for 90 percent write 0.9"):
        fraction(90)
    with pytest.raises(TypeError, match="sparsity should be a number from 0.0 to 1.0, got '0.5'"):
        fraction("0.5")
