"""A shrunk model that its class can be built as says so in its config, and is what the class makes of it.

Whoever builds the class from that config and loads the weights then has this model, without this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels.construction import (
    Constructor,
    Numbers,
    constructor_of,
    fitted_numbers_of,
    is_uniform,
    shapes_of,
)
from torch_flowprune.channels.shrinking.own_code import PlainForm, edits_of, plain_forms
from torch_flowprune.channels.shrinking.written import paths_of_written
from torch_flowprune.inputs import tree_leaves
from torch_flowprune.masking import dense_copy

_ALIKE_WITHIN = 1e-4
_HALF_WITHIN = 2e-2
_DRAWS = 4
_SIZES = (1.5, 0.03, 1e-3)
"""Of outputs, for inputs of size one."""


def is_as_built(model: nn.Module) -> bool:
    """Whether a model that carries a config has the sizes, and the classes, of one newly built from it."""
    constructor = constructor_of(model)
    if constructor is None or paths_of_written(model) or any(edits_of(type(one)) for one in model.modules()):
        return False
    return constructor.shapes({}) == shapes_of(model)


def state_sizes(small: nn.Module, args: Any, kwargs: Mapping[str, Any], *, rescale: bool = True) -> None:
    """Change a shrunk model's config so that its class makes the model of it, where it can; else nothing is changed.

    Args:
        small: changed in place.
        args, kwargs: what the model is called with.
        rescale: whether norms that divide by a dense width may become plain ones with other weights.
    """
    constructor = constructor_of(small)
    if constructor is None or paths_of_written(small):
        return
    dense, shapes = constructor.shapes({}), shapes_of(small)
    if dense is None or dense == shapes or dense.keys() != shapes.keys() or not is_uniform(small, dense, shapes):
        return
    plain = plain_forms(dense_copy(small)[0])
    if plain is None or (not rescale and any(one.weight is not None for one in plain)):
        return
    for numbers in _with_epsilon(constructor, fitted_numbers_of(constructor).fits(shapes), plain):
        with suppress(Exception):  # whatever the class says against being run with these numbers
            if _computes_the_same(small, constructor, numbers, args, kwargs):
                _as_built(small, constructor, numbers, plain)
                return


def _with_epsilon(constructor: Constructor, found: Iterator[Numbers], plain: list[PlainForm]) -> Iterator[Numbers]:
    """With what the config says of the norms' epsilon."""
    changed = {one.epsilon[1:] for one in plain if one.epsilon}
    if len(changed) > 1:
        return
    for numbers in found:
        yield {
            **numbers,
            **{
                name: new
                for old, new in changed
                for name, value in constructor.numbers.items()
                if type(value) is float and value == old
            },
        }


def _computes_the_same(
    small: nn.Module, constructor: Constructor, numbers: Numbers, args: Any, kwargs: Mapping[str, Any]
) -> bool:
    """Whether a new model computes the same, whatever the weights.

    With drawn ones, of which attention is not flat; some layers' outputs are so small that an epsilon tells.
    """
    return all(_agree(small, constructor, numbers, args, kwargs, seed) for seed in range(_DRAWS))


@torch.no_grad()
def _agree(
    small: nn.Module, constructor: Constructor, numbers: Numbers, args: Any, kwargs: Mapping[str, Any], seed: int
) -> bool:
    """With the weights of one draw."""
    own = dense_copy(small)[0].eval()
    _draw(own, seed)
    expected = _numbers_out(own, args, kwargs)
    for one in plain_forms(own) or ():
        one.put_on(own)
    first = next(own.parameters())
    new = constructor.build(numbers, first.device).to(first.dtype).eval()
    new.load_state_dict(own.state_dict())
    got = _numbers_out(new, args, kwargs)
    return bool(expected) and len(expected) == len(got) and all(map(_within_rounding, expected, got))


def _draw(model: nn.Module, seed: int) -> None:
    """Weights anew, after the first draw each tensor's of a size of its own; what shifts and scales, a little off."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        size = _SIZES[int(torch.randint(len(_SIZES), (), generator=generator)) if seed else 0]
        if parameter.ndim > 1:
            parameter.copy_(drawn * size * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(drawn * 0.3 * min(size, 1.0))


def _numbers_out(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    leaves = tree_leaves(model(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _within_rounding(one: Tensor, other: Tensor) -> bool:
    within = _HALF_WITHIN if one.dtype in (torch.float16, torch.bfloat16) else _ALIKE_WITHIN
    return one.shape == other.shape and bool((one - other).abs().max() <= within * one.abs().max())


def _as_built(small: nn.Module, constructor: Constructor, numbers: Numbers, plain: list[PlainForm]) -> None:
    """Classes, norms, configs and sizes that modules state, as in a new model."""
    for one in plain:
        one.put_on(small)
    built = constructor.build(numbers)
    for path, new in built.named_modules():
        module = small.get_submodule(path)
        for name, value in vars(new).items():
            old = vars(module).get(name)
            if (callable(getattr(value, "to_dict", None)) and type(old) is type(value)) or _is_another_size(old, value):
                vars(module)[name] = value


def _is_another_size(old: Any, value: Any) -> bool:
    numbers = type(value) in (int, float) or (isinstance(value, tuple) and all(type(one) is int for one in value))
    return numbers and type(old) is type(value) and old != value
