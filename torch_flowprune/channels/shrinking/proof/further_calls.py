"""Calls of a model other than the example: of another batch, another length or resolution, other arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, cat, nn

from torch_flowprune.inputs import tree_leaves
from torch_flowprune.torch_internals import tree_map


@dataclass(frozen=True)
class TriedCall:
    """Arguments, and what tells them from those of the example."""

    said: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def mapped(self, said: str, change: Callable[[Any], Any]) -> TriedCall:
        args, kwargs = tree_map(change, (self.args, dict(self.kwargs)))
        return TriedCall(said, args, kwargs)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor) and leaf.ndim]


def further_calls(model: nn.Module, example: TriedCall) -> Iterator[list[TriedCall]]:
    """What a user may try next: of each list the first that the model takes."""
    if tensors := example.tensors():
        yield [_another_batch(example, tensors[0].shape[0])]
        yield list(_other_sizes(example, tensors[0]))
    yield from ([call] for call in _other_arguments(model, example))


def _another_batch(example: TriedCall, batch: int) -> TriedCall:
    """One sample more: of a batch of one much is the same that else is not."""

    def grown(value: Any) -> Any:
        return cat([value, value[:1]]) if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value

    return example.mapped(f"for a batch of {batch + 1}", grown)


def _other_sizes(example: TriedCall, first: Tensor) -> Iterator[TriedCall]:
    """Smaller ones of what is no batch and no channel, where the shape tells: images, volumes, sequences."""
    along = first.shape[2:] if first.ndim > 3 else first.shape[1:2]
    if not along or (first.ndim == 2 and first.is_floating_point()):
        return
    for share in (0.5, 0.75):
        sizes = {size: max(int(size * share), 1) for size in along if size > 1}
        if sizes:
            shown = ", ".join(f"{new} in place of {old}" for old, new in sizes.items())
            yield example.mapped(f"for sizes of {shown}", partial(_cropped, sizes))


def _cropped(sizes: Mapping[int, int], value: Any) -> Any:
    """Every axis of these sizes but the first, and past the channels of images."""
    if isinstance(value, Tensor):
        for axis in range(2 if value.ndim > 3 else min(value.ndim - 1, 1), value.ndim):
            if not (value.ndim == 3 and axis == 2 and value.is_floating_point()):
                value = value.narrow(axis, 0, sizes.get(value.shape[axis], value.shape[axis]))
    return value


def _other_arguments(model: nn.Module, example: TriedCall) -> Iterator[TriedCall]:
    """Each optional argument left out where it was given, and flags and numbers at another value."""
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*example.args, **example.kwargs)
    except (TypeError, ValueError):
        return
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        given, default = name in bound.arguments, parameter.default
        value = bound.arguments.get(name, default)
        if given and default is not parameter.empty and default is not value:
            yield _call_of(f"without {name}", signature, {k: v for k, v in bound.arguments.items() if k != name})
        other = not value if isinstance(value, bool) else 2 * value + 1 if type(value) in (int, float) else None
        if other is not None:
            yield _call_of(f"with {name}={other}", signature, {**bound.arguments, name: other})


def _call_of(said: str, signature: inspect.Signature, arguments: Mapping[str, Any]) -> TriedCall:
    """By keyword where that can be: what stands before an argument may be missing."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name not in arguments:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            args.extend(arguments[name])
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update(arguments[name])
        elif parameter.kind is parameter.POSITIONAL_ONLY or (not kwargs and _comes_next(signature, name, len(args))):
            args.append(arguments[name])
        else:
            kwargs[name] = arguments[name]
    return TriedCall(said, tuple(args), kwargs)


def _comes_next(signature: inspect.Signature, name: str, taken: int) -> bool:
    names = [n for n, p in signature.parameters.items() if p.kind is not p.KEYWORD_ONLY]
    return names[taken : taken + 1] == [name]
