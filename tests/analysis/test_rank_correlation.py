"""Rank correlation against scipy and against counting by hand."""

import math

import pytest
import torch

from torch_flowprune.analysis.rank_correlation import laid_out, spearman


def by_hand(one, other):
    """Pearson's correlation of mean ranks, each rank counted: how many are smaller, and half of the ties."""

    def ranks(values):
        return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]

    a, b = ranks(one), ranks(other)
    mean = (len(a) + 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_textbooks_with_ties(levels, seed):
    source = torch.Generator().manual_seed(seed)
    one, other = torch.randint(levels, (2, 40), generator=source).double()
    found = spearman(one, other)
    assert found == pytest.approx(by_hand(one.tolist(), other.tolist()), abs=1e-11)
    scipy = pytest.importorskip("scipy.stats")
    assert found == pytest.approx(scipy.spearmanr(one.numpy(), other.numpy()).statistic, abs=1e-11)


def test_only_the_order_counts():
    values = torch.randn(50, dtype=torch.float64)
    assert spearman(values, values.exp() * 1e-300) == 1.0
    assert spearman(values, -(values**3)) == -1.0


def test_tiny_scores_are_told_apart():
    """Scores of GraSP at T = 200 are of this size."""
    values = torch.randperm(100).float() * 1e-38
    assert spearman(values, torch.arange(100)) == pytest.approx(by_hand(values.tolist(), list(range(100))), abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_any_dtype(dtype):
    assert spearman(torch.tensor([3, 1, 2]).to(dtype), torch.tensor([30, 10, 20])) == 1.0


def test_nothing_to_rank_is_nan():
    assert math.isnan(spearman(torch.zeros(3), torch.arange(3)))
    assert math.isnan(spearman(torch.ones(1), torch.ones(1)))
    assert math.isnan(spearman(torch.ones(0), torch.ones(0)))


def test_scores_are_laid_out_in_model_order():
    assert laid_out([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], 3).tolist() == [3, 1, 2]


def test_of_many_scores_every_nth_is_taken_of_each_layer(monkeypatch):
    monkeypatch.setattr("torch_flowprune.analysis.rank_correlation._SAMPLE", 10)
    found = laid_out([torch.arange(25.0), torch.arange(100.0, 107.0)], 32)
    assert found.tolist() == [*range(0, 25, 3), 100, 103, 106]
