"""What a model says of itself beside its tensors, with no dense model at hand; and a dense model made like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from torch_flowprune.channels.shrinking.surgery import cut_buffers, note_buffers
from torch_flowprune.channels.shrinking.written import paths_of_written
from torch_flowprune.inputs import is_mask, plain_name

_SAID_PARTS = {"attributes": dict, "beside": list, "code": dict, "identities": list, "stand_ins": dict, "written": list}


def own_description(model: nn.Module) -> dict[str, Any]:
    """The sizes that modules state, and what of a model is not as its classes make it, for JSON.

    Raises:
        ShrinkError: if a module was replaced by its exported graph, which no constructor makes.
    """
    check_describable(model)
    return {
        "attributes": sizes_by_module(model),
        "beside": cut_buffers(model),
        "code": code_of_modules(model),
        "identities": identities(model),
        "stand_ins": stand_ins(model),
        "written": paths_of_written(model),
    }


def made_like(model: nn.Module, saved: Mapping[str, Tensor], about: Mapping[str, Any], file: str) -> nn.Module:
    """A model with the sizes and modules of a saved one, in place; as it is where it has these.

    Args:
        model: of the dense architecture, or the saved one.
        saved: the saved model's tensors, by their names without masks.
        about: its :func:`own_description`.
        file: where these are from, for the errors.

    Raises:
        ValueError: for another model, or a damaged description; nothing is changed then.
    """
    _check_said(about, file)
    written = _new(about["written"], paths_of_written(model))
    known = {path for path, _ in model.named_modules()}
    if unknown := [path for path in written if path not in known]:
        raise ValueError(f"{file} is of another model than this {type(model).__name__}: it has {', '.join(unknown)}")
    dense = written_dense(model, written)
    own, sources, sizes = dict(named_tensors(dense)), _by_every_name(dense, saved), sizes_by_module(dense)
    if told := [f"{word} {', '.join(some[:5])}" for word, some in _of_another_model(dense, sources, about) if some]:
        raise ValueError(
            f"{file} is of another model than this {type(model).__name__}, and nothing was loaded: it {'; '.join(told)}"
        )
    code, standing = code_of_modules(model), stand_ins(model)
    shapes = {name: list(value.shape) for name, value in sources.items() if name in own}
    found = {
        "shapes": {name: shape for name, shape in shapes.items() if shape != list(own[name].shape)},
        "identities": _new(about["identities"], identities(model)),
        "stand_ins": {where: one for where, one in about["stand_ins"].items() if standing.get(where) != one},
        "written": written,
        "code": {where: edits for where, edits in about["code"].items() if code.get(where) != edits},
    }
    if not any(found.values()):
        return model
    sizes_now = {where: differing(sizes[where], values) for where, values in about["attributes"].items()}
    small = rebuild(model, {**found, "attributes": {where: values for where, values in sizes_now.items() if values}})
    note_buffers(small, about["beside"])
    return small


def _check_said(about: Any, file: str) -> None:
    known = is_part(about, dict) and about.keys() == _SAID_PARTS.keys()
    if not known or not all(is_part(about[part], kind) for part, kind in _SAID_PARTS.items()):
        raise ValueError(f"{file} is damaged: of the architecture it should say {', '.join(_SAID_PARTS)}")
    if not all(is_part(values, dict) for values in about["attributes"].values()):
        raise ValueError(f"{file} is damaged: the sizes of its modules should be by name")


def _new(wanted: list[str], there: list[str]) -> list[str]:
    return [where for where in wanted if where not in there]


def _by_every_name(model: nn.Module, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was saved for each tensor of a model, by every name of it: one that is tied may have been written once."""
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model):
        names.setdefault(id(tensor), []).append(name)
    found = {name: saved[given] for tied in names.values() for given in tied if given in saved for name in tied}
    return {**{name: value for name, value in saved.items() if name not in found}, **found}


def _of_another_model(
    model: nn.Module, saved: Mapping[str, Tensor], about: Mapping[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    """In which names and sizes a file differs from a model; what is in no state dict, the model has itself."""
    own, state = dict(named_tensors(model)), model.state_dict()
    gone = tuple(f"{where}." for where in (*about["identities"], *about["stand_ins"])) or ("\0",)
    missing = {plain_name(name, state) for name in state if not is_mask(name, state)} - saved.keys()
    yield "lacks", [name for name in own if name in missing and not name.startswith(gone)]
    unknown = [name for name in saved if name not in own and name not in about["beside"]]
    paths = {path for path, _ in model.named_modules()}
    yield "has", unknown + [where for where in about["attributes"] if where not in paths]
    yield (
        "is larger in",
        [
            f"{name} ({list(value.shape)} of {list(own[name].shape)})"
            for name, value in saved.items()
            if name in own and not _fits(value, own[name])
        ],
    )


def _fits(saved: Tensor, own: Tensor) -> bool:
    return saved.ndim == own.ndim and all(one <= other for one, other in zip(saved.shape, own.shape, strict=True))
