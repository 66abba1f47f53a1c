"""Channels that stay, masked, where a module's code does not take their smaller number, so that the others can go."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from torch_flowprune.channels.group_masks import living_channels
from torch_flowprune.channels.groups import Coupling
from torch_flowprune.channels.shrinking.attempts.bench import Bench
from torch_flowprune.channels.shrinking.attempts.in_turn import attempt
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery, surgery_keeping, with_spans
from torch_flowprune.channels.slices import MASKED, Group
from torch_flowprune.inputs import users_level

_MULTIPLE = 8
"""Of 16 bits each, what kernels that load 16 bytes at once need rows to be a multiple of, where no rule says more."""

KeptUnits = Mapping[str, Tensor]

_FILLINGS = ((_MULTIPLE, True), (None, False), (None, True))
"""How many dead channels of a group stay: up to a multiple, or all; and of which: all that a module has a part of, or
those inside it."""


def attempt_but_for(bench: Bench, coupling: Coupling, error: ShrinkError) -> tuple[nn.Module, Surgery]:
    """Where ``attempt`` ended in this error: the same with some of the dead channels, and a warning.

    As many as make the numbers in the modules that fail multiples of what kernels need; then all of the groups that
    lie inside these modules, which their own code makes and reads; then all that these read.

    Raises:
        ShrinkError: the same, where no module is to blame or nothing would go.
    """
    first: KeptUnits = living_channels(coupling, bench.masks)
    kept = first
    for multiple, everywhere in _FILLINGS:
        more = _with_more(coupling, bench, kept, multiple, everywhere)
        surgery = with_spans(surgery_keeping(coupling, more, bench.dense), bench.reading)
        if not surgery.keep or all(torch.equal(more[name], left) for name, left in kept.items()):
            continue
        tried = replace(bench, surgery=surgery, graphs={})
        try:
            found = attempt(tried, graphs=False)
        except ShrinkError:
            if multiple is None:
                bench, kept = tried, more
            continue
        _warn_of(first, more, error)
        return found
    raise error


def _with_more(coupling: Coupling, bench: Bench, kept: KeptUnits, multiple: int | None, everywhere: bool) -> KeptUnits:
    """The groups of the modules that fail are filled: those that lie inside one, or all that one has a part of."""
    surgery = replace(bench.surgery, attributes=bench.plans[0], code=bench.spans)
    every = [path for path, _ in bench.dense.named_modules() if path]
    paths = bench.blamed(surgery) or bench.blamed(surgery, watched=every)
    concerns = any if everywhere else all
    filled = [one for one in coupling.groups if concerns(_lies_in(name, paths) for name in _masked_of(one))]
    return {**kept, **{one.name: _filled_up(kept[one.name], one, multiple) for one in filled}}


def _filled_up(kept: Tensor, group: Group, multiple: int | None) -> Tensor:
    """(units,) bool: the first of the dead ones too, as many as are missing to a multiple, or all."""
    missing = len(kept) if multiple is None else -int(kept.sum()) % math.lcm(group.multiple, multiple)
    more = kept.clone()
    more[(~kept).nonzero().flatten()[:missing]] = True
    return more


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
