"""A pruned model made dense again: zeros in its parameters in place of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from torch_flowprune.inputs import Pair, clear, copied_model, parameters_of
from torch_flowprune.masking.carrier import (
    check_removable,
    drop_hook,
    factors,
    list_again,
    permanent,
    pruned_names,
    release_shard,
    shard_hook,
    undress,
    write,
)
from torch_flowprune.masking.mask_memory import remember
from torch_flowprune.masking.pretrained_files import unguard_saving
from torch_flowprune.masking.snapshots import intact_on_error
from torch_flowprune.masking.states import masks_on


def remove(model: nn.Module) -> nn.Module:
    """Make every mask permanent: parameters get their names and order back, with zeros where they were pruned.

    This works for this package's and for torch's pruning. A model that is not pruned stays as it is. The zeros are then
    ordinary values that training changes. No code of the model runs, and everything is checked before anything is
    changed.

    Args:
        model: any module; changed in place.

    Returns:
        The model.

    Raises:
        ValueError: if zeros in a parameter would not have the effect of its mask; the model is as it was.

    See Also:
        :func:`~torch_flowprune.shrink`: removes pruned channels.
        :func:`~torch_flowprune.export_ready`: a copy without masks, checked equal.

    >>> import torch, torch_flowprune as fp
    >>> layer = torch.nn.Linear(2, 2)
    >>> fp.apply_masks(layer, {"weight": torch.tensor([[True, False], [True, True]])})
    >>> fp.remove(layer).weight[0, 1].item()
    0.0
    """
    modules = dict(model.named_modules())
    pruned = {path: (module, names) for path, module in modules.items() if (names := pruned_names(module))}
    for path, (module, _) in pruned.items():
        check_removable(module, path)
    tensors = [(module, name) for module, names in pruned.values() for name in names]
    shards = [pair for pair in tensors if shard_hook(*pair) is not None]
    tensors = [pair for pair in tensors if shard_hook(*pair) is None]
    for module, name in tensors:
        permanent(*factors(module, name))  # can it be? One after the other: together they are as large as the model
    with intact_on_error({id(module): module for module, _ in shards}.values()):
        _make_permanent(tensors)
        for module, name in shards:
            release_shard(module, name)
    unguard_saving(modules.values())
    return model


def _make_permanent(tensors: Sequence[Pair]) -> None:
    """Classes and names first, values last: until then, an error takes everything back."""
    values_and_masks = [factors(module, name) for module, name in tensors]
    with intact_on_error({id(module): module for module, _ in tensors}.values()):
        for module, name in tensors:
            undress(module, name)
            drop_hook(module, name)  # torch's own too: their remove would move the parameter to the end of the order
        for parameter, mask in values_and_masks:
            write(parameter, permanent(parameter, mask))
            remember(parameter, mask)
        for module, _ in tensors:
            list_again(module)


def dense_copy(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy whose masks, this package's and torch's, are made permanent, and what they were.

    Bool, by parameter name.
    """
    return remove(copied_model(model)), masks_on(parameters_of(model))


def write_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zeros in the parameters of a model without masks, where these masks, by parameter name, are false."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        clear(parameters[name], mask)
