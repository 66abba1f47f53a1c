"""Channels that stay, masked, where a module's code does not take their smaller number, so that the others can go."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from torch_flowprune.channels.group_masks import living_channels
from torch_flowprune.channels.groups import MASKED, Coupling, Group
from torch_flowprune.channels.shrinking.attempts import Bench, attempt
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery, kept_positions, with_spans
from torch_flowprune.inputs import users_level

_MULTIPLE = 8
"""Of 16 bits each, what kernels that load 16 bytes at once need rows to be a multiple of."""

KeptUnits = Mapping[str, Tensor]


def _to_multiple(kept: Tensor) -> Tensor:
    """(units,) bool: the first of the dead ones too, as many as are missing to a multiple, or all."""
    missing = -int(kept.sum()) % _MULTIPLE
    more = kept.clone()
    more[(~kept).nonzero().flatten()[:missing]] = True
    return more


_FILLINGS = ((_to_multiple, True), (torch.ones_like, False), (torch.ones_like, True))
"""Which dead channels of a group stay, and whether of all groups that a module has a part of; else of those inside."""


def attempt_but_for(bench: Bench, coupling: Coupling, error: ShrinkError) -> tuple[nn.Module, Surgery]:
    """Where ``attempt`` ended in this error: the same with some of the dead channels, and a warning.

    As many as make the numbers in the modules that fail multiples of what kernels need; then all of the groups that
    lie inside these modules, which their own code makes and reads; then all that these read.

    Raises:
        ShrinkError: the same, where no module is to blame or nothing would go.
    """
    first: KeptUnits = living_channels(coupling, bench.masks)
    kept = first
    for fill, everywhere in _FILLINGS:
        more = _with_more(coupling, bench, kept, fill, everywhere)
        surgery = with_spans(Surgery(kept_positions(coupling, more, bench.dense), {}), bench.reading)
        if not surgery.keep or all(torch.equal(more[name], left) for name, left in kept.items()):
            continue
        tried = replace(bench, surgery=surgery, graphs={})
        try:
            found = attempt(tried, graphs=False)
        except ShrinkError:
            if fill is not _to_multiple:
                bench, kept = tried, more
            continue
        _warn_of(first, more, error)
        return found
    raise error


def _with_more(
    coupling: Coupling, bench: Bench, kept: KeptUnits, fill: Callable[[Tensor], Tensor], everywhere: bool
) -> KeptUnits:
    """The groups of the modules that fail are filled: those that lie inside one, or all that one has a part of."""
    surgery = replace(bench.surgery, attributes=bench.plans[0], code=bench.spans)
    every = [path for path, _ in bench.dense.named_modules() if path]
    paths = bench.blamed(surgery) or bench.blamed(surgery, watched=every)
    concerns = any if everywhere else all
    filled = [one for one in coupling.groups if concerns(_lies_in(name, paths) for name in _masked_of(one))]
    return {**kept, **{one.name: fill(kept[one.name]) for one in filled}}


def _masked_of(group: Group) -> list[str]:
    return [part.parameter for part in group.slices if part.role in MASKED]


def _lies_in(name: str, paths: Collection[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _warn_of(first: KeptUnits, kept: KeptUnits, error: ShrinkError) -> None:
    staying = {name: int((left & ~first[name]).sum()) for name, left in kept.items()}
    names = [name for name, count in staying.items() if count]
    warnings.warn(
        f"{sum(staying.values())} dead channels of {len(names)} groups ({', '.join(names[:3])}) stay, masked, as "
        f"{error}",
        UserWarning,
        stacklevel=users_level(),
    )
