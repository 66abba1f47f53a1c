"""Rules for operators that work position by position, and for those that make tensors of nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch_flowprune.channels.rules.views import broadcast, replaced
from torch_flowprune.channels.tracing import Value, Walk, concrete


def _all_zero(held: list[bool | None]) -> bool:
    return all(held)


def _any_zero(held: list[bool | None]) -> bool:
    return any(bool(z) for z in held)


def _never_zero(held: list[bool | None]) -> bool:
    return False


def added(g: Walk, values: Sequence[Any]) -> Value:
    return broadcast(g, values, _all_zero)


def add(g: Walk, x: Any, other: Any) -> Value:
    return added(g, [x, other])


def multiply(g: Walk, x: Any, other: Any) -> Value:
    return broadcast(g, [x, other], _any_zero)


def divide(g: Walk, x: Any, other: Any) -> Value:
    if isinstance(other, Value):
        _no_singularity(g, other)
    return broadcast(g, [x, other], _first_zero)


def sign_copied(g: Walk, x: Any, other: Any) -> Value:
    return broadcast(g, [x, other], _first_zero)


def step_functions(g: Walk, x: Value, values: Value) -> Value:
    return broadcast(g, [x, values], _never_zero)


def hypotenuse(g: Walk, x: Value, other: Value) -> Value:
    return singular(g, added(g, [x, other]))


def quotient_added(g: Walk, x: Value, tensor1: Value, tensor2: Value) -> Value:
    _no_singularity(g, tensor2)
    return broadcast(g, [x, tensor1, tensor2], lambda held: bool(held[0] and held[1]))


def _first_zero(held: list[bool | None]) -> bool:
    return bool(held[0])


def compared(g: Walk, x: Any, other: Any) -> Value:
    return broadcast(g, [x, other], _never_zero)


def keeps(g: Walk, x: Value) -> Value:
    """A function with f(0) = 0."""
    return x


def moves(g: Walk, x: Value) -> Value:
    """A function with f(0) != 0, finite and smooth at 0."""
    return x.without_zero()


def singular(g: Walk, x: Value) -> Value:
    """A function that has no finite value or slope at 0."""
    _no_singularity(g, x)
    return x.without_zero()


def _no_singularity(g: Walk, x: Value) -> None:
    for labels, zero in zip(x.dims, x.zero, strict=True):
        if zero:
            g.freeze(labels, "is zero, when masked, where the operator is not finite")


def clamp(g: Walk, x: Value, min: Any = None, max: Any = None) -> Value:
    if isinstance(min, Value) or isinstance(max, Value):
        return broadcast(g, [x, *(v for v in (min, max) if isinstance(v, Value))], _never_zero)
    inside = (min is None or min <= 0) and (max is None or max >= 0)
    return x if inside else x.without_zero()


def hardtanh(g: Walk, x: Value, min_val: float = -1.0, max_val: float = 1.0) -> Value:
    return clamp(g, x, min_val, max_val)


def threshold(g: Walk, x: Value, threshold: float, value: float) -> Value:
    return x if threshold < 0 or value == 0 else x.without_zero()


def power(g: Walk, x: Any, exponent: Any) -> Any:
    if isinstance(x, Value) and isinstance(exponent, (int, float)):
        return x if exponent >= 1 else singular(g, x)
    return compared(g, x, exponent)


def prelu(g: Walk, x: Value, weight: Value) -> Value:
    if weight.shape != (1,):
        g.join(x.dims[1], weight.dims[0])
    return x


def where(g: Walk, condition: Value, self: Any, other: Any) -> Value:
    return broadcast(g, [condition, self, other], lambda held: bool(held[1] and held[2]))


def masked_fill(g: Walk, x: Value, mask: Value, value: Any) -> Value:
    out = broadcast(g, [x, mask], _first_zero)
    return out if isinstance(value, (int, float)) and value == 0 else out.without_zero()


def addcmul(g: Walk, x: Value, tensor1: Value, tensor2: Value) -> Value:
    return broadcast(g, [x, tensor1, tensor2], lambda held: bool(held[0] and (held[1] or held[2])))


def lerp(g: Walk, x: Value, end: Value, weight: Any) -> Value:
    return broadcast(g, [x, end, weight], lambda held: bool(held[0] and held[1]))


def glu(g: Walk, x: Value, dim: int = -1) -> Value:
    a, b = x.dims[dim].chunk(2)
    g.join(a, b)
    return replaced(x, dim, a)


def copy(g: Walk, x: Value, src: Value) -> Value:
    return broadcast(g, [x, src], lambda held: bool(held[-1]))


def positions(g: Walk) -> Value:
    return g.fixed(g.out_shape)


def one_hot(g: Walk, x: Value) -> Value:
    for labels in x.dims:
        g.freeze(labels, "is used as an index")
    return g.fixed(g.out_shape)


def several_positions(g: Walk, x: Sequence[Value]) -> list[Value]:
    assert g.node is not None
    for v in x:
        for labels in v.dims:
            g.freeze(labels, "is a grid of positions")
    return [g.fixed(concrete(v.shape)) for v in g.node.meta["val"]]


def filled(zero: bool) -> Callable[..., Value]:
    def rule(g: Walk) -> Value:
        return g.uniform(g.out_shape, zero)

    return rule


def filled_like(zero: bool) -> Callable[..., Value]:
    def rule(g: Walk, x: Value) -> Value:
        return x.with_zero(zero)

    return rule


def fill(g: Walk, x: Value, value: Any) -> Value:
    return x.with_zero(isinstance(value, (int, float)) and value == 0)


def nothing(g: Walk) -> None:
    return None
