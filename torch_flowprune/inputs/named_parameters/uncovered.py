"""Matrices of a model that the default does not know: parameters that modules of other kinds multiply by themselves."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from torch_flowprune.inputs.callers import users_level
from torch_flowprune.inputs.named_parameters.target import Target, default_weights

_SHARE = 0.1
_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)


def warn_uncovered(targets: Sequence[Target]) -> None:
    """Name the matrices that stay dense, where they are a tenth of the model's weights or more."""
    left = [target for target in targets if target.mask is None and _is_matrix(target)]
    count, total = (
        sum(target.parameter.numel() for target in some if not is_lazy(target.parameter)) for some in (left, targets)
    )
    if not left or count < _SHARE * total:
        return
    patterns = _patterns(targets, left)
    named = ", ".join(patterns[:5]) + (f" and {len(patterns) - 5} more" if len(patterns) > 5 else "")
    warnings.warn(
        f"{count / total:.0%} of the weights are in matrices of modules of an unknown kind and stay dense: "
        f"{named}; to prune them too pass include={['*', *patterns]}",
        UserWarning,
        stacklevel=users_level(),
    )


def _is_matrix(target: Target) -> bool:
    """Whether a parameter is multiplied by, as far as can be seen, and by a module that is no layer of a known kind.

    Tables that are looked up are not, nor are those with one entry on their first axis, which are added as a rule.
    """
    parameter = target.parameter
    if (
        target.in_adapter
        or _is_in_parametrization(target)
        or is_lazy(parameter)
        or not parameter.is_floating_point()
        or parameter.dim() < 2
    ):
        return False
    known = any(isinstance(module, _LOOKED_UP) or default_weights(module) for module, _ in target.owners)
    return not known and min(parameter.shape[0], parameter.shape[-1]) > 1


def _is_in_parametrization(target: Target) -> bool:
    """Whether a weight is computed from it, which has a warning of its own."""
    return "parametrizations" in target.name.split(".")


def _patterns(targets: Sequence[Target], left: Sequence[Target]) -> list[str]:
    """Globs of these parameters and of no other; numbers of blocks are left open where that is so."""
    names = {target.name for target in left}
    found: dict[str, None] = {}
    for name in (target.name for target in left):
        glob = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
        alone = all(target.name in names for target in targets if fnmatchcase(target.name, glob))
        found[glob if alone else name] = None
    return list(found)
