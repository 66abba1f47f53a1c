"""What a callback of a framework hands on to a pruner, checked before there is a model to prune."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch_flowprune.inputs import check_options, from_options
from torch_flowprune.pruning.training.pruner import Pruner, PrunerOptions
from torch_flowprune.pruning.training.rounds import Rounds
from torch_flowprune.scoring import SHRINKABLE, PrunableUnits, parse_granularity
from torch_flowprune.selection import Allocation

_GOALS = ("sparsity", "amount", "rounds", "schedule")


def check_callback_words(callback: type, words: Mapping[str, Any]) -> None:
    """What of a pruner's arguments can be wrong without a model.

    Args:
        callback: whose arguments they are.
        words: those for the pruner.

    Raises:
        TypeError: for a word that neither takes; the message names the nearest.
        ValueError: for values out of range, or that do not go together.
    """
    known = [
        name
        for kind in (callback, Pruner)
        for name, one in inspect.signature(kind).parameters.items()
        if _has_a_name(one)
    ]
    check_options(callback.__name__, words, [*dict.fromkeys(known), *PrunerOptions.__annotations__])
    if (granularity := words.get("granularity")) not in (None, *SHRINKABLE):
        parse_granularity(granularity)
    from_options(PrunableUnits, words)
    from_options(Allocation, words)
    Rounds(**{word: words[word] for word in _GOALS if word in words})


def _has_a_name(parameter: inspect.Parameter) -> bool:
    return parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "model"
