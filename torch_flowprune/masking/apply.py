"""How masks live on a model: torch's names and hook, with the masked weight computed on access.

``torch.nn.utils.prune`` keeps ``weight = weight_orig * weight_mask`` as a cached tensor that only the owner's
``forward`` refreshes. Here the owner's class becomes a subclass in which ``weight`` is a property, so that whoever
reads it, whenever, gets the current product. ``weight_orig`` (the same ``Parameter`` object, at the same place in the
order), ``weight_mask`` (bool) and a hook that torch's functions recognise stay as torch's users know them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize, prune

from torch_flowprune.inputs import Target, computed, flags, parameters_of, unwrapped
from torch_flowprune.masking.packed_bits import unpack
from torch_flowprune.masking.parametrization import masked_kind, product, rename, with_masked, without_masked
from torch_flowprune.masking.weight_standardization import has_own_forward, zeros_survive
from torch_flowprune.torch_internals import list_flat_weights, set_tensor_name, tensor_name

Masks = Mapping[str, Tensor]


class MaskHook(prune.PruningContainer):
    """The forward pre-hook that tells torch's functions "this tensor is pruned". It computes nothing and holds no mask.

    It is torch's own container, so that ``prune.is_pruned`` and ``prune.remove`` find it and torch's methods pruned on
    top join it.
    """

    def __init__(self, name: str, methods: Iterable[prune.BasePruningMethod] = ()) -> None:
        super().__init__()
        set_tensor_name(self, name)
        for method in methods:
            self.add_pruning_method(method)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Nothing to refresh: the weight is computed on access."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The latest method's mask on top of ``default_mask``, as bool.

        Methods that hold masks of their own share this one.
        """
        proposed: Tensor = prune.PruningContainer.compute_mask(self, t, default_mask)
        mask = (proposed != 0) & (default_mask != 0)
        for method in self:
            if isinstance(method, prune.CustomFromMask):
                method.mask = mask
        return mask

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The weight as the forward uses it."""
        return product(module, tensor_name(self))

    def remove(self, module: nn.Module) -> None:
        """Make the mask permanent: the parameter gets its name, place and zeros back."""
        name = tensor_name(self)
        _check_removable(module)
        parameter = module._parameters[f"{name}_orig"]
        parameter.data = self.apply_mask(module).detach()  # type: ignore[union-attr]
        _restore(module, name)


def apply_masks(model: nn.Module, masks: Masks, *, copy: bool = True) -> None:
    """Put masks on a model, by parameter name: bool (True = kept), or packed as ``fp.masks(packed=True)`` gives them.

    A parameter already pruned keeps only what both masks keep. All or nothing: everything is checked first, and an
    error on the way takes back what was done. With ``copy=False`` the masks are given away: the model keeps them
    themselves where they fit.

    Raises:
        ValueError: for an unknown name, a mask of another shape or dtype, or a parameter that cannot carry a mask.

    >>> layer = nn.Linear(2, 2)
    >>> apply_masks(layer, {"weight": torch.tensor([[True, False], [True, True]])})
    >>> int((layer.weight == 0).sum())
    1
    """
    known = parameters_of(unwrapped(model))
    checked = {name: fitting(known.get(name), name, mask) for name, mask in masks.items()}
    with all_or_nothing(known[name] for name in checked):
        for name, mask in checked.items():
            old = known[name].mask
            set_mask(known[name], mask if old is None else mask & flags(old), copy=copy and old is None)


@contextmanager
def all_or_nothing(targets: Iterable[Target]) -> Iterator[None]:
    """An error inside leaves every owner of these parameters exactly as it was."""
    restore = _snapshots(targets)
    try:
        yield
    except BaseException:
        restore()
        raise


@contextmanager
def restored(targets: Iterable[Target]) -> Iterator[None]:
    """Masks put on inside are gone afterwards, in any case."""
    restore = _snapshots(targets)
    try:
        yield
    finally:
        restore()


def _snapshots(targets: Iterable[Target]) -> Callable[[], None]:
    restores = [_snapshot(module) for target in targets for module, _ in target.owners]

    def restore() -> None:
        for one in restores:
            one()

    return restore


def remove(model: nn.Module) -> nn.Module:
    """Make every mask permanent: parameters get their names and order back, with zeros where they were pruned.

    Works for this package's and for torch's pruning alike; a model that is not pruned stays as it is. The zeros are
    values from here on: training moves them.

    Returns:
        The model.

    >>> layer = nn.Linear(2, 2)
    >>> apply_masks(layer, {"weight": torch.tensor([[True, False], [True, True]])})
    >>> remove(layer).weight[0, 1].item()
    0.0
    """
    found = [(path, module, name) for path, module in model.named_modules() for name in _pruned_names(module)]
    for path, module, _ in found:
        _check_removable(module, path)
    with all_or_nothing(parameters_of(model).values()):
        for _, module, name in found:
            # torch's own hooks too: their remove would move the parameter to the end of the order
            MaskHook(name).remove(module)
            key, _ = hook_of(module, name)
            if key is not None:
                del module._forward_pre_hooks[key]
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
    return remove(dense), {
        name: target.mask != 0 for name, target in parameters_of(model).items() if target.mask is not None
    }


def _pruned_names(module: nn.Module) -> list[str]:
    """By the hooks, torch's among them, and by the class.

    Torch deletes a hook before it validates what is to take its place.
    """
    hooked = [
        tensor_name(hook) for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)
    ]
    return list(dict.fromkeys([*hooked, *masked_kind(type(module))[1]]))


def _check_removable(module: nn.Module, path: str = "") -> None:
    dense, names = masked_kind(type(module))
    mask = module._buffers.get("weight_mask")
    where = f"{path or 'this module'} ({dense.__name__})"
    if any(hasattr(parameter, "device_mesh") for parameter in module._parameters.values()):
        raise ValueError(
            f"{where} is sharded: fp.load_state_dict its full state dict into a model that is not, and remove the "
            "masks there"
        )
    if (
        "weight" in names
        and mask is not None
        and has_own_forward(dense)
        and not zeros_survive(module, dense.forward, mask)
    ):
        raise ValueError(
            f"{where} standardises its weight before use: zeros in it would not be zeros in the kernel, so the mask "
            "cannot be made permanent. "
            "Keep the mask (it holds in the kernel), or prune whole filters (granularity='filter'), whose zeros do "
            "survive"
        )


def check_can_mask(target: Target | None, name: str) -> Target:
    """The target itself, or a ``ValueError`` that says why it cannot carry a mask, and what to do."""
    if target is None:
        raise ValueError(f"this model has no parameter {name!r}")
    if isinstance(target.parameter, UninitializedParameter):
        raise ValueError(f"{name!r} has no shape yet (a lazy module): run one batch through the model first")
    if target.parameter.is_meta:
        raise ValueError(f"{name!r} is on the meta device and has no values: load or initialise the model first")
    if hasattr(target.parameter, "device_mesh"):
        raise ValueError(f"{name!r} is a sharded DTensor: prune first, then wrap the model with fully_shard")
    for module, attribute in target.owners:
        _check_owner(module, attribute, name)
    return target


def _check_owner(module: nn.Module, attribute: str, name: str) -> None:
    if isinstance(module, parametrize.ParametrizationList):
        raise ValueError(
            f"{name!r} is the original of a parametrization: a mask on it would not be one on the weight; "
            "parametrize.remove_parametrizations first"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{name!r} belongs to a scripted module, whose code is fixed: prune the model before scripting it"
        )
    if reason := computed(module, attribute):
        raise ValueError(f"{name!r} is {reason}")
    mask = module._buffers.get(f"{attribute}_mask")
    if (
        mask is not None
        and f"{attribute}_orig" in module._parameters
        and mask.dtype is not torch.bool
        and not ((mask == 0) | (mask == 1)).all()
    ):
        raise ValueError(
            f"the mask torch has put on {name!r} holds other values than 0 and 1, so it scales weights: prune.remove "
            "it first"
        )
    if mask is not None and f"{attribute}_orig" not in module._parameters:
        raise ValueError(
            f"{type(module).__name__} already has a buffer {attribute + '_mask'!r} of its own, the name a mask "
            "needs: rename it"
        )


def fitting(target: Target | None, name: str, mask: Tensor) -> Tensor:
    """The mask as bool, of the parameter's shape, on its device.

    An error says why it cannot be put on the parameter.
    """
    target = check_can_mask(target, name)
    if mask.dtype is torch.uint8 and mask.shape != target.parameter.shape:
        mask = unpack(mask, target.parameter.shape)
    if mask.dtype is not torch.bool:
        raise ValueError(f"the mask of {target.name!r} should be bool (True = kept), got {mask.dtype}: use mask != 0")
    if mask.shape != target.parameter.shape:
        raise ValueError(
            f"the mask of {target.name!r} should have shape {tuple(target.parameter.shape)}, got {tuple(mask.shape)}"
        )
    return mask.detach().to(target.parameter.device)


def set_mask(target: Target, mask: Tensor | None, copy: bool = True) -> None:
    """Exactly this mask (none: no mask, the parameter as it is) for every owner of the parameter.

    Tied owners share one tensor.
    """
    own = mask
    if mask is not None and (copy or not _laid_alike(mask, target.parameter)):
        own = torch.empty_like(target.parameter.detach(), dtype=torch.bool).copy_(mask)
    for module, attribute in target.owners:
        if own is not None:
            put_on(module, attribute, own)
        elif target.mask is not None:
            take_off(module, attribute)


def _laid_alike(mask: Tensor, parameter: nn.Parameter) -> bool:
    """Whether the mask can live beside the parameter as it is.

    In the same order, with no other tensor in its memory.
    """
    return mask.stride() == parameter.stride() and mask.untyped_storage().nbytes() == mask.nbytes


def put_on(module: nn.Module, name: str, mask: Tensor) -> MaskHook:
    """Give one module's parameter this mask, on top of whatever pruning it has; returns its hook."""
    old_key, old = hook_of(module, name)
    hook = old if isinstance(old, MaskHook) else MaskHook(name, _history(old))
    if f"{name}_orig" not in module._parameters:
        rename(module._parameters, name, f"{name}_orig")
    module.__dict__.pop(name, None)
    module._buffers[f"{name}_mask"] = mask
    module.__class__ = with_masked(type(module), name)
    if old_key is None:
        module.register_forward_pre_hook(hook)
    else:
        module._forward_pre_hooks[old_key] = hook
    return hook


def hook_of(module: nn.Module, name: str) -> tuple[int | None, prune.BasePruningMethod | None]:
    """The pruning hook of a module's tensor, with its key."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, prune.BasePruningMethod) and tensor_name(hook) == name:
            return key, hook
    return None, None


def _history(hook: prune.BasePruningMethod | None) -> Iterable[prune.BasePruningMethod]:
    if hook is None:
        return ()
    return hook if isinstance(hook, prune.PruningContainer) else (hook,)


def take_off(module: nn.Module, name: str) -> None:
    """Undo :func:`put_on`: class, names and hooks as before, the parameter's values as they are."""
    key, _ = hook_of(module, name)
    if key is not None:
        del module._forward_pre_hooks[key]
    _restore(module, name)


def _restore(module: nn.Module, name: str) -> None:
    module.__dict__.pop(name, None)
    module.__class__ = without_masked(type(module), name)
    rename(module._parameters, f"{name}_orig", name)
    del module._buffers[f"{name}_mask"]
    if isinstance(module, nn.RNNBase):
        list_flat_weights(module)


def _snapshot(module: nn.Module) -> Callable[[], None]:
    """A function that puts back the module's class, parameters, buffers, hooks and attributes as they are now."""
    kind, attributes = type(module), dict(module.__dict__)
    registries = {key: list(attributes[key].items()) for key in ("_parameters", "_buffers", "_forward_pre_hooks")}
    histories = [
        (hook, dict(vars(hook)))
        for _, hook in registries["_forward_pre_hooks"]
        if isinstance(hook, prune.PruningContainer)
    ]

    def restore() -> None:
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for key, items in registries.items():
            attributes[key].clear()
            attributes[key].update(items)
        for hook, state in histories:
            vars(hook).update(state)

    return restore
