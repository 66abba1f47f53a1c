"""Exactly the k lowest keys of pools of tensors, digit by digit, from counts: no key is moved, none is sorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torch_flowprune.checkpoints.key_counts import KeyCounts
from torch_flowprune.checkpoints.ordered_keys import Digit
from torch_flowprune.selection import Pool


@dataclass(frozen=True)
class KeyCut:
    """What goes from a tensor.

    Attributes:
        key: all keys below it go.
        equal: how many are equal to it.
        taken: how many of those go, the first ones.
        gone: how many go in all.
        floored: whether the tensor was cut to its floor, and so ranked with no other.
    """

    key: int
    equal: int
    taken: int
    gone: int
    floored: bool = False


NOTHING = KeyCut(torch.iinfo(torch.int64).min, 0, 0, 0)


@dataclass
class _Search:
    """Where the k-th lowest key of a pool lies, as far as its leading digits say."""

    names: tuple[str, ...]
    k: int
    prefix: int = 0
    below: int = 0
    digit: int = 0
    totals: Tensor | None = None
    seen: int = 0
    gone: dict[str, int] = field(default_factory=dict)

    def add(self, counts: Tensor, digit: Digit) -> None:
        """The counts of one tensor more; with the last one the digit is known."""
        self.totals = counts.clone() if self.totals is None else self.totals.add_(counts)
        self.seen += 1
        if self.seen == len(self.names):
            upto = self.totals.cumsum(0)
            self.digit = int(torch.searchsorted(upto, self.k - self.below))
            self.below += int(upto[self.digit - 1]) if self.digit else 0
            self.prefix = (self.prefix << digit.bits) + self.digit - digit.offset
            self.totals, self.seen = None, 0

    def cuts(self, equal: Mapping[str, int]) -> dict[str, KeyCut]:
        """Of the keys equal to the k-th the first ones go, tensor after tensor."""
        rest, cuts_by_name = self.k - self.below, {}
        for name in self.names:
            taken = min(rest, equal[name])
            cuts_by_name[name] = KeyCut(self.prefix, equal[name], taken, self.gone[name] + taken)
            rest -= taken
        return cuts_by_name


def _lowest_keys(counts: KeyCounts, pools: Sequence[Pool]) -> dict[str, KeyCut]:
    """Of each pool exactly as many go as it says, the lowest."""
    cuts_by_name = {name: NOTHING for pool in pools if not pool.gone for name in pool.names}
    searches = [_Search(pool.names, pool.gone, gone=dict.fromkeys(pool.names, 0)) for pool in pools if pool.gone]
    searched = {name: search for search in searches for name in search.names}
    equal: dict[str, int] = {}
    for level, digit in enumerate(counts.keys.digits if searches else ()):
        prefixes = {name: search.prefix for name, search in searched.items()} if level else None
        for name, each in counts.of(digit, prefixes):
            if name in searched:
                searched[name].add(each, digit)
        for name, each in counts.of(digit, prefixes):
            if (search := searched.get(name)) is not None:
                search.gone[name] += int(each[: search.digit].sum())
                equal[name] = int(each[search.digit])
    for search in searches:
        cuts_by_name |= search.cuts(equal)
    return cuts_by_name


def lowest_keys_with_floors(counts: KeyCounts, pools: Sequence[Pool], most: Mapping[str, int]) -> dict[str, KeyCut]:
    """The same, but from no tensor more than ``most``: one that would fall below is cut to it, the others make up."""
    pools, floored = list(pools), set[str]()
    while True:
        cuts = _lowest_keys(counts, pools)
        over = {name for name, cut in cuts.items() if cut.gone > most[name]}
        if not over:
            return {name: replace(cut, floored=name in floored) for name, cut in cuts.items()}
        floored |= over
        pools = [one for pool in pools for one in _set_apart(pool, over, most)]


def _set_apart(pool: Pool, over: set[str], most: Mapping[str, int]) -> list[Pool]:
    rest = tuple(name for name in pool.names if name not in over)
    alone = [Pool((name,), most[name]) for name in pool.names if name in over]
    return [Pool(rest, pool.gone - sum(one.gone for one in alone)), *alone] if rest else alone
