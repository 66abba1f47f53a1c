"""What a selection needs besides the scores: one sweep nearly always, and little room in any case."""

import pytest
import torch

from torch_flowprune.selection.ranking import lowest_k

UNITS = 1 << 18


@pytest.fixture
def sweeps(monkeypatch):
    """What each sweep made room for, in entries, and whether that was enough."""
    seen, plain = [], lowest_k.sweep

    def noted(laid, sample, low, high, room):
        swept = plain(laid, sample, low, high, room)
        parts = lowest_k.parts_of(laid)
        seen.append((sum(sample.rooms(parts, low, high, room)), swept.complete))
        return swept

    monkeypatch.setattr(lowest_k, "sweep", noted)
    return seen


def exact(scores, k):
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.argsort(stable=True)[:k]] = False
    return keep


def test_one_sweep_nearly_always_and_room_for_a_fraction_of_the_units(sweeps):
    """At the ends of the order few of the sample fall between, and a part that met few of them overflowed."""
    units, count = 1 << 22, 0
    for seed in range(20):
        scores = torch.rand(units, generator=torch.Generator().manual_seed(seed))
        for share in (0.05, 0.1, 0.9, 0.95):
            count += 1
            kept = lowest_k.lowest([scores], int(share * units)).kept
            assert kept == [units - int(share * units)]
    assert len(sweeps) == count
    assert max(room for room, _ in sweeps) < units / 20


def test_an_overflow_is_met_with_more_room_not_with_a_wider_bracket(sweeps):
    """A layout that misleads the sample: what lies between is where no sampled score is."""
    scores = torch.linspace(0, 1, UNITS)
    sample = lowest_k.Sample.of(lowest_k.stacks([scores], [None]))
    moved = torch.arange(UNITS) % sample.step != 0
    crowded = torch.where(moved, 0.5 + (scores - 0.5) / 50, scores)
    k = UNITS // 2
    assert torch.equal(lowest_k.lowest([crowded], k).keep[0], exact(crowded, k))
    assert not sweeps[0][1]
    assert sweeps[1][0] <= 2 * sweeps[0][0]
