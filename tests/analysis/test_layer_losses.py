"""Losses of layers pruned alone are those of prunes by hand; the sparsities found are those of trying them all."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp

DATA = (torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 2)
UNSEEN = (torch.randn(12, 4, generator=torch.Generator().manual_seed(2)), torch.arange(12) % 2)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2)).eval()


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(UNSEEN[0]), UNSEEN[1]).item()


@pytest.mark.parametrize("granularity", ["weight", "filter", "channel"])
@pytest.mark.parametrize("method", ["magnitude", "taylor", "loss_preservation"])
def test_losses_are_those_of_prunes_by_hand(granularity: str, method: str) -> None:
    model, words = net(), {"granularity": granularity, "data": DATA}
    before = copy.deepcopy(model.state_dict())
    found = fp.sensitivity(model, method, sparsities=[0.3, 0.6], held_out=UNSEEN, **words)
    assert found.loss == pytest.approx(loss_of(model))
    assert found.samples == 12
    assert not fp.masks(model) and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, losses in found.losses.items():
        for share in (0.3, 0.6):
            by_hand = net()
            report = fp.global_prune(by_hand, method, allocation={name: share}, **words)
            assert losses[report.pruned] == pytest.approx(loss_of(by_hand)), (name, share)
        assert losses[0] == found.loss


@pytest.mark.parametrize("granularity", ["weight", "filter", "channel"])
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.45, 0.8])
def test_the_allocation_is_taken_as_it_is(granularity: str, sparsity: float) -> None:
    model = net()
    found = fp.sensitivity(model, "magnitude", DATA, granularity=granularity)
    report = fp.global_prune(
        model, "magnitude", allocation=found.allocation(sparsity), granularity=granularity, example_inputs=DATA[0]
    )
    assert report.pruned == round(sparsity * report.units)


def test_what_nobody_reads_costs_nothing() -> None:
    """Half of the second layer's units are read by nobody."""
    model = net()
    with torch.no_grad():
        model[2].weight[:4] *= 1e-3
        model[2].bias[:4] = 0
        model[4].weight[:, :4] = 0
    found = fp.sensitivity(model, "magnitude", DATA, held_out=UNSEEN, sparsities=[0.5, 0.9], granularity="filter")
    assert found.losses["2.weight"][4] == pytest.approx(found.loss, abs=1e-6)
    assert all(abs(found.losses[name][count] - found.loss) > 1e-4 for name, count in (("0.weight", 5), ("4.weight", 1)))


corners = st.lists(st.floats(0, 5), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers=st.lists(corners, min_size=1, max_size=3), total=st.integers(0, 12))
def test_no_other_counts_cost_less(layers: list[list[float]], total: int) -> None:
    """All counts, tried; losses on the lower hull of three units a step."""
    losses = {str(i): dict(enumerate([1.0, *(1.0 + one for one in layer)])) for i, layer in enumerate(layers)}
    losses = {name: {3 * count: loss for count, loss in found.items()} for name, found in losses.items()}
    units = {name: max(found) for name, found in losses.items()}
    made = fp.Sensitivity(1.0, units, losses, 1)
    total = min(total, sum(units.values()))
    shares = made.allocation(total / sum(units.values()))
    counts = {name: round(share * units[name]) for name, share in shares.items()}
    assert sum(counts.values()) == total
    every = itertools.product(*(range(count + 1) for count in units.values()))
    best = min(cost(losses, one) for one in every if sum(one) == total)
    assert cost(losses, tuple(counts.values())) == pytest.approx(best, abs=1e-9)


def cost(losses: dict[str, dict[int, float]], counts: tuple[int, ...]) -> float:
    return sum(below(found, count) for found, count in zip(losses.values(), counts, strict=True))


def below(found: dict[int, float], count: int) -> float:
    """The least of all straight lines between two measured losses, at a count."""
    lines = [
        one + (other - one) * (count - start) / (end - start) if end > start else one
        for (start, one), (end, other) in itertools.product(found.items(), repeat=2)
        if start <= count <= end
    ]
    return min(lines)


def test_of_a_pruned_model_it_goes_on() -> None:
    model = net()
    fp.global_prune(model, "magnitude", 0.5, granularity="weight", allocation="layer")
    found = fp.sensitivity(model, "magnitude", DATA, sparsities=[0.25, 0.75])
    assert [min(losses) for losses in found.losses.values()] == [20, 40, 8]
    report = fp.global_prune(model, "magnitude", allocation=found.allocation(0.6))
    assert report.pruned == round(0.6 * report.units)
    with pytest.raises(ValueError, match=r"sparsity=0.2 is 27 units, and the measured range is 68 to 102"):
        found.allocation(0.2)
    with pytest.raises(ValueError, match=r"sparsity=0.9 is 122 units, .*: pass higher sparsities= to fp\.sensitivity"):
        found.allocation(0.9)


def test_words_are_checked() -> None:
    with pytest.raises(TypeError, match="sensitivity does not take granularty=: did you mean granularity="):
        fp.sensitivity(net(), "magnitude", DATA, granularty="filter")
    with pytest.raises(ValueError, match="sparsities= is empty"):
        fp.sensitivity(net(), "magnitude", DATA, sparsities=[])
    with pytest.raises(ValueError, match="this iterator can be read only once"):
        fp.sensitivity(net(), "magnitude", iter([DATA]))


def test_it_is_told_in_words_and_plain_values() -> None:
    found = fp.sensitivity(net(), "magnitude", DATA, sparsities=[0.5])
    assert str(found).splitlines()[1].startswith("0.weight: 50% ")
    assert found.to_dict()["losses"]["0.weight"][0] == found.loss
