"""How masks live on a model: torch's names and hook, with the masked weight computed on access.

``torch.nn.utils.prune`` keeps ``weight = weight_orig * weight_mask`` as a cached tensor that only the owner's ``forward`` refreshes.
Here the owner's class becomes a subclass in which ``weight`` is a property, so that whoever reads it, whenever, gets the current
product. ``weight_orig`` (the same ``Parameter`` object, at the same place in the order), ``weight_mask`` (bool) and a hook that torch's
functions recognise stay as torch's users know them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize, prune

from torch_flowprune.bits import unpack
from torch_flowprune.kernels import MaskedKernel, has_own_forward, zeros_survive
from torch_flowprune.targets import Target, masked, parameters_of, unwrapped

Masks = Mapping[str, Tensor]


class MaskHook(prune.PruningContainer):
    """The forward pre-hook that tells torch's functions "this tensor is pruned". It computes nothing and holds no mask.

    It is torch's own container, so that ``prune.is_pruned`` and ``prune.remove`` find it and torch's methods pruned on top join it.
    """

    def __init__(self, tensor_name: str, methods: Iterable[prune.BasePruningMethod] = ()) -> None:
        super().__init__()
        self._tensor_name = tensor_name
        for method in methods:
            self.add_pruning_method(method)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Nothing to refresh: the weight is computed on access."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The latest method's mask on top of ``default_mask``, as bool; a method that holds a mask of its own shares this one."""
        proposed = super().compute_mask(t, default_mask)
        mask = _binary(proposed) & (default_mask != 0)
        latest = self[-1]
        if isinstance(latest, prune.CustomFromMask):
            latest.mask = mask
        return mask

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The weight as the forward uses it."""
        return masked(module._parameters[f"{self._tensor_name}_orig"], module._buffers[f"{self._tensor_name}_mask"])  # type: ignore[arg-type]

    def remove(self, module: nn.Module) -> None:
        """Make the mask permanent: the parameter gets its name, place and zeros back."""
        name = self._tensor_name
        _check_removable(module)
        parameter = module._parameters[f"{name}_orig"]
        parameter.data = self.apply_mask(module).detach()  # type: ignore[union-attr]
        _restore(module, name)


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Put masks on a model, by parameter name: bool (True = kept), or packed to bytes as ``fp.masks(model, packed=True)`` gives them.

    A parameter already pruned keeps only what both masks keep. All or nothing: everything is checked first, and an error on the way takes back what was done.

    Raises:
        ValueError: for an unknown name, a mask of another shape or dtype, or a parameter that cannot carry a mask.
    """
    known = parameters_of(unwrapped(model))
    fitting = {}
    for name, mask in masks.items():
        check_can_mask(known.get(name), name)
        fitting[name] = _fitting(known[name], mask)
    with all_or_nothing(known[name] for name in fitting):
        for name, mask in fitting.items():
            _mask_target(known[name], mask)


@contextmanager
def all_or_nothing(targets: Iterable[Target]) -> Iterator[None]:
    """An error inside leaves every owner of these parameters exactly as it was."""
    restores = [_snapshot(module) for target in targets for module, _ in target.owners]
    try:
        yield
    except BaseException:
        for restore in restores:
            restore()
        raise


def remove(model: nn.Module) -> nn.Module:
    """Make every mask of the model permanent: parameters get their names and order back, with zeros where they were pruned.

    Works for this package's and for torch's pruning alike; a model that is not pruned stays as it is. The zeros are values from here on:
    training moves them.

    Returns:
        The model.

    >>> layer = nn.Linear(2, 2)
    >>> apply_masks(layer, {"weight": torch.tensor([[True, False], [True, True]])})
    >>> remove(layer).weight[0, 1].item()
    0.0
    """
    hooks = [
        (path, module, key, hook)
        for path, module in model.named_modules()
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, prune.BasePruningMethod)
    ]
    for path, module, _, _ in hooks:
        _check_removable(module, path)
    for _, module, key, hook in hooks:
        # torch's own hooks too: their remove would move the parameter to the end of the order
        MaskHook(hook._tensor_name).remove(module)
        del module._forward_pre_hooks[key]
    return model


def _check_removable(module: nn.Module, path: str = "") -> None:
    dense, names = getattr(type(module), "_masked_kind", (nn.Module, ()))
    if "weight" in names and has_own_forward(dense) and not zeros_survive(module, dense.forward, module._buffers["weight_mask"]):
        where = f"{path or 'this module'} ({dense.__name__})"
        raise ValueError(
            f"{where} standardises its weight before use: zeros in it would not be zeros in the kernel, so the mask cannot be made permanent. "
            "Keep the mask (it holds in the kernel), or prune whole filters (granularity='filter'), whose zeros do survive"
        )


def check_can_mask(target: Target | None, name: str) -> None:
    """Raise a ``ValueError`` that says why, and what to do, unless the parameter can carry a mask."""
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


def _check_owner(module: nn.Module, attribute: str, name: str) -> None:
    if isinstance(module, parametrize.ParametrizationList):
        raise ValueError(f"{name!r} is the original of a parametrization: a mask on it would not be one on the weight; parametrize.remove_parametrizations first")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{name!r} belongs to a scripted module, whose code is fixed: prune the model before scripting it")
    for hook in module._forward_pre_hooks.values():
        if getattr(hook, "name", None) in (attribute, attribute.rsplit("_", 1)[0]) and hasattr(type(hook), "compute_weight"):
            kind = type(hook).__name__
            raise ValueError(f"{name!r} is rewritten by {kind} before every forward: torch.nn.utils.remove_{_snake(kind)} first")
    if f"{attribute}_mask" in module._buffers and f"{attribute}_orig" not in module._parameters:
        raise ValueError(f"{type(module).__name__} already has a buffer {attribute + '_mask'!r} of its own, the name a mask needs: rename it")


def _snake(kind: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind).lstrip("_")


def _fitting(target: Target, mask: Tensor) -> Tensor:
    """The mask as bool, of the parameter's shape, on its device."""
    if mask.dtype is torch.uint8 and mask.shape != target.parameter.shape:
        mask = unpack(mask, target.parameter.shape)
    if mask.dtype is not torch.bool:
        raise ValueError(f"the mask of {target.name!r} should be bool (True = kept), got {mask.dtype}: use mask != 0")
    if mask.shape != target.parameter.shape:
        raise ValueError(f"the mask of {target.name!r} should have shape {tuple(target.parameter.shape)}, got {tuple(mask.shape)}")
    return mask.detach().to(target.parameter.device)


def _binary(mask: Tensor) -> Tensor:
    mask = mask.detach()
    if mask.dtype is not torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask holds 0 (pruned) and 1 (kept); this one has other values, which would scale weights instead of pruning them")
    return mask != 0


def _mask_target(target: Target, mask: Tensor) -> None:
    set_mask(target, mask if target.mask is None else mask & (target.mask != 0))


def set_mask(target: Target, mask: Tensor | None) -> None:
    """Exactly this mask (none: no mask, the parameter as it is) for every owner of the parameter; tied owners share one tensor."""
    own = None if mask is None else mask.clone(memory_format=torch.contiguous_format)
    for module, attribute in target.owners:
        if own is not None:
            put_on(module, attribute, own)
        elif target.mask is not None:
            take_off(module, attribute)


def put_on(module: nn.Module, name: str, mask: Tensor) -> MaskHook:
    """Give one module's parameter this mask, on top of whatever pruning it has; returns its hook."""
    old_key, old = hook_of(module, name)
    hook = old if isinstance(old, MaskHook) else MaskHook(name, _history(old))
    if f"{name}_orig" not in module._parameters:
        _rename(module._parameters, name, f"{name}_orig")
    module.__dict__.pop(name, None)
    module._buffers[f"{name}_mask"] = mask
    module.__class__ = _with(type(module), name)
    if old_key is None:
        module.register_forward_pre_hook(hook)
    else:
        module._forward_pre_hooks[old_key] = hook
    return hook


def hook_of(module: nn.Module, name: str) -> tuple[int | None, prune.BasePruningMethod | None]:
    """The pruning hook of a module's tensor, with its key."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
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
    module.__class__ = _without(type(module), name)
    _rename(module._parameters, f"{name}_orig", name)
    del module._buffers[f"{name}_mask"]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _rename(entries: dict[str, Any], old: str, new: str) -> None:
    """Under a new name at the same place: optimizers, EMA and ``vector_to_parameters`` go by the order."""
    items = [(new if key == old else key, value) for key, value in entries.items()]
    entries.clear()
    entries.update(items)


def _snapshot(module: nn.Module) -> Callable[[], None]:
    """A function that puts back the module's class, parameters, buffers, hooks and attributes as they are now."""
    kind, attributes = type(module), dict(module.__dict__)
    registries = {key: list(attributes[key].items()) for key in ("_parameters", "_buffers", "_forward_pre_hooks")}

    def restore() -> None:
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for key, items in registries.items():
            attributes[key].clear()
            attributes[key].update(items)

    return restore


def _with(kind: type[nn.Module], name: str) -> type[nn.Module]:
    dense, names = getattr(kind, "_masked_kind", (kind, ()))
    return _masked_class(dense, tuple(sorted({*names, name})))


def _without(kind: type[nn.Module], name: str) -> type[nn.Module]:
    dense, names = getattr(kind, "_masked_kind", (kind, ()))
    left = tuple(other for other in names if other != name)
    return _masked_class(dense, left) if left else dense


@lru_cache(maxsize=None)
def _masked_class(dense: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``dense`` in which the named tensors are computed on access."""
    namespace: dict[str, Any] = {name: _masked_property(name) for name in names}
    namespace |= {"_masked_kind": (dense, names), "__module__": dense.__module__, "__doc__": dense.__doc__, "__qualname__": dense.__qualname__}
    namespace |= {"__reduce_ex__": _reduce, "register_parameter": _register_parameter, "_load_from_state_dict": _load_from_state_dict}
    if "weight" in names and has_own_forward(dense):
        namespace["forward"] = _forward_with_masked_kernel
    if issubclass(dense, nn.RNNBase):
        namespace["_flat_weights"] = property(_flat_weights, lambda module, weights: None)
    return type(dense.__name__, (dense,), namespace)


def _masked_property(name: str) -> property:
    orig, mask = f"{name}_orig", f"{name}_mask"

    def get(module: nn.Module) -> Tensor:
        return masked(module._parameters[orig], module._buffers[mask])  # type: ignore[arg-type]

    def drop(module: nn.Module, value: object) -> None:
        """Torch's hook assigns the product it has computed; this module computes its own."""

    def delete(module: nn.Module) -> None:
        """Torch's ``remove`` deletes the product, then both its factors, then assigns the parameter: see ``_register_parameter``."""
        module.__dict__["_parameters_before_removal"] = list(module._parameters)

    return property(get, drop, delete)


def _forward_with_masked_kernel(module: Any, *args: Any, **kwargs: Any) -> Any:
    dense, _ = type(module)._masked_kind
    with MaskedKernel(module._buffers["weight_mask"]):
        return dense.forward(module, *args, **kwargs)


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    """Recurrent layers read their weights through a list of their own, which must be as fresh as the weights."""
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _register_parameter(module: Any, name: str, parameter: nn.Parameter | None) -> None:
    """Where ``name`` is masked: torch's ``remove`` gives the parameter back, to its old place; anyone else replaces the values under the mask."""
    dense, names = type(module)._masked_kind
    if name not in names:
        dense.register_parameter(module, name, parameter)
    elif f"{name}_orig" in module._parameters:
        module._parameters[f"{name}_orig"] = parameter
    else:
        order = [name if key == f"{name}_orig" else key for key in module.__dict__.pop("_parameters_before_removal", [])]
        module.__class__ = _without(type(module), name)
        module.register_parameter(name, parameter)
        _reorder(module._parameters, order)


def _load_from_state_dict(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """``load_state_dict`` of a dense checkpoint sets the values under the masks; with ``strict=False`` torch would skip them in silence."""
    dense, names = type(module)._masked_kind
    for name in names:
        if f"{prefix}{name}" in state_dict and f"{prefix}{name}_orig" not in state_dict:
            state_dict[f"{prefix}{name}_orig"] = state_dict.pop(f"{prefix}{name}")
            state_dict.setdefault(f"{prefix}{name}_mask", module._buffers[f"{name}_mask"])
    dense._load_from_state_dict(module, state_dict, prefix, *args)


def _reorder(entries: dict[str, Any], order: list[str]) -> None:
    items = sorted(entries.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    entries.clear()
    entries.update(items)


def _reduce(module: Any, protocol: Any) -> Any:
    """Copied and pickled as the dense class and the names of what is masked: the subclass itself has no importable name."""
    dense, names = type(module)._masked_kind
    _, _, *state = super(_masked_class(dense, names), module).__reduce_ex__(protocol)
    return (_rebuild, (dense, names), *state)


def _rebuild(dense: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _masked_class(dense, names)
    return kind.__new__(kind)
