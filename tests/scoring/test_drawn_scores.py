"""Scores drawn where they are read are those of one draw, in any slices, and leave the generator where that does."""

from __future__ import annotations

import pytest
import torch

from torch_flowprune.scoring.measures import random
from torch_flowprune.scoring.stacked import drawn_scores
from torch_flowprune.scoring.stacked.drawn_scores import DrawnScores


@pytest.mark.parametrize("units", [0, 1, 7, 64, 100])
def test_slices_are_those_of_one_draw(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_scores, "_DRAWN_AT_ONCE", 16)
    whole_source, source = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    whole = random(torch.zeros(units, 1), whole_source)
    drawn = DrawnScores(random, units, torch.device("cpu"), source)
    assert torch.equal(source.get_state(), whole_source.get_state())
    assert (len(drawn), drawn.dtype, drawn.shape) == (units, whole.dtype, whole.shape)
    for start in (0, 3, 16, 31, 99):
        for stop in (0, 5, 16, 48, 77, 200):
            for step in (1, 3, 16, 17, 40):
                assert torch.equal(drawn[start:stop:step], whole[start:stop:step]), (start, stop, step)
    assert torch.equal(drawn[:], whole)
