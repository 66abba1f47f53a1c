"""Scores that are drawn anew wherever they are read, the same each time: none are stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_DRAWN_AT_ONCE = 1 << 18
"""Units between two states of the generator that are kept: a state takes as much memory as 1,250 scores."""


class DrawnScores:
    """One layer's scores by a measure that draws them, unit after unit; sliced as a tensor of them is.

    Made by drawing them once, which leaves the generator as it would be with all of them stored. The measure may read
    of θ where it is and how many units there are.
    """

    def __init__(
        self, measure: Callable[..., Tensor], units: int, device: torch.device, generator: torch.Generator
    ) -> None:
        self._measure, self._units = measure, units
        self._theta = torch.zeros((), device=device).expand(units, 1)
        # in one tensor: made one by one between draws, states would lie where the next draw has to go
        self._states = generator.get_state().new_empty(-(-units // _DRAWN_AT_ONCE), len(generator.get_state()))
        for start, state in zip(range(0, units, _DRAWN_AT_ONCE), self._states, strict=True):
            state.copy_(generator.get_state())
            self._from(start, generator)
        self._none = measure(theta=self._theta[:0], generator=generator)
        self.device, self.dtype, self.shape = self._none.device, self._none.dtype, torch.Size([units])

    def __len__(self) -> int:
        return self._units

    def __getitem__(self, where: slice) -> Tensor:
        start, stop, step = where.indices(self._units)
        scores = self._none.new_empty(len(range(start, stop, step)))
        generator, done = torch.Generator(), 0
        for begin in range(start - start % _DRAWN_AT_ONCE, stop, _DRAWN_AT_ONCE):
            first = max(start, begin + (start - begin) % step)
            if first < min(stop, begin + _DRAWN_AT_ONCE):
                generator.set_state(self._states[begin // _DRAWN_AT_ONCE].clone())
                drawn = self._from(begin, generator)[first - begin : stop - begin : step]
                scores[done : done + len(drawn)] = drawn
                done += len(drawn)
        return scores

    def _from(self, start: int, generator: torch.Generator) -> Tensor:
        """Up to where the next state is."""
        return self._measure(theta=self._theta[start : start + _DRAWN_AT_ONCE], generator=generator)
