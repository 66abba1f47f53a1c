"""What a pruner is told, and the model that it meets, held against what it can go on with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels import is_left_behind
from torch_flowprune.inputs import check_keywords, unwrapped
from torch_flowprune.scoring import Candidates, Granularity, PrunableUnits, changes, given
from torch_flowprune.selection import fraction

_WHERE = {"data": "step(data) and track(batch) take", "loader": "step(loader) and track(batch) take"}


def check_pruner_words(kind: type, given: Collection[str], options: type) -> None:
    """An error for a word that a pruner does not take, with the call that takes what it stands for.

    Raises:
        TypeError: naming it.
    """
    for word in given:
        if found := next((calls for part, calls in _WHERE.items() if part in word.lower()), None):
            raise TypeError(f"{kind.__name__} does not take {word}=, which {found}: leave it out here")
    check_keywords(kind, given, options)


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers as they are now, to go back to."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def check_can_follow(own: nn.Module, model: nn.Module, scores: object) -> None:
    """An error where a pruner cannot go on with what becomes of a model.

    Raises:
        ValueError: for another model, and for scores of its units, which are others then.
    """
    if unwrapped(own) is not model:
        raise ValueError("pruner= is of another model than the one to shrink: pass the pruner of this one")
    if scores is not None:
        raise ValueError(
            "pruner= prunes by scores= of the units that the model has now, and a smaller one has others: shrink after "
            "the last round, or make a new pruner"
        )


def check_scores(scores: Mapping[Any, Tensor] | None, found: Candidates, granularity: Granularity) -> None:
    """An error where scores are given that are not of these units."""
    if scores is not None:
        given(scores, found, granularity)


def weight_of_newest(alpha: float) -> float:
    """The share of the newest minibatch in an exponential average.

    Raises:
        ValueError: where it is none.
    """
    if fraction(alpha, "alpha") == 0:
        raise ValueError("alpha should be above 0: it is the weight of the newest minibatch, and nothing would be read")
    return float(alpha)


def check_kind(generator: object) -> None:
    """An error for what is no generator.

    Raises:
        TypeError: with what was found.
    """
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator should be a torch.Generator, got {generator!r}")


def check_is_known(model: nn.Module, units: PrunableUnits, layers: Mapping[str, tuple[int, ...]]) -> None:
    """An error where the model is not the one whose layers are known.

    Raises:
        ValueError: with what differs, and how a pruner is taken along.
    """
    if is_left_behind(model):
        raise ValueError(
            "this pruner's model was left behind: shrink made a smaller one, and its optimizer now trains that; "
            "pass pruner= to shrink too"
        )
    if differences := changes(units.layers(model), layers):
        raise ValueError(
            f"the model is not the one that this pruner knows: {'; '.join(differences[:5])}; shrink(..., pruner=) "
            "takes a pruner along, and for other layers make a new one"
        )
