"""The names that torch's pruning gives the parts of a tensor ``weight``: ``weight_orig`` and ``weight_mask``.

Here a *key* is what a registry of a module or a state dict has, in a state dict with the module's path before it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch_flowprune.inputs.shards import is_sharded
from torch_flowprune.torch_internals import NAMES_OF_WRAPPED

_ORIGINAL, _MASK = "_orig", "_mask"


def original(name: str) -> str:
    """The key of a pruned tensor's parameter, which holds the values under the mask too.

    >>> original("fc.weight")
    'fc.weight_orig'
    """
    return name + _ORIGINAL


def mask_of(name: str) -> str:
    """The key of a pruned tensor's mask.

    >>> mask_of("fc.weight")
    'fc.weight_mask'
    """
    return name + _MASK


def plain_name(key: str, masks: Container[str]) -> str:
    """A parameter's name in the unpruned model; ``masks`` are the keys of which one may be its mask's.

    >>> plain_name("weight_orig", {"weight_mask"}), plain_name("my_orig", {"weight_mask"})
    ('weight', 'my_orig')
    """
    name = key.removesuffix(_ORIGINAL)
    return name if mask_of(name) in masks else key


def is_mask(key: str, parameters: Container[str]) -> bool:
    """Whether a key is a mask's; ``parameters`` are the keys of which one is then its parameter's.

    The parameter under the mask of a shard keeps its name: in a state dict that mask is told by its value.

    >>> is_mask("weight_mask", {"weight_orig"}), is_mask("causal_mask", {"weight_orig"})
    (True, False)
    """
    if not key.endswith(_MASK) or original(masked_name(key)) in parameters:
        return key.endswith(_MASK)
    return isinstance(parameters, Mapping) and masked_name(key) in parameters and is_sharded(parameters.get(key))


def masked_name(key: str) -> str:
    """The name of the tensor that the mask of this key is on.

    >>> masked_name("fc.weight_mask")
    'fc.weight'
    """
    return key.removesuffix(_MASK)


def without_wrappers(key: str) -> str:
    """A key without the names under which torch's wrappers hold what they wrap, wherever they stand in it.

    >>> without_wrappers("blocks.0._orig_mod.fc.weight")
    'blocks.0.fc.weight'
    """
    return ".".join(part for part in key.split(".") if part not in NAMES_OF_WRAPPED)
