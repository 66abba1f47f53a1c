"""What a pruner is told, and the model that it meets, held against what it can go on with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from torch_flowprune.channels import is_left_behind
from torch_flowprune.scoring import PrunableUnits, changes
from torch_flowprune.selection import fraction


def weight_of_newest(alpha: float) -> float:
    """The share of the newest minibatch in an exponential average.

    Raises:
        ValueError: where it is none.
    """
    if fraction(alpha, "alpha") == 0:
        raise ValueError("alpha should be above 0: it is the weight of the newest minibatch, and nothing would be read")
    return float(alpha)


def check_kinds(theta0: object, generator: object) -> None:
    """An error where either is of another kind.

    Raises:
        TypeError: saying which, and what was found.
    """
    if not isinstance(theta0, Mapping | None):
        raise TypeError(f"theta0 should be tensors by parameter name, such as a state dict, got {theta0!r}")
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator should be a torch.Generator, got {generator!r}")


def check_is_known(model: nn.Module, units: PrunableUnits, layers: Mapping[str, tuple[int, ...]]) -> None:
    """An error where the model is not the one whose layers are known.

    Raises:
        ValueError: with what differs, and how a pruner is taken along.
    """
    if is_left_behind(model):
        raise ValueError(
            "this pruner's model was left behind: shrink made a smaller one, and its optimizer went on with that; "
            "pass pruner= to shrink too"
        )
    if differences := changes(units.layers(model), layers):
        raise ValueError(
            f"the model is not the one that this pruner knows: {'; '.join(differences[:5])}; shrink(..., pruner=) "
            "takes a pruner along, and for other layers make a new one"
        )
