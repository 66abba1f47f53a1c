"""The numbers that operators are told: which of them state sizes, and what these become where positions go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from torch_flowprune.channels.tracing import Reading, Value, operator_name
from torch_flowprune.torch_internals import schema_of


def resize(new: Node, node: Node, reading: Reading, dead: Tensor) -> None:
    """Rewrite the numbers that a node was given: each argument in ``RESIZERS`` by its schema's name."""
    resizers = RESIZERS.get(operator_name(node), {})
    schema = schema_of(node.target)
    if not resizers or schema is None:
        return
    for i, argument in enumerate(schema.arguments):
        resizer = resizers.get(argument.name)
        if resizer is None:
            continue
        if argument.name in new.kwargs:
            new.update_kwarg(argument.name, resizer(node, new.kwargs[argument.name], reading, dead))
        elif i < len(new.args):
            new.update_arg(i, resizer(node, new.args[i], reading, dead))


def resized_arguments(node: Node, reading: Reading, dead: Tensor) -> list[tuple[list[int], list[int]]]:
    """The whole numbers of each argument that states sizes, before and after."""
    pairs = []
    schema = schema_of(node.target)
    for name, resizer in RESIZERS.get(operator_name(node), {}).items():
        if schema is None or not any(argument.name == name for argument in schema.arguments):
            continue
        old = _argument(node, name, None)
        new = resizer(node, old, reading, dead) if old is not None else None
        before, after = flat_numbers(old), flat_numbers(new)
        if before and len(before) == len(after):
            pairs.append((before, after))
    return pairs


def flat_numbers(value: Any) -> list[int]:
    """A whole number, or those in a list."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in flat_numbers(item)]
    return [value] if type(value) is int else []


def set_argument(node: Node, name: str, value: Any) -> None:
    """Tell an operator something else, by the name that its schema has for it."""
    for i, argument in enumerate(schema_of(node.target).arguments):
        if argument.name == name and i < len(node.args):
            node.update_arg(i, value)
        elif argument.name == name:
            node.update_kwarg(name, value)


def _count_alive(labels: Tensor, dead: Tensor) -> int:
    return int((~dead[labels]).sum())


def _value_of(node: Node, reading: Reading) -> Value:
    value = reading.values[node]
    assert isinstance(value, Value)
    return value


def _new_shape(node: Node, sizes: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    """Sizes of the result; what does not change (-1, or a size that is free) stays as it is written."""
    dims = _value_of(node, reading).dims
    return [_new_size(n, d, dead) for n, d in zip(sizes, dims[len(dims) - len(sizes) :], strict=True)]


def _new_size(size: Any, labels: Tensor, dead: Tensor) -> Any:
    alive = _count_alive(labels, dead)
    return size if size == -1 or alive == len(labels) else alive


def _new_factors(node: Node, sizes: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    dims = _value_of(node, reading).dims
    dim = int(_argument(node, "dim", 0)) % (len(dims) - len(sizes) + 1)
    return [_new_size(n, d, dead) for n, d in zip(sizes, dims[dim : dim + len(sizes)], strict=True)]


def _new_repeats(node: Node, repeats: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    source, dims = _value_of(node.args[0], reading), _value_of(node, reading).dims  # type: ignore[arg-type]
    shape = [1] * (len(dims) - source.ndim) + list(source.shape)
    return [_new_size(r, d, dead) if n == 1 else r for r, n, d in zip(repeats, shape, dims, strict=True)]


def _new_split(node: Node, split_size: Any, reading: Reading, dead: Tensor) -> Any:
    if not isinstance(split_size, int):
        return _new_splits(node, split_size, reading, dead)
    dim = _argument(node, "dim", 0)
    return _new_size(split_size, reading.values[node][0].dims[dim], dead)


def _new_splits(node: Node, split_sizes: Sequence[int], reading: Reading, dead: Tensor) -> list[int]:
    dim = _argument(node, "dim", 0)
    return [_new_size(n, v.dims[dim], dead) for n, v in zip(split_sizes, reading.values[node], strict=True)]


def _new_bound(node: Node, bound: int | None, reading: Reading, dead: Tensor) -> int | None:
    """A start or end of a slice: how many positions before it are left."""
    if not isinstance(bound, int):
        return bound
    labels = _value_of(node.args[0], reading).dims[_argument(node, "dim", 0)]  # type: ignore[arg-type]
    if bound < 0:
        return -_count_alive(labels[bound:], dead)
    return bound if bound >= len(labels) else _count_alive(labels[:bound], dead)


def _new_count(name: str) -> Callable[[Node, int, Reading, Tensor], int]:
    def resizer(node: Node, count: int, reading: Reading, dead: Tensor) -> int:
        labels = reading.counts.get((node, name))
        return count if labels is None else _count_alive(labels, dead)

    return resizer


def _argument(node: Node, name: str, default: Any) -> Any:
    for i, a in enumerate(schema_of(node.target).arguments):
        if a.name == name:
            return node.kwargs.get(name, node.args[i] if i < len(node.args) else default)
    return default


Resizer = Callable[[Node, Any, Reading, Tensor], Any]
# the operators whose calls state sizes: which of their arguments, and what becomes of each
RESIZERS: dict[str, dict[str, Resizer]] = {
    **{name: {"size": _new_shape} for name in ("view", "_unsafe_view", "expand", "zeros", "ones", "full", "empty")},
    **{name: {"size": _new_shape} for name in ("new_zeros", "new_ones", "new_full", "new_empty")},
    **{f"{name}{n}d": {"groups": _new_count("groups")} for name in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "reshape": {"shape": _new_shape},
    "unflatten": {"sizes": _new_factors},
    "repeat": {"repeats": _new_repeats},
    "tile": {"dims": _new_repeats},
    "split": {"split_size": _new_split},
    "split_with_sizes": {"split_sizes": _new_splits},
    "slice": {"start": _new_bound, "end": _new_bound},
    "narrow": {"start": _new_bound},
    "group_norm": {"num_groups": _new_count("num_groups")},
}
