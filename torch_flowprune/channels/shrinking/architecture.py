"""The architecture of a shrunk model as a small JSON beside its weights, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torch_flowprune.channels.shrinking.exported_module import ExportedModule
from torch_flowprune.channels.shrinking.surgery import ShrinkError
from torch_flowprune.channels.tracing import canonical_names
from torch_flowprune.inputs import is_mask, plain_name


def describe(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """The architecture of ``small`` as a change of ``dense``, for JSON: the shapes and attributes that differ."""
    if any(isinstance(m, ExportedModule) for m in small.modules()):
        raise ShrinkError(
            "an exported graph has no dense constructor to be rebuilt from; save it with torch.save or torch.export"
        )
    tensors, attributes = dict(_named_tensors(dense)), dict[str, dict[str, Any]]()
    shapes = {n: list(t.shape) for n, t in _named_tensors(small) if t.shape != tensors[n].shape}
    for path, module in small.named_modules():
        old = vars(dense.get_submodule(path))
        changed = {k: v for k, v in vars(module).items() if _is_size(v) and _is_size(old.get(k)) and v != old[k]}
        if changed:
            attributes[path] = changed
    return {"shapes": shapes, "attributes": attributes}


def rebuild(dense: nn.Module, description: Mapping[str, Any]) -> nn.Module:
    """``dense`` (changed in place) with the sizes of a description; ``load_state_dict`` then fills it."""
    names = canonical_names(dense)
    new: dict[str, Tensor] = {}
    for name in description["shapes"]:
        path, _, leaf = name.rpartition(".")
        module = dense.get_submodule(path)
        held = module._parameters if leaf in module._parameters else module._buffers
        old = held[leaf]
        assert old is not None
        if names[name] not in new:
            empty = old.detach().new_zeros(description["shapes"][name])
            new[names[name]] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
        held[leaf] = new[names[name]]  # type: ignore[assignment]
    for path, values in description["attributes"].items():
        module = dense.get_submodule(path)
        for name, value in values.items():
            setattr(module, name, type(getattr(module, name))(value))
    return dense


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Under the names that they have without masks; these are no part of an architecture."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    yield from ((plain_name(key, buffers), value) for key, value in parameters.items())
    yield from ((key, value) for key, value in buffers.items() if not is_mask(key, parameters))


def _is_size(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(type(v) is int for v in value)
    return type(value) is int
