"""Averages of a model, brought in step with its masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from torch_flowprune.inputs import Target, forget_caches, parameters_of, unwrapped
from torch_flowprune.masking.apply import set_mask
from torch_flowprune.masking.checks import check_can_mask
from torch_flowprune.masking.snapshots import all_or_nothing

_Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]

# Where averages hold their model: torch and timm; ultralytics; ema-pytorch.
_AVERAGED = ("module", "ema", "ema_model")


def sync_masks(model: nn.Module, *averages: Any) -> None:
    """Give averages of a model exactly the masks that the model has now.

    Masks are buffers of zeros and ones, and cannot be averaged: an average keeps the masks that it was made with, or
    those of the first round. Call this after each pruning step (:class:`~torch_flowprune.Pruner` does so with
    ``averages=``), and before the next update of the average. It also works for averages made before the first pruning,
    and after ``fp.remove``. The averaged values stay as they are.

    torch's ``AveragedModel(use_buffers=True)`` with equal weights subtracts and divides buffers, which fails for masks
    and counts. After this call it copies them instead.

    Args:
        model: the model that trains.
        averages: torch's ``AveragedModel``, timm's ``ModelEmaV2`` and ``ModelEmaV3``, ultralytics' ``ModelEMA``, or
            plain copies of the model. All of them are updated, or none.

    Raises:
        ValueError: if one is not an average of this model.

    See Also:
        :func:`~torch_flowprune.keep_zeros`: holds zeros in an optimizer.

    >>> import copy, torch, torch_flowprune as fp
    >>> layer = torch.nn.Linear(4, 2)
    >>> average = copy.deepcopy(layer)
    >>> report = fp.global_prune(layer, "magnitude", sparsity=0.5)
    >>> fp.sync_masks(layer, average)
    >>> torch.equal(average.weight == 0, layer.weight == 0)
    True
    """
    known = parameters_of(unwrapped(model))
    models = [averaged_model(model, average) for average in averages]
    found = [parameters_of(averaged) for averaged in models]
    with all_or_nothing(target for targets in found for target in targets.values()):
        for averaged, targets in zip(models, found, strict=True):
            _follow(known, targets)
            forget_caches(averaged)
    for average in averages:
        if isinstance(average, AveragedModel) and average.use_buffers and not (average.avg_fn or average.multi_avg_fn):
            average.multi_avg_fn = _equal_weights


def averaged_model(model: nn.Module, average: Any) -> nn.Module:
    """The copy of the model that an average holds: the one whose parameters have the model's names and shapes.

    Raises:
        ValueError: where there is none.
    """
    expected = _shapes(unwrapped(model))
    for candidate in _candidates(average):
        if _shapes(candidate) == expected:
            return candidate
    raise ValueError(
        f"expected averages of this model, and found none in {type(average).__name__}: pass a torch AveragedModel, a "
        "timm ModelEma, or a copy of the model, with the parameters that the model has"
    )


def _candidates(average: Any) -> Iterator[nn.Module]:
    held = chain([average], (getattr(average, name, None) for name in _AVERAGED))
    return (unwrapped(candidate) for candidate in held if isinstance(candidate, nn.Module))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: target.parameter.shape for name, target in parameters_of(model).items()}


def _follow(known: Mapping[str, Target], targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        mask = known[name].mask
        if mask is not None:
            mask = (mask != 0).to(check_can_mask(target, name, shards=True).parameter.device)
        set_mask(target, mask)


def _equal_weights(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
    """Torch's equal weights for floats; the latest of anything else, which torch's function cannot divide.

    It is called with tensors of one dtype at a time.
    """
    if averaged[0].is_floating_point() or averaged[0].is_complex():
        get_swa_multi_avg_fn()(averaged, current, count)
    else:
        for own, latest in zip(averaged, current, strict=True):
            own.copy_(latest)
