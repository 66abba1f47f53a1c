"""Batch norms that have seen no batch yet: in eval mode they divide by the statistics that they were made with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from torch_flowprune.inputs import users_level


def warn_untrained(model: nn.Module, mode: str) -> None:
    """A warning where the scores are not those of the network that training will see."""
    names = list(_untrained(model)) if mode == "eval" else []
    if names:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"the batch norms of this model have seen no batch yet ({listed}): in eval mode they do nothing, so scores "
            "are not of the network that will be trained. At initialisation pass mode='train' (GraSP keeps better "
            "weights with it), or compute their statistics first: fp.recalibrate(model, data)",
            UserWarning,
            stacklevel=users_level(),
        )


def _untrained(model: nn.Module) -> Iterator[str]:
    """Those whose count and statistics are as they were made: counts alone are 0 in states that were written without.

    One on the meta device, or that is made without a count, says nothing.
    """
    for name, module in model.named_modules():
        count, mean, variance = (
            getattr(module, key, None) for key in ("num_batches_tracked", "running_mean", "running_var")
        )
        if isinstance(count, Tensor) and isinstance(mean, Tensor) and isinstance(variance, Tensor):
            made = torch.stack([count == 0, (mean == 0).all(), (variance == 1).all()]).all()
            if not made.is_meta and bool(made):
                yield name or type(module).__name__
