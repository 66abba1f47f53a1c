"""Which results of a graph are exactly zero, whatever the input, where some parameters are."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.fx import Node

from torch_flowprune.channels.rules import PRESERVING
from torch_flowprune.channels.tracing import handed_on, is_in_place, operator_name, sharing
from torch_flowprune.torch_internals import schema_of

IsZero = Callable[[Any], bool]
Operands = Mapping[str, Any]


def operands_of(node: Node) -> dict[str, Any]:
    """What an operator is called with, by the names of its schema."""
    schema = schema_of(node.target)
    if schema is None:
        return {}
    bound = {one.name: one.default_value for one in schema.arguments if one.has_default_value()}
    bound |= {one.name: value for one, value in zip(schema.arguments, node.args, strict=False)}
    return {**bound, **node.kwargs}


def zeros_among(nodes: Iterable[Node], zero: Iterable[Node]) -> set[Node]:
    """Those that are zero, where these are: of nodes in the order in which they run.

    What the parameters hold besides, and the input, has to be finite.
    """
    known = set(zero)

    def is_zero(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return bool(value) and all(map(is_zero, value))
        return handed_on(value) in known if isinstance(value, Node) else _is_number(value) and value == 0

    for node in nodes:
        if _vanishes(node, is_zero):
            known.add(node)
        elif is_in_place(node):  # what shares the memory is not zero any more
            known.difference_update(sharing(node))
    return known


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, complex)) and not isinstance(value, bool)


def _vanishes(node: Node, is_zero: IsZero) -> bool:
    if node.target is operator.getitem:
        return is_zero(node.args[0])
    name, operands = operator_name(node), operands_of(node)
    if name in ("zeros", "new_zeros", "zeros_like"):
        return True
    if (rule := _RULES.get(name)) is not None:
        return rule(operands, is_zero)
    return name in PRESERVING and bool(node.args) and is_zero(node.args[0])


def _all_parts(operands: Operands, is_zero: IsZero) -> bool:
    """Sums, and parts that are put together."""
    words = ("self", "other", "end", "tensors", "tensor1", "tensor2")
    return all(is_zero(operands[word]) for word in words if word in operands)


def _any_part(operands: Operands, is_zero: IsZero) -> bool:
    """Products."""
    words = ("self", "other", "mat2", "vec", "vec2", "tensor")
    parts = [operands[word] for word in words if word in operands] + list(operands.get("tensors", ()))
    return any(map(is_zero, parts))


def _shifted_product(operands: Operands, is_zero: IsZero) -> bool:
    words = ("mat1", "mat2", "batch1", "batch2", "tensor1", "tensor2")
    return is_zero(operands["self"]) and any(is_zero(operands[word]) for word in words if word in operands)


def _layer_gives_zero(operands: Operands, is_zero: IsZero) -> bool:
    """Of layers: what is multiplied and its shift."""
    return (is_zero(operands["input"]) or is_zero(operands["weight"])) and _is_without_shift(operands, is_zero)


def _normed(operands: Operands, is_zero: IsZero) -> bool:
    """Of norms over what they are given: zero stays zero but for the shift."""
    return _layer_gives_zero(operands, is_zero)


def _normed_by_statistics(operands: Operands, is_zero: IsZero) -> bool:
    """A running mean moves what was zero."""
    return is_zero(operands["weight"]) and _is_without_shift(operands, is_zero)


def _is_without_shift(operands: Operands, is_zero: IsZero) -> bool:
    bias = operands.get("bias")
    return bias is None or is_zero(bias)


def _picked(operands: Operands, is_zero: IsZero) -> bool:
    return is_zero(operands["self"]) and is_zero(operands["other"])


def _filled(operands: Operands, is_zero: IsZero) -> bool:
    return is_zero(operands["self"]) and is_zero(operands["value"])


def _padded_with_zeros(operands: Operands, is_zero: IsZero) -> bool:
    return is_zero(operands["self"]) and (operands.get("value") is None or is_zero(operands["value"]))


_ADDING = ("add", "sub", "rsub", "subtract", "cat", "concat", "stack", "maximum", "minimum", "fmax", "fmin", "lerp")
_PRODUCTS = ("mul", "multiply", "matmul", "mm", "bmm", "mv", "dot", "einsum", "outer")
_LAYERS = ("linear", *(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)))

_RULES: dict[str, Callable[[Operands, IsZero], bool]] = {
    **dict.fromkeys(_ADDING, _all_parts),
    **dict.fromkeys(_PRODUCTS, _any_part),
    **dict.fromkeys(_LAYERS, _layer_gives_zero),
    **dict.fromkeys(("layer_norm", "group_norm", "rms_norm"), _normed),
    **dict.fromkeys(("batch_norm", "instance_norm"), _normed_by_statistics),
    **dict.fromkeys(("addmm", "baddbmm", "addcmul"), _shifted_product),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded_with_zeros),
    "where": _picked,
    "masked_fill": _filled,
    "scaled_dot_product_attention": lambda operands, is_zero: is_zero(operands["value"]),
}
