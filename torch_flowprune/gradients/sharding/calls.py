"""A call of a module as one step of autograd, twice differentiable, which keeps of it only what went in.

Where a derivative is taken the parameters are gathered and the module runs again: whole weights and activations are
there for one module at a time. Three functions, each the derivative of the one before, which compute by autograd inside
what they return: the module, its gradient, and the derivative of that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from torch_flowprune.gradients.operators import check_twice, no_lost_graph
from torch_flowprune.gradients.sharding.holders import Holders
from torch_flowprune.gradients.sharding.surroundings import Surroundings
from torch_flowprune.torch_internals import differentiate, tree_flatten, tree_unflatten, version_of

_VALUES = (type(None), bool, int, float, complex, str, bytes, slice, range, Enum)
_SETTINGS = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class KeepsGraphError(Exception):
    """The call leaves part of its graph with others, or is given part of theirs: it cannot be made on its own."""


class _Made(NamedTuple):
    """A call that was made in a graph of its own: the leaves of that, and the results that depend on them."""

    leaves: list[Tensor]
    results: list[Tensor]


class UnitCall:
    """One call of a module, which can be made again.

    Args:
        holders: where its parameters stand.
        forward: what is called.
        surroundings: as they are before the call.
        share: see :meth:`~torch_flowprune.gradients.sharding.shards.Shard.returned`.
    """

    def __init__(
        self, holders: Holders, forward: Callable[..., Any], surroundings: Surroundings, share: float | None
    ) -> None:
        self.holders, self.forward, self.surroundings, self.share = holders, forward, surroundings, share
        self.shards = holders.shards

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the module returns.

        Raises:
            KeepsGraphError: where it cannot be run again on its own; nothing but buffers and randomness has changed.
        """
        values, self.given_as = _flat((args, dict(kwargs)))
        self.places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        self.constants = [None if isinstance(value, Tensor) else value for value in values]
        tensors = [values[place] for place in self.places]
        results = _Call.apply(self, *(shard.leaf for shard in self.shards), *tensors)
        found = iter(results)
        return tree_unflatten([next(found) if is_tensor else one for one, is_tensor in self.returned], self.returned_as)

    def first(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the result, without a graph; says which of them have a derivative."""
        leaves, inputs = self._leaves(operands, [operand.requires_grad for operand in operands])
        versions = [version_of(one) for one in inputs[len(self.shards) :]]
        with self.surroundings.around():
            result, given = self._run(inputs)
        unwritten = versions == [version_of(one) for one in inputs[len(self.shards) :]]
        values, self.returned_as = _flat(result)
        self.returned = [(None if isinstance(one, Tensor) else one, isinstance(one, Tensor)) for one in values]
        tensors = [one for one in values if isinstance(one, Tensor)]
        self.depends = [one.requires_grad for one in tensors]
        if not (unwritten and given and _leads_to_these(tensors, leaves)):
            raise KeepsGraphError
        own = [one.detach().clone() if any(one is other for other in inputs) else one.detach() for one in tensors]
        graph = [weakref.ref(one) for one in leaves]
        del result, values, tensors, inputs, leaves
        if any(one() is not None for one in graph):
            raise KeepsGraphError
        self.surroundings.keep_what_changed()
        return own

    def again(self, operands: Sequence[Tensor], wanted: Sequence[bool]) -> _Made:
        """The same call, with a graph."""
        leaves, inputs = self._leaves(operands, wanted)
        with self.surroundings.once_more():
            result, _ = self._run(inputs)
        tensors = [one for one in _flat(result)[0] if isinstance(one, Tensor)]
        return _Made(leaves, [one for one, depends in zip(tensors, self.depends, strict=True) if depends])

    def back(
        self,
        grads: Sequence[Tensor | None],
        operands: Sequence[Tensor],
        wanted: Sequence[bool],
        share: float | None = None,
    ) -> list[Any]:
        """Gradients of the leaves, one for each operand: of parameters the part of the sum over ranks."""
        found, returned = iter(grads), list[Any]()
        for place, (operand, want) in enumerate(zip(operands, wanted, strict=True)):
            grad = next(found) if want else None
            if want and place < len(self.shards):
                shard = self.shards[place]
                grad = shard.returned(grad, self.shapes[place], share)
            returned.append(torch.zeros_like(operand) if want and grad is None else grad)
        return returned

    def along(self, vectors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
        """Vectors of the leaves, from one for each operand: of parameters whole."""
        return [
            self.shards[place].gathered(vector) if place < len(self.shards) else vector
            for place, (vector, want) in enumerate(zip(vectors, wanted, strict=True))
            if want
        ]

    def _leaves(self, operands: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        """Of the operands that are wanted, and what the module gets in place of all of them: it may write to that."""
        count, leaves, inputs = len(self.shards), [], []
        for place, (operand, want) in enumerate(zip(operands, wanted, strict=True)):
            own = self.shards[place].gathered(operand) if place < count else operand.detach()
            leaf = own.detach().requires_grad_(want)
            with torch.enable_grad():
                inputs.append(leaf if place < count else leaf.clone())
            if want:
                leaves.append(leaf)
        self.shapes = [one.detach().new_empty(()).expand(one.shape) for one in inputs[:count]]
        return leaves, inputs

    def _run(self, inputs: Sequence[Tensor]) -> tuple[Any, bool]:
        """What the module returns, and whether the containers that it was given are as they were."""
        count, values = len(self.shards), list(self.constants)
        for place, value in zip(self.places, inputs[count:], strict=True):
            values[place] = value
        args, kwargs = tree_unflatten(values, self.given_as)
        with torch.enable_grad(), self.holders.filled(inputs[:count]):
            result = self.forward(*args, **kwargs)
        after, given_as = _flat((args, kwargs))
        same = len(after) == len(values) and all(one is other for one, other in zip(after, values, strict=True))
        return result, same and given_as == self.given_as


class _Call(Function):
    @staticmethod
    def forward(ctx: Any, call: UnitCall, *operands: Tensor) -> Any:
        ctx.call = call
        results = call.first(operands)
        ctx.save_for_backward(*operands)
        ctx.mark_non_differentiable(*(one for one, depends in zip(results, call.depends, strict=True) if not depends))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dy = [grad for grad, depends in zip(grads, ctx.call.depends, strict=True) if depends]
        return None, *_Gradient.apply(ctx.call, ctx.needs_input_grad[1:], len(dy), *dy, *ctx.saved_tensors)


class _Gradient(Function):
    @staticmethod
    def forward(ctx: Any, call: UnitCall, wanted: Sequence[bool], count: int, *tensors: Tensor) -> Any:
        ctx.call, ctx.wanted, ctx.count = call, wanted, count
        ctx.save_for_backward(*tensors)
        made = call.again(tensors[count:], wanted)
        grads = differentiate(made.results, made.leaves, tensors[:count])
        return tuple(call.back(grads, tensors[count:], wanted, call.share))

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> Any:
        call, wanted, count = ctx.call, ctx.wanted, ctx.count
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss takes gradients itself, so H·g is a third derivative, which modules under fully_shard do "
                "not support: use a measure that reads only g, or a model that is not sharded"
            )
        dy, operands = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        made = call.again(operands, wanted)
        dy = [one.detach().requires_grad_() for one in dy]
        with torch.enable_grad(), ExitStack() as watched:
            for result in made.results:
                watched.enter_context(no_lost_graph(result))
            first = differentiate(made.results, made.leaves, dy, create_graph=True)
        vectors = call.along(along, wanted)
        pairs = [(g, v) for g, v in zip(first, vectors, strict=True) if g is not None and g.requires_grad]
        leaves = [*dy, *made.leaves]
        check_twice([g for g, _ in pairs])
        second = differentiate([g for g, _ in pairs], leaves, [v for _, v in pairs]) if pairs else (None,) * len(leaves)
        return None, None, None, *second[:count], *call.back(second[count:], operands, wanted)


def _flat(values: Any) -> tuple[list[Any], Any]:
    """Tensors and plain values in nested containers.

    Raises:
        KeepsGraphError: for objects that may hold tensors, or be written to.
    """
    leaves, spec = tree_flatten(values, is_leaf=lambda value: not isinstance(value, (tuple, list, dict)))
    if any(not isinstance(one, (Tensor, *_VALUES, *_SETTINGS)) for one in leaves):
        raise KeepsGraphError
    return leaves, spec


def _leads_to_these(results: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether the graph of the results ends at these leaves, and nowhere else."""
    return leaves_of(*results) <= {id(leaf) for leaf in leaves}


def leaves_of(*results: Tensor) -> set[int]:
    """The leaves of a graph, by ``id``."""
    found, seen = set[int](), set[Any]()
    todo: list[Any] = [result.grad_fn for result in results]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(following for following, _ in node.next_functions)
    return found
