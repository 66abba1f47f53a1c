"""What a graph was built for, compared at each call: a graph is a snapshot of one call, a module a promise for all."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from torch_flowprune.torch_internals import tree_flatten


class BuiltForError(ValueError):
    """A graph in a module's place was called with what it was not built for."""


@dataclass(frozen=True)
class Sized:
    """A tensor as a graph takes it.

    Attributes:
        dtype: of its elements.
        sizes: a number where it is fixed, a name where it is free: equal names are equal sizes.
    """

    dtype: torch.dtype
    sizes: tuple[int | str, ...]

    def __str__(self) -> str:
        return (
            f"a {str(self.dtype).removeprefix('torch.')} tensor of {' x '.join(map(str, self.sizes)) or 'one number'}"
        )


@dataclass(frozen=True)
class CallGuard:
    """The arguments that a graph was built for.

    Attributes:
        where: the module, in words.
        signature: of its forward.
        arguments: name -> how values nest in it, and its values in order: ``Sized`` for tensors.
        ranges: name of a free size -> the least and the most it may be.
    """

    where: str
    signature: inspect.Signature
    arguments: Mapping[str, tuple[Any, tuple[Any, ...]]]
    ranges: Mapping[str, tuple[int, int]]

    def in_precision(self, dtype: torch.dtype) -> CallGuard:
        """For a model of another precision: its float32 inputs go along."""

        def cast(value: Any) -> Any:
            return replace(value, dtype=dtype) if isinstance(value, Sized) and value.dtype is torch.float32 else value

        arguments = {name: (spec, tuple(map(cast, values))) for name, (spec, values) in self.arguments.items()}
        return replace(self, arguments=arguments)

    def values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The values of a call in the order in which the graph takes them.

        Raises:
            BuiltForError: where one is none that the graph was built for.
            TypeError: where the forward does not take the call.
        """
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values: list[Any] = []
        free: dict[str, int] = {}
        for name, value in bound.arguments.items():
            structure, built = self.arguments[name]
            leaves, own = tree_flatten(value)
            if own != structure:
                raise self._error(name, f"{structure}", f"{own}")
            for wanted, leaf in zip(built, leaves, strict=True):
                self._check(name, wanted, leaf, free)
            values += leaves
        return values

    def _check(self, name: str, wanted: Any, leaf: Any, free: dict[str, int]) -> None:
        if not isinstance(wanted, Sized):
            if isinstance(leaf, Tensor) or type(leaf) is not type(wanted) or leaf != wanted:
                raise self._error(name, _said(wanted), _said(leaf))
            return
        if not isinstance(leaf, Tensor) or leaf.dtype != wanted.dtype or leaf.ndim != len(wanted.sizes):
            raise self._error(name, str(wanted), _said(leaf))
        for size, own in zip(wanted.sizes, leaf.shape, strict=True):
            if isinstance(size, str):
                least, most = self.ranges[size]
                fits = least <= own <= most and free.setdefault(size, own) == own
            else:
                fits = size == own
            if not fits:
                raise self._error(name, str(wanted), _said(leaf))

    def _error(self, name: str, built: str, found: str) -> BuiltForError:
        return BuiltForError(
            f"{self.where} is the graph of one call, built for {name} = {built}, and was called with {found}: shrink "
            "with example inputs like these"
        )


def guard_of(
    where: str, call: inspect.BoundArguments, program: ExportedProgram, shapes: Sequence[Sequence[int] | None]
) -> CallGuard:
    """That of a program which was exported for a call. shapes: of the smaller model's tensors."""
    inputs = [s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    taken, small = iter(inputs), iter(shapes)
    ranges = {str(symbol): (int(r.lower), _most(r.upper)) for symbol, r in program.range_constraints.items()}
    arguments = {}
    for name, value in call.arguments.items():
        leaves, structure = tree_flatten(value)
        built = tuple(_built_for(leaf, next(small), nodes.get(next(taken)), ranges) for leaf in leaves)
        arguments[name] = (structure, built)
    return CallGuard(where, call.signature, arguments, ranges)


def _most(bound: Any) -> int:
    try:
        return int(bound)
    except (AttributeError, OverflowError, TypeError, ValueError):  # there is none
        return sys.maxsize


def _built_for(leaf: Any, shape: Sequence[int] | None, node: Any, ranges: Mapping[str, Any]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    shown = node.meta["val"].shape if node is not None else leaf.shape
    sizes = (str(n) if str(n) in ranges else int(own) for n, own in zip(shown, shape or leaf.shape, strict=True))
    return Sized(leaf.dtype, tuple(sizes))


def _said(value: Any) -> str:
    return str(Sized(value.dtype, tuple(value.shape))) if isinstance(value, Tensor) else repr(value)
