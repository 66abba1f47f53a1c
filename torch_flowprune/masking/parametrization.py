"""The class in which a masked tensor is computed on access.

A subclass of the owner's, made once a class and set of names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.inputs import mask_of, masked, original
from torch_flowprune.masking.replacement import fit_for_mask
from torch_flowprune.masking.weight_standardization import MaskedKernel, has_own_forward
from torch_flowprune.masking.written_through import written_through
from torch_flowprune.torch_internals import FLAT_WEIGHTS, names_of_flat_weights


def masked_kind(kind: type[nn.Module]) -> tuple[type[nn.Module], tuple[str, ...]]:
    """The dense class behind a class made here, and what it masks; any other class itself, and nothing."""
    dense_and_names: tuple[type[nn.Module], tuple[str, ...]] = getattr(kind, "_masked_kind", (kind, ()))
    return dense_and_names


def with_masked(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """The class that masks ``name``, besides what ``kind`` masks already."""
    dense, names = masked_kind(kind)
    return _masked_class(dense, tuple(sorted({*names, name})))


def without_masked(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """The class that masks what ``kind`` does, but for ``name``; the dense one where nothing is left."""
    dense, names = masked_kind(kind)
    others = tuple(other for other in names if other != name)
    return _masked_class(dense, others) if others else dense


_made: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _masked_class(dense: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``dense`` in which the named tensors are computed on access.

    One and the same however often it is asked for.
    """
    if (dense, names) not in _made:
        _made[dense, names] = type(dense.__name__, (dense,), _namespace(dense, names))
    return _made[dense, names]


def _namespace(dense: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
    """What differs from ``dense``: the properties, and how the class is copied, assigned to and loaded."""
    namespace: dict[str, Any] = {name: _masked_property(name) for name in names}
    namespace |= {
        "_masked_kind": (dense, names),
        "__module__": dense.__module__,
        "__doc__": dense.__doc__,
        "__qualname__": dense.__qualname__,
    }
    namespace |= {
        "__reduce_ex__": _reduce,
        "register_parameter": _register_parameter,
        "_load_from_state_dict": _load_from_state_dict,
    }
    if "weight" in names and has_own_forward(dense):
        namespace["forward"] = _forward_with_masked_kernel
    if issubclass(dense, nn.RNNBase):
        namespace[FLAT_WEIGHTS] = property(_flat_weights, lambda module, weights: None)
    return namespace


def product(module: nn.Module, name: str) -> Tensor:
    """The masked tensor.

    Sparse gradients (``nn.Embedding(sparse=True)``) pass a true product only; replicas hold parameters as attributes.
    """
    value, mask = getattr(module, original(name)), getattr(module, mask_of(name))
    return value * mask if getattr(module, "sparse", False) is True else masked(value, mask)


def _masked_property(name: str) -> property:
    def get(module: nn.Module) -> Tensor:
        return written_through(product(module, name), getattr(module, original(name)), getattr(module, mask_of(name)))

    def accept(module: nn.Module, value: object) -> None:
        """Torch's ``apply`` assigns the product, which this module computes itself.

        Any other value would be lost in silence.
        """
        if not (isinstance(value, Tensor) and torch.equal(value.nan_to_num(), get(module).nan_to_num())):
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


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    """Recurrent layers read their weights through a list of their own, which must be as fresh as the weights."""
    return [getattr(module, name, None) for name in names_of_flat_weights(module)]


def _register_parameter(module: Any, name: str, parameter: nn.Parameter | None) -> None:
    """Where ``name`` is masked: torch's ``remove`` gives the parameter back, to its old place.

    Anyone else replaces the values under the mask.
    """
    dense, names = type(module)._masked_kind
    if name not in names:
        dense.register_parameter(module, name, parameter)
    elif original(name) in module._parameters:
        module._parameters[original(name)] = fit_for_mask(parameter, module._buffers[mask_of(name)], name)
    else:
        order = [
            name if key == original(name) else key for key in module.__dict__.pop("_parameters_before_removal", [])
        ]
        module.__class__ = without_masked(type(module), name)
        module.register_parameter(name, parameter)
        _reorder(module._parameters, order)


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


def _reduce(module: Any, protocol: Any) -> Any:
    """Copied and pickled as the dense class and the names of what is masked.

    The subclass itself has no importable name.
    """
    dense, names = type(module)._masked_kind
    _, _, *state = super(_masked_class(dense, names), module).__reduce_ex__(protocol)
    return (_rebuild, (dense, names), *state)


def _rebuild(dense: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _masked_class(dense, names)
    return kind.__new__(kind)


def rename(entries: dict[str, Any], old: str, new: str) -> None:
    """Under a new name at the same place: optimizers, EMA and ``vector_to_parameters`` go by the order."""
    items = [(new if key == old else key, value) for key, value in entries.items()]
    entries.clear()
    entries.update(items)
