"""How a mask lives on one module: torch's names and hook, with the masked weight computed on access.

``torch.nn.utils.prune`` keeps ``weight = weight_orig * weight_mask`` as a cached tensor that only the owner's
``forward`` refreshes. Here the owner's class becomes a subclass in which ``weight`` is a property, so that whoever
reads it, whenever, gets the current product. ``weight_orig`` (the same ``Parameter`` object, at the same place in the
order), ``weight_mask`` (bool) and a hook that torch's functions recognise stay as torch's users know them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_flowprune.inputs import is_sharded, lasting, mask_of, masked, original
from torch_flowprune.masking.carrier.constructor_order import place_as_constructed
from torch_flowprune.masking.carrier.parametrization import masked_kind, rename, with_masked, without_masked
from torch_flowprune.masking.carrier.weight_standardization import only_whole_filters, standardises
from torch_flowprune.masking.mask_memory import note_new_mask, remember
from torch_flowprune.torch_internals import list_flat_weights, set_tensor_name, tensor_name


class MaskHook(prune.PruningContainer):
    """The forward pre-hook that tells torch's functions "this tensor is pruned". It computes nothing and holds no mask.

    It is torch's own container, so that ``prune.is_pruned`` and ``prune.remove`` find it and torch's methods pruned on
    top join it.
    """

    moved = False  # whether torch's functions pruned the tensor first, and moved it to the end of the order
    _module: weakref.ref[nn.Module] | None = None

    def __init__(self, name: str, old: prune.BasePruningMethod | None = None) -> None:
        super().__init__()
        set_tensor_name(self, name)
        self.moved = old is not None
        for method in _history(old):
            self.add_pruning_method(method)

    def hold(self, module: nn.Module, mask: Tensor) -> None:
        """This is the module, and its mask: methods that hold masks of their own share that one."""
        self._module = weakref.ref(module)
        for method in self:
            if isinstance(method, prune.CustomFromMask):
                method.mask = mask

    def __getstate__(self) -> dict[str, Any]:
        """Copies are of other modules."""
        return {key: value for key, value in vars(self).items() if key != "_module"}

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Nothing to refresh: the weight is computed on access."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The latest method's mask on top of ``default_mask``, as bool.

        Methods that hold masks of their own share this one. Of numbers of eight bits torch has no order and no norm.
        """
        if t.dtype.itemsize == 1 and t.is_floating_point():
            t, default_mask = t.float(), default_mask.float()
        try:
            proposed: Tensor = prune.PruningContainer.compute_mask(self, t, default_mask)
        except Exception:
            self._put_back()
            raise
        mask = lasting((proposed != 0) & (default_mask != 0))
        for method in self:
            if isinstance(method, prune.CustomFromMask):
                method.mask = mask
        return mask

    def _put_back(self) -> None:
        """Torch takes the hook off its module before it asks the new method, which has just refused."""
        module = None if self._module is None else self._module()
        if module is not None and self not in module._forward_pre_hooks.values():
            self._pruning_methods = self._pruning_methods[:-1]
            module.register_forward_pre_hook(self)

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The weight as the forward uses it, known as the module's own: torch assigns it."""
        weight: Tensor = getattr(module, tensor_name(self))
        return weight

    def remove(self, module: nn.Module) -> None:
        """Make the mask permanent: the parameter gets its name, place and zeros back."""
        check_removable(module)
        name = tensor_name(self)
        parameter, mask = factors(module, name)
        value = permanent(parameter, mask)
        undress(module, name)
        write(parameter, value)
        remember(parameter, mask)
        list_again(module)


def put_on(module: nn.Module, name: str, mask: Tensor) -> MaskHook:
    """Give one module's parameter this mask, on top of whatever pruning it has; returns its hook."""
    old_key, old = _hook_of(module, name)
    hook = old if isinstance(old, MaskHook) else MaskHook(name, old)
    if original(name) not in module._parameters:
        rename(module._parameters, name, original(name))
    module.__dict__.pop(name, None)
    module._buffers[mask_of(name)] = mask
    module.__class__ = with_masked(type(module), name)
    hook.hold(module, mask)
    note_new_mask()
    if old_key is None:
        module.register_forward_pre_hook(hook)
    else:
        module._forward_pre_hooks[old_key] = hook
    return hook


def take_off(module: nn.Module, name: str) -> None:
    """Undo :func:`put_on`: class, names and hooks as before, the parameter's values as they are."""
    remember(module._parameters[original(name)], None)  # type: ignore[arg-type]  # a masked parameter is never None
    undress(module, name)
    drop_hook(module, name)
    list_again(module)


def factors(module: nn.Module, name: str) -> tuple[nn.Parameter, Tensor]:
    """The parameter under a mask, and the mask."""
    parameter, mask = module._parameters.get(original(name)), module._buffers.get(mask_of(name))
    if parameter is None or mask is None:
        raise ValueError(
            f"{name!r} of {type(module).__name__} is pruned, and its {original(name)} or {mask_of(name)} is missing: "
            "restore both, or load a state dict into a new model"
        )
    return parameter, mask


def permanent(parameter: nn.Parameter, mask: Tensor) -> Tensor:
    """The values of a parameter with its mask made permanent. A mask of torch's own may scale, too."""
    value = parameter.detach()
    return masked(value if mask.dtype is torch.bool else value * mask.to(value.dtype), mask)


def write(parameter: nn.Parameter, value: Tensor) -> None:
    """New values for a parameter: in place where other processes share its memory, else beside the old ones.

    Whoever holds those (a state dict to rewind to) keeps them.
    """
    if parameter.device.type == "cpu" and parameter.is_shared():
        parameter.detach().copy_(value)
    else:
        parameter.data = lasting(value)


def drop_hook(module: nn.Module, name: str) -> None:
    """The pruning hook of a tensor, ours or torch's, off its module."""
    key, _ = _hook_of(module, name)
    if key is not None:
        del module._forward_pre_hooks[key]


def undress(module: nn.Module, name: str) -> None:
    """Class and names as before the mask. The hook stays: it may be what torch calls to have this done."""
    module.__dict__.pop(name, None)
    module.__class__ = without_masked(type(module), name)
    rename(module._parameters, original(name), name)
    del module._buffers[mask_of(name)]
    _, hook = _hook_of(module, name)
    if hook is not None and getattr(hook, "moved", True):
        place_as_constructed(module, name)


def list_again(module: nn.Module) -> None:
    """A recurrent layer computes with a list of its weights, made of what they are now."""
    if isinstance(module, nn.RNNBase):
        list_flat_weights(module)


def pruning_hooks(module: nn.Module) -> dict[int, prune.BasePruningMethod]:
    """A module's pruning hooks, ours and torch's, under the keys of its registry."""
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, prune.BasePruningMethod)}


def _hook_of(module: nn.Module, name: str) -> tuple[int | None, prune.BasePruningMethod | None]:
    hooks = pruning_hooks(module).items()
    return next(((key, hook) for key, hook in hooks if tensor_name(hook) == name), (None, None))


def _history(hook: prune.BasePruningMethod | None) -> Iterable[prune.BasePruningMethod]:
    if hook is None:
        return ()
    return hook if isinstance(hook, prune.PruningContainer) else (hook,)


def pruned_names(module: nn.Module) -> list[str]:
    """The names of a module's pruned tensors: by the hooks, torch's among them, and by the class.

    Torch deletes a hook before it validates what is to take its place.
    """
    hooked = [tensor_name(hook) for hook in pruning_hooks(module).values()]
    return list(dict.fromkeys([*hooked, *masked_kind(type(module))[1]]))


def check_removable(module: nn.Module, path: str = "") -> None:
    """An error where a module's masks cannot be made permanent: zeros in its parameters would not do what they do."""
    dense, names = masked_kind(type(module))
    mask = module._buffers.get(mask_of("weight"))
    where = f"{path or 'this module'} ({dense.__name__})"
    if any(is_sharded(module._parameters.get(original(name))) for name in names):
        raise ValueError(
            f"{where} was pruned before it was sharded: fp.load_state_dict its full state dict into a model that is "
            "not sharded, and remove the masks there"
        )
    if "weight" in names and mask is not None and standardises(dense) and not only_whole_filters(mask):
        raise ValueError(
            f"{where} standardises its weight before use: zeros in it would not be zeros in the kernel, so the mask "
            "cannot be made permanent. "
            "Keep the mask (it holds in the kernel), or prune whole filters (granularity='filter'), whose zeros do "
            "survive"
        )
