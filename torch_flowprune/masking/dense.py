"""A pruned model made dense again: zeros in its parameters in place of masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from torch_flowprune.inputs import clear, parameters_of
from torch_flowprune.masking.checkpoint import masks_on
from torch_flowprune.masking.hook import check_removable, drop_hook, make_permanent, pruned_names
from torch_flowprune.masking.snapshots import intact_on_error


def remove(model: nn.Module) -> nn.Module:
    """Make every mask permanent: parameters get their names and order back, with zeros where they were pruned.

    Works for this package's and for torch's pruning alike; a model that is not pruned stays as it is. The zeros are
    values from here on: training moves them.

    Returns:
        The model.

    >>> import torch, torch_flowprune as fp
    >>> layer = nn.Linear(2, 2)
    >>> fp.apply_masks(layer, {"weight": torch.tensor([[True, False], [True, True]])})
    >>> remove(layer).weight[0, 1].item()
    0.0
    """
    pruned = {path: (module, names) for path, module in model.named_modules() if (names := pruned_names(module))}
    for path, (module, _) in pruned.items():
        check_removable(module, path)
    with intact_on_error(module for module, _ in pruned.values()):
        for module, names in pruned.values():
            for name in names:
                # torch's own hooks too: their remove would move the parameter to the end of the order
                make_permanent(module, name)
                drop_hook(module, name)
    return model


def dense_copy(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy whose masks, this package's and torch's, are made permanent, and what they were.

    Bool, by parameter name.
    """
    cached = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    dense = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in cached})
    return remove(dense), masks_on(parameters_of(model))


def write_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zeros in the parameters of a model without masks, where these masks, by parameter name, are false."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        clear(parameters[name], mask)
