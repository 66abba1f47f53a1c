"""A shrunk model in one file: its weights and masks, and of its architecture what its tensors do not say."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from torch_flowprune.channels.shrinking.saving.architecture import (
    check_describable,
    code_of_modules,
    differing,
    identities,
    is_part,
    named_tensors,
    rebuild,
    sizes_by_module,
    stand_ins,
    written_dense,
)
from torch_flowprune.channels.shrinking.written import paths_of_written
from torch_flowprune.channels.tracing import canonical_names
from torch_flowprune.inputs import is_mask, plain_name, read_tensors, unwrapped, write_tensors
from torch_flowprune.masking import load_state_dict, state_dict

_WHAT, _WRITER = "shrunk model", "fp.save_shrunk"


def save_shrunk(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a shrunk model, architecture and weights, to one safetensors file.

    Args:
        model: the result of :func:`~torch_flowprune.shrink`, fine-tuned or not; its masks are saved too.
        path: the file.

    Raises:
        ShrinkError: if a module was replaced by its exported graph, which no constructor makes.
        ValueError: if the state dict holds a value that is not a tensor.
        ImportError: without safetensors.

    See Also:
        :func:`~torch_flowprune.load_shrunk`: reads it back.
        :func:`~torch_flowprune.describe`: the architecture alone.

    >>> import tempfile, os
    >>> small = nn.Linear(4, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_shrunk(small, os.path.join(folder, "small.safetensors"))
    ...     again = load_shrunk(nn.Linear(4, 3), os.path.join(folder, "small.safetensors"))
    >>> bool((again.weight == small.weight).all())
    True
    """
    inner = unwrapped(model)
    check_describable(inner)
    state, names = state_dict(inner), canonical_names(inner)
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"the state holds what is no tensor ({', '.join(odd[:5])}): save the model with torch.save")
    once = {name: value for name, value in state.items() if names.get(name, name) == name}
    beside = {name: value for name, value in inner.named_buffers() if name not in state}
    about = {"beside": list(beside), "attributes": sizes_by_module(inner), "identities": identities(inner)}
    about |= {"stand_ins": stand_ins(inner), "written": paths_of_written(inner), "code": code_of_modules(inner)}
    write_tensors(path, {**once, **beside}, about)


def load_shrunk(dense: nn.Module, path: str | PathLike[str]) -> nn.Module:
    """Load a file that :func:`save_shrunk` wrote.

    Args:
        dense: a new model of the dense architecture; it is made smaller in place and gets the weights.
        path: the file.

    Returns:
        The model, with the masks of the saved one.

    Raises:
        ValueError: for a file of another kind or of another model, or a damaged file; nothing is changed then.
        ImportError: without safetensors.

    >>> import tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_shrunk(nn.Linear(4, 2), os.path.join(folder, "small.safetensors"))
    ...     load_shrunk(nn.Linear(4, 3), os.path.join(folder, "small.safetensors"))
    Linear(in_features=4, out_features=2, bias=True)
    """
    tensors, about = read_tensors(path, _WHAT, _WRITER)
    _check_words(about, path)
    inner = unwrapped(dense)
    saved = {plain_name(name, tensors): value for name, value in tensors.items() if not is_mask(name, tensors)}
    state = {name: value for name, value in tensors.items() if name not in about["beside"]}
    rebuilt = rebuild(inner, _changes(inner, saved, about, path))
    load_state_dict(rebuilt, state)
    buffers = dict(rebuilt.named_buffers())
    for name in about["beside"]:
        if name in buffers:  # some are made when they are first needed
            buffers[name].copy_(tensors[name])
    return rebuilt if dense is inner else dense


def _check_words(about: Mapping[str, Any], path: str | PathLike[str]) -> None:
    kinds = {"beside": list, "attributes": dict, "identities": list}
    known = all(is_part(about.get(word), kind) for word, kind in kinds.items()) and is_part(_written_in(about), list)
    if not known or not all(is_part(values, dict) for values in about["attributes"].values()):
        raise ValueError(f"{path} holds no {_WHAT}: expected a file written by {_WRITER}")


def _written_in(about: Mapping[str, Any]) -> Any:
    """Files from before there were any have none."""
    return about.get("written", [])


def _changes(
    model: nn.Module, saved: Mapping[str, Tensor], about: Mapping[str, Any], path: str | PathLike[str]
) -> dict[str, Any]:
    """What of a file differs from a model, as a description.

    Raises:
        ValueError: where the two have other tensors.
    """
    model = written_dense(model, _written_in(about))
    own, sources, sizes = dict(named_tensors(model)), _tensors_by_name(model, saved), sizes_by_module(model)
    gone = tuple(f"{where}." for where in (*about["identities"], *about.get("stand_ins", ())))
    lacking = [name for name in own if name not in sources and not name.startswith(gone or ("\0",))]
    unknown = [name for name in saved if name not in own and name not in about["beside"]]
    unknown += [where for where in about["attributes"] if where not in sizes]
    if lacking or unknown:
        told = [f"{word} {', '.join(some[:5])}" for word, some in (("lacks", lacking), ("has", unknown)) if some]
        raise ValueError(f"{path} is of another model than the one given, and nothing was loaded: it {', '.join(told)}")
    changed = {where: differing(sizes.get(where, {}), values) for where, values in about["attributes"].items()}
    return {
        "shapes": {name: list(value.shape) for name, value in sources.items() if value.shape != own[name].shape},
        "attributes": {where: values for where, values in changed.items() if values},
        "identities": [where for where in about["identities"] if where not in identities(model)],
        "stand_ins": about.get("stand_ins", {}),
        "written": _written_in(about),
        "code": about.get("code", {}),
    }


def _tensors_by_name(model: nn.Module, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file has for each tensor, by every name of it: one that is tied was written once."""
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model):
        names.setdefault(id(tensor), []).append(name)
    return {name: saved[given] for tied in names.values() for given in tied if given in saved for name in tied}
