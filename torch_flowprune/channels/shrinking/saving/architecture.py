"""The architecture of a shrunk model as a small JSON beside its weights, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels.shrinking.graphs import ExportedModule
from torch_flowprune.channels.shrinking.own_code import edits_from, edits_of, own_class, with_edits
from torch_flowprune.channels.shrinking.removed_branches import HANDED_ON, StandIn, StandInSpec, with_stand_ins
from torch_flowprune.channels.shrinking.surgery import ShrinkError, note_buffers
from torch_flowprune.channels.shrinking.written import paths_of_written, written_anew
from torch_flowprune.channels.tracing import canonical_names
from torch_flowprune.inputs import is_mask, original, plain_name
from torch_flowprune.masking import dense_copy, remove

_DESCRIBED: dict[str, type[Any]] = {
    "shapes": dict,
    "attributes": dict,
    "values": dict,
    "identities": list,
    "stand_ins": dict,
    "written": list,
    "code": dict,
}


def describe(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """The architecture of ``small``, as its differences from ``dense``, for JSON; :func:`rebuild` applies them.

    Args:
        dense: the model before :func:`shrink`; it may have masks, which are not part of the architecture.
        small: the result of ``shrink``; it may have masks too.

    Returns:
        The ``shapes`` of tensors and the ``attributes`` of modules that differ; the ``values`` of buffers that differ
        in size and are in no state dict; the ``identities`` and ``stand_ins`` that replace modules; the ``written``
        modules that replace another class; and the ``code`` of modules that differs from their class's.

    Raises:
        ShrinkError: if ``small`` has a module that ``dense`` does not have: it was replaced by its exported graph, or
            belongs to another model.

    See Also:
        :func:`~torch_flowprune.save_pruned`: writes architecture and weights to one file.

    >>> import torch, torch_flowprune as fp
    >>> dense, small = torch.nn.Linear(4, 3), torch.nn.Linear(4, 2)
    >>> fp.describe(dense, small)["attributes"]
    {'': {'out_features': 2}}
    """
    replaced = paths_of_written(small)
    dense = written_dense(dense, replaced)
    _check_same_modules(dense, small)
    tensors, loaded = dict(named_tensors(dense)), small.state_dict().keys()
    new = {name: tensor for name, tensor in named_tensors(small) if tensor.shape != tensors[name].shape}
    _check_smaller(tensors, new)
    before, attributes = sizes_by_module(dense), sizes_by_module(small)
    changed = {path: differing(before.get(path, {}), values) for path, values in attributes.items()}
    beside = {name: tensor for name, tensor in new.items() if not {name, original(name)} & loaded}
    return {
        "shapes": {name: list(tensor.shape) for name, tensor in new.items()},
        "attributes": {path: values for path, values in changed.items() if values},
        "values": {name: tensor.tolist() for name, tensor in beside.items()},
        "identities": [path for path in identities(small) if not isinstance(dense.get_submodule(path), nn.Identity)],
        "stand_ins": stand_ins(small),
        "written": replaced,
        "code": code_of_modules(small),
    }


def rebuild(dense: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """``dense`` with the sizes of a description; :func:`~torch_flowprune.load_state_dict` then loads its values.

    Args:
        dense: a new model of the dense architecture; changed in place, and without masks afterwards.
        description: the result of :func:`describe`, also after a round trip through JSON.

    Returns:
        The model; tensors that changed size hold zeros.

    Raises:
        ValueError: for a damaged description or one of another model; nothing is changed then.

    >>> import torch, torch_flowprune as fp
    >>> small = torch.nn.Linear(4, 2)
    >>> again = fp.rebuild(torch.nn.Linear(4, 3), fp.describe(torch.nn.Linear(4, 3), small))
    >>> again.load_state_dict(small.state_dict()), again.out_features
    (<All keys matched successfully>, 2)
    """
    _check_fits_description(dense, description)
    dense = written_anew(remove(dense), description.get("written", ()))
    _give_shapes(dense, description)
    for path, attributes in description["attributes"].items():
        module = dense.get_submodule(path)
        for name, value in attributes.items():
            setattr(module, name, type(getattr(module, name))(value))
    _with_code(dense, description)
    note_buffers(dense, description.get("values", ()))
    standing = dict.fromkeys(description.get("identities", ()), HANDED_ON)
    standing |= {path: StandInSpec.from_dict(one) for path, one in description.get("stand_ins", {}).items()}
    return with_stand_ins(dense, standing)


def _give_shapes(dense: nn.Module, description: Mapping[str, Any]) -> None:
    """Tensors of other sizes, with zeros, or the values that are in no state dict."""
    names = canonical_names(dense)
    new: dict[str, Tensor] = {}
    for name, shape in description["shapes"].items():
        path, _, leaf = name.rpartition(".")
        module = dense.get_submodule(path)
        held = module._parameters if leaf in module._parameters else module._buffers
        old = held[leaf]
        assert old is not None
        if names[name] not in new:
            values = description.get("values", {}).get(name)
            empty = old.detach().new_zeros(shape) if values is None else old.new_tensor(values)
            new[names[name]] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
        held[leaf] = new[names[name]]  # type: ignore[assignment]


def written_dense(dense: nn.Module, paths: Collection[str]) -> nn.Module:
    """A dense model with the written modules of a smaller one, at all of their size; a copy where there are any."""
    return written_anew(dense_copy(dense)[0], paths) if paths else dense


def code_of_modules(model: nn.Module) -> dict[str, list[Any]]:
    """Module path -> what its code says instead of its class's, as JSON takes it."""
    found = {path: edits_of(type(module)) for path, module in model.named_modules()}
    return {path: json.loads(json.dumps(edits)) for path, edits in found.items() if edits}


def _with_code(dense: nn.Module, description: Mapping[str, Any]) -> None:
    for path, edits in edits_from(description.get("code", {})).items():
        module = dense.get_submodule(path)
        module.__class__ = with_edits(type(module), edits)


def sizes_by_module(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module path -> attribute -> value, of the numbers and tuples of whole numbers that modules hold."""
    return {path: {k: v for k, v in vars(m).items() if _is_size(v)} for path, m in model.named_modules()}


def identities(model: nn.Module) -> list[str]:
    """The paths of modules that hand on what they are given."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.Identity)]


def stand_ins(model: nn.Module) -> dict[str, Any]:
    """Module path -> what stands there since a branch is gone."""
    return {path: module.standing for path, module in model.named_modules() if isinstance(module, StandIn)}


def check_describable(model: nn.Module) -> None:
    """An error where a model holds a graph in a module's place.

    Raises:
        ShrinkError: naming it.
    """
    if graphs := [path for path, module in model.named_modules() if isinstance(module, ExportedModule)]:
        raise ShrinkError(
            "an exported graph has no dense constructor to be rebuilt from; save it with torch.save or torch.export "
            f"(here {', '.join(path or 'the model itself' for path in graphs[:5])})"
        )


def _check_same_modules(dense: nn.Module, small: nn.Module) -> None:
    check_describable(small)
    known = {path: _class_of(module) for path, module in dense.named_modules()}
    for path, module in small.named_modules():
        if not isinstance(module, (nn.Identity, StandIn)) and known.get(path) != _class_of(module):
            raise ShrinkError(
                f"the smaller model has a {type(module).__name__} at {path!r}, and the dense one "
                f"{known[path][1] if path in known else 'nothing'}: pass the model that it was shrunk from"
            )


def _check_smaller(dense: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> None:
    if larger := [name for name, tensor in small.items() if not _is_shape(list(tensor.shape), dense[name])]:
        raise ShrinkError(f"{', '.join(larger[:5])} should be smaller in the second model: describe(dense, small)")


def _class_of(module: nn.Module) -> tuple[str, str]:
    """A class by its name, under which a masked module goes too."""
    return type(module).__module__, type(module).__qualname__


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of one module that are others now."""
    return {name: value for name, value in now.items() if name in before and value != before[name]}


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's tensors, tied ones by every name, under the names that they have without masks."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    yield from ((plain_name(key, buffers), value) for key, value in parameters.items())
    yield from ((key, value) for key, value in buffers.items() if not is_mask(key, parameters))


def _is_size(value: Any) -> bool:
    if type(value) in (tuple, list, torch.Size):
        return all(type(v) is int for v in value)
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _check_fits_description(dense: nn.Module, description: Mapping[str, Any]) -> None:
    """That every part of a description fits the model."""
    _check_parts(description)
    if unknown := set(description.get("written", ())) - {path for path, _ in dense.named_modules()}:
        raise ValueError(f"the description has a module {min(unknown)!r}, and the model has none there")
    _check_code(dense, description.get("code", {}))
    dense = written_dense(dense, description.get("written", ()))
    tensors, modules = dict(named_tensors(dense)), dict(dense.named_modules())
    for name, shape in description["shapes"].items():
        if name not in tensors:
            raise ValueError(f"the description has a tensor {name!r}, and the model has none of that name")
        if not _is_shape(shape, tensors[name]):
            raise ValueError(
                f"the description gives {name!r} the shape {shape!r}: expected at most {list(tensors[name].shape)}, "
                "that of the dense model, on every axis"
            )
    for name, values in description.get("values", {}).items():
        if name not in description["shapes"] or not _holds(values, description["shapes"][name]):
            raise ValueError(f"the description gives {name!r} values that do not fill its shape")
    _check_modules(modules, description)


def _check_modules(modules: Mapping[str, nn.Module], description: Mapping[str, Any]) -> None:
    """What is said of modules, by their paths."""
    standing = description.get("stand_ins", {})
    for path in [*description["attributes"], *description.get("identities", ()), *standing]:
        if path not in modules:
            raise ValueError(f"the description has a module {path!r}, and the model has none there")
    for one in standing.values():
        StandInSpec.from_dict(one)
    for path, values in description["attributes"].items():
        _check_attributes(path, modules[path], values)


def _check_code(dense: nn.Module, code: Mapping[str, Any]) -> None:
    """That the classes say what they said when something was put in its place."""
    modules = dict(dense.named_modules())
    for path, edits in code.items():
        if path not in modules:
            raise ValueError(f"the description has code for {path!r}, and the model has no module there")
        try:
            (of_module,) = edits_from({path: edits}).values()
            with_edits(own_class(type(modules[path])), of_module)
        except (TypeError, LookupError, AttributeError, SyntaxError) as error:
            raise ValueError(f"the description gives {path!r} code that does not fit its class: {edits!r}") from error


def _check_parts(description: Any) -> None:
    known = isinstance(description, Mapping) and {"shapes", "attributes"} <= set(description) <= set(_DESCRIBED)
    if not known or not all(is_part(value, _DESCRIBED[part]) for part, value in description.items()):
        raise ValueError(
            f"a description should hold {', '.join(_DESCRIBED)}, as fp.describe gives it: got {description!r}"
        )


def is_part(value: Any, kind: type[Any]) -> bool:
    """Whether a value is a list of names, or has such for keys."""
    return isinstance(value, kind) and all(isinstance(name, str) for name in value)


def _is_shape(shape: Any, tensor: Tensor) -> bool:
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    return whole and len(shape) == tensor.ndim and all(n <= m for n, m in zip(shape, tensor.shape, strict=True))


def _holds(values: Any, shape: Any) -> bool:
    try:
        return bool(list(torch.as_tensor(values, device="cpu").shape) == shape)
    except (TypeError, ValueError, RuntimeError):
        return False


def _check_attributes(path: str, module: nn.Module, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"the description should give the attributes of {path!r} by name, got {values!r}")
    for name, value in values.items():
        old = vars(module).get(name)
        if not (_is_size(old) and _is_size(value) and _alike(old, value)):
            raise ValueError(
                f"the description sets {name!r} of {path or 'the model'!r} to {value!r}: expected a size that a "
                f"{type(module).__name__} states, and a value of its kind (it is {old!r})"
            )


def _alike(old: Any, value: Any) -> bool:
    if isinstance(old, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(value) <= len(old)
    return isinstance(value, int) if isinstance(old, int) else isinstance(value, (int, float))
