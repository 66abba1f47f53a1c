"""The class in which a masked tensor is computed on access.

A subclass of the owner's, made once a class and set of names.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from torch_flowprune.inputs import mask_of, masked_for_now, original
from torch_flowprune.masking.carrier.class_chain import quiet_subclass, relaid, under_parametrizations
from torch_flowprune.masking.carrier.quantization import qconfig
from torch_flowprune.masking.carrier.replacement import fit_for_mask
from torch_flowprune.masking.carrier.weight_standardization import MaskedKernel, standardises
from torch_flowprune.masking.carrier.written_through import MaskedWeight, is_handed_out, written_through
from torch_flowprune.torch_internals import FLAT_WEIGHTS, is_read_as_a_graph, names_of_flat_weights, tensor_name

_SAID = "(masked: fp.remove(model) or fp.export_ready(model) makes it plain)"


def masked_kind(kind: type[nn.Module]) -> tuple[type[nn.Module], tuple[str, ...]]:
    """The dense class behind a class made here, and what it masks; any other class itself, and nothing."""
    dense_and_names: tuple[type[nn.Module], tuple[str, ...]] = getattr(kind, "_masked_kind", (kind, ()))
    return dense_and_names


def with_masked(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """The class that masks ``name``, besides what ``kind`` masks already."""
    dense, names = masked_kind(kind)
    return _masking(kind, dense, tuple(sorted({*names, name})))


def without_masked(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """The class that masks what ``kind`` does, but for ``name``; the dense one where nothing is left."""
    dense, names = masked_kind(kind)
    return _masking(kind, dense, tuple(other for other in names if other != name))


def _masking(kind: type[nn.Module], dense: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """``kind`` with these names masked. Whatever is laid over its class, parametrizations say, stays over it."""
    base = under_parametrizations(dense)
    old = _own_class(kind) or base
    return relaid(kind, old, _masked_class(base, names) if names else base)


def _own_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class made here that ``kind`` is, or is laid over."""
    return next((base for base in kind.__mro__ if "_masked_kind" in vars(base)), None)


# As long as a module has it, and its dense class with it: a traced model has a class of its own.
_made: WeakKeyDictionary[type[nn.Module], WeakValueDictionary[tuple[str, ...], type[nn.Module]]] = WeakKeyDictionary()


def _masked_class(dense: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``dense`` in which the named tensors are computed on access.

    One and the same however often it is asked for.
    """
    kinds = _made.setdefault(dense, WeakValueDictionary())
    made = kinds.get(names)
    if made is None:
        made = kinds[names] = quiet_subclass(dense, dense.__name__, _namespace(dense, names), _SAID)
    return made


def _namespace(dense: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
    """What differs from ``dense``: the properties, and how the class is copied, assigned to and loaded."""
    namespace: dict[str, Any] = {name: _masked_property(dense, name) for name in names}
    namespace |= {
        "_masked_kind": (dense, names),
        "__module__": dense.__module__,
        "__doc__": dense.__doc__,
        "__qualname__": dense.__qualname__,
    }
    namespace |= {
        **_copying(dense),
        "register_parameter": _register_parameter,
        "_load_from_state_dict": _load_from_state_dict,
        "qconfig": qconfig,
    }
    if "weight" in names and standardises(dense):
        namespace |= {"forward": _forward_with_masked_kernel, "__call__": _call_with_masked_kernel}
    if issubclass(dense, torch.fx.GraphModule):
        namespace["recompile"] = _recompile
    if issubclass(dense, nn.RNNBase):
        namespace[FLAT_WEIGHTS] = property(_flat_weights, lambda module, weights: None)
    return namespace


def _embeds(kind: type[nn.Module]) -> bool:
    """Whether its modules may have sparse gradients (``sparse=True``), which pass a true product only."""
    return issubclass(kind, (nn.Embedding, nn.EmbeddingBag))


def _of_replica(module: nn.Module, *keys: str) -> Any:
    """The parameter and the mask of any module. Replicas hold parameters as attributes; of others it takes longer."""
    return [getattr(module, key) for key in keys]


def _masked_property(dense: type[nn.Module], name: str) -> property:
    keys, embeds = (original(name), mask_of(name)), _embeds(dense)

    def get(module: nn.Module) -> Tensor:
        value, mask = module._parameters.get(keys[0]), module._buffers.get(keys[1])
        if value is None or mask is None:
            value, mask = _of_replica(module, *keys)
        if embeds and module.sparse:
            found, lives = value * mask, not is_read_as_a_graph()
        else:
            found, lives = masked_for_now(value, mask)
        return written_through(found, value, mask) if lives else found

    def accept(module: nn.Module, value: object) -> None:
        """Torch's ``apply`` assigns what this module has just handed out.

        Any other value, even one that is equal, would be lost in silence.
        """
        if not is_handed_out(value, module._parameters.get(keys[0])):
            raise TypeError(
                f"{name!r} is pruned, so it is computed from {original(name)} and {mask_of(name)}: set "
                f"{original(name)} instead (also in functional_call)"
            )

    def delete(module: nn.Module) -> None:
        """Torch's ``remove`` deletes the product, then both its factors, then assigns the parameter.

        See ``_register_parameter``.
        """
        module.__dict__["_parameters_before_removal"] = list(module._parameters)

    return property(get, accept, delete)


def _forward_with_masked_kernel(module: Any, *args: Any, **kwargs: Any) -> Any:
    dense, _ = type(module)._masked_kind
    with MaskedKernel(module._buffers[mask_of("weight")]):
        return dense.forward(module, *args, **kwargs)


def _call_with_masked_kernel(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward that was put on the instance (accelerate does) calls the dense class's, past the one above."""
    dense, _ = type(module)._masked_kind
    if "forward" not in module.__dict__:
        return dense.__call__(module, *args, **kwargs)
    with MaskedKernel(module._buffers[mask_of("weight")]):
        return dense.__call__(module, *args, **kwargs)


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    """Recurrent layers read their weights through a list of their own, which must be as fresh as the weights."""
    return [getattr(module, name, None) for name in names_of_flat_weights(module)]


def _register_parameter(module: Any, name: str, parameter: nn.Parameter | None) -> None:
    """Where ``name`` is masked: torch's ``remove`` gives the parameter back, to its old place.

    Anyone else replaces the values under the mask.
    """
    dense, names = type(module)._masked_kind
    if name not in names:
        _check_is_pruned_for_torch(names, name, parameter)
        dense.register_parameter(module, name, parameter)
    elif original(name) in module._parameters:
        mask = module._buffers[mask_of(name)]
        fitting = module._parameters[original(name)] = fit_for_mask(parameter, mask, repr(name))
        module._buffers[mask_of(name)] = mask.to(fitting.device)
    else:
        order = [
            name if key == original(name) else key for key in module.__dict__.pop("_parameters_before_removal", [])
        ]
        module.__class__ = without_masked(type(module), name)
        module.register_parameter(name, parameter)
        _reorder(module._parameters, order)


def _check_is_pruned_for_torch(names: Iterable[str], name: str, value: object) -> None:
    """An error where torch's functions, which find no hook, begin anew with what is masked.

    They take a hook off before they look at what they were given, and leave it off where they refuse that.
    """
    if isinstance(value, MaskedWeight) and name in map(original, names):
        raise TypeError(
            f"{name!r} is there already, and the pruning hook is not: torch's functions remove it before they check "
            "their arguments; fp.apply_masks(module, fp.masks(module)) restores it"
        )


def _load_from_state_dict(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """``load_state_dict`` of a dense checkpoint sets the values under the masks.

    With ``strict=False`` torch would skip them in silence.
    """
    dense, names = type(module)._masked_kind
    for name in names:
        path = f"{prefix}{name}"
        if path in state_dict and original(path) not in state_dict:
            state_dict[original(path)] = state_dict.pop(path)
            state_dict.setdefault(mask_of(path), module._buffers[mask_of(name)])
    dense._load_from_state_dict(module, state_dict, prefix, *args)


def _reorder(entries: dict[str, Any], order: list[str]) -> None:
    items = sorted(entries.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    entries.clear()
    entries.update(items)


def _copying(dense: type[nn.Module]) -> dict[str, Any]:
    """How the class's modules are copied and pickled: as torch's are, or as the class itself says."""
    own = dense.__reduce__ is not object.__reduce__ or dense.__reduce_ex__ is not object.__reduce_ex__
    namespace: dict[str, Any] = {"__reduce_ex__": _reduce_as_dense if own else _reduce}
    return {**namespace, "__deepcopy__": _deepcopy_as_dense} if hasattr(dense, "__deepcopy__") else namespace


def _reduce(module: Any, protocol: Any) -> Any:
    """The dense class and the names of what is masked: the subclass itself has no importable name."""
    kind: Any = type(module)
    own: Any = _own_class(kind)
    reduced = super(own, module).__reduce_ex__(protocol)
    return (_rebuild, kind._masked_kind, *reduced[2:]) if kind is own else reduced


def _rebuild(dense: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _masked_class(dense, names)
    return kind.__new__(kind)


def _reduce_as_dense(module: Any, _protocol: Any) -> Any:
    return (_remasked, _as_dense(module))


def _deepcopy_as_dense(module: Any, memo: dict[int, Any]) -> nn.Module:
    memo[id(module)] = twin = _remasked(*copy.deepcopy(_as_dense(module), memo))
    return twin


def _as_dense(module: Any) -> tuple[nn.Module, dict[str, Tensor], list[Any]]:
    """The module as the dense one its class knows how to copy, with the same tensors; its masks, and their hooks."""
    _, names = masked_kind(type(module))
    dense = object.__new__(reduce(without_masked, names, type(module)))
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    for name in names:
        rename(parameters, original(name), name)
    masks = {name: buffers.pop(mask_of(name)) for name in names}
    hooks = [hook for hook in module._forward_pre_hooks.values() if tensor_name(hook) in names]
    others = OrderedDict((key, hook) for key, hook in module._forward_pre_hooks.items() if hook not in hooks)
    vars(dense).update(vars(module), _parameters=parameters, _buffers=buffers, _forward_pre_hooks=others)
    return dense, masks, hooks


def _remasked(module: nn.Module, masks: dict[str, Tensor], hooks: Iterable[Any]) -> nn.Module:
    for name, mask in masks.items():
        rename(module._parameters, name, original(name))
        module._buffers[mask_of(name)] = mask
        module.__class__ = with_masked(type(module), name)
    for hook in hooks:
        module.register_forward_pre_hook(hook)
    return module


def _recompile(module: Any) -> Any:
    """A traced module writes its new code into its class: into the dense one, which outlives its masks."""
    kind = type(module)
    module.__class__ = reduce(without_masked, masked_kind(kind)[1], kind)
    try:
        return module.recompile()
    finally:
        module.__class__ = kind


def rename(entries: dict[str, Any], old: str, new: str) -> None:
    """Under a new name at the same place: optimizers, EMA and ``vector_to_parameters`` go by the order."""
    items = [(new if key == old else key, value) for key, value in entries.items()]
    entries.clear()
    entries.update(items)
