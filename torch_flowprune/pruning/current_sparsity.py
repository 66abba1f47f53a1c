"""A report of a model as it is, whoever pruned it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from typing_extensions import Never

from torch_flowprune.channels import Coupling
from torch_flowprune.gradients import FlowSource
from torch_flowprune.inputs import Pair, Pattern, Target, check_keywords, parameters_of, unwrapped
from torch_flowprune.pruning.reports import Report
from torch_flowprune.pruning.single_round import layers_of, sizes_of
from torch_flowprune.scoring import Granularity, PrunableUnits, label, lefts


def report(
    model: nn.Module,
    *,
    granularity: Granularity = "weight",
    parameters: Iterable[Pair] | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    example_inputs: Any = None,
    coupling: Coupling | None = None,
    **unknown: Never,
) -> Report:
    """How sparse a model is, layer by layer, also a loaded one or one that other code pruned. It is left as it was.

    A unit counts as pruned if its layer's mask removes all of it or, in a layer without a mask, if all of it is exactly
    zero. With a sharded model, make the same call on every rank.

    Args:
        model: any module, pruned by this package, by torch, or made of zeros.
        granularity: what is counted: ``"weight"``, ``"filter"``, ``"n:m"``, ``"channel"`` or ``"block"``.
        parameters, include, exclude: which parameters, see :func:`~torch_flowprune.inputs.prunable`; by default also
            all other matrices that have a mask (experts, embeddings).
        example_inputs, coupling: for channels and blocks, an example of what the model is called with, or the
            result of :func:`~torch_flowprune.couple`.
        unknown: no other keyword is accepted; the error names the one meant.

    Raises:
        ValueError, TypeError: for bad arguments, as in :func:`~torch_flowprune.global_prune`.

    See Also:
        :func:`~torch_flowprune.global_prune`: returns such a report.

    >>> import torch, torch_flowprune as fp
    >>> layer = torch.nn.Linear(4, 2)
    >>> pruned = fp.global_prune(layer, sparsity=0.25)
    >>> loaded = fp.load_state_dict(torch.nn.Linear(4, 2), fp.state_dict(layer))
    >>> fp.report(loaded).sparsity
    0.25
    """
    check_keywords(report, unknown)
    inner = unwrapped(model)
    if parameters is None and include is None and label(granularity) in ("weight", "filter"):
        parameters = _pruned_by_default_or_masked(inner)
    units = PrunableUnits(granularity, parameters, include, exclude, coupling=coupling)
    candidates = units.of(inner, FlowSource(example_inputs=example_inputs), shards=True)
    known = {name: _zeroed(target) for name, target in parameters_of(inner).items()}
    candidates = {name: candidate.renewed(known) for name, candidate in candidates.items()}
    left = lefts(candidates)
    layers = layers_of(candidates, left, left, dict.fromkeys(candidates, ""))
    dense, small = sizes_of(candidates)
    whole = sum(target.parameter.numel() for target in known.values())
    return Report("as it is", label(granularity), layers, dense=dense, left=small, model_weights=whole)


def _pruned_by_default_or_masked(model: nn.Module) -> list[Pair] | None:
    """Those that a prune takes by default, and matrices that one took because it was told to; None: no others."""
    known = parameters_of(model).values()
    others = {one.name for one in known if one.mask is not None and one.parameter.dim() > 1 and not one.is_default}
    return [one.owners[0] for one in known if one.is_default or one.name in others] if others else None


def _zeroed(target: Target) -> Target:
    return target if target.mask is not None else replace(target, mask=target.parameter.detach() != 0)
