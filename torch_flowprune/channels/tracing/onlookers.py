"""Hooks that look at a model's values and change none: a model is read and proved without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_flowprune.channels.tracing.exported_program import twin
from torch_flowprune.inputs import copied_model, same_randomness, settle, tree_leaves
from torch_flowprune.torch_internals import tree_map_only, version_of

Hook = Callable[..., Any]


def without_onlookers(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    """A twin of the model without the hooks on its modules' forwards that only look on; the model where none does.

    A hook looks on where it gives nothing back, writes to none of the tensors that it is given and puts nothing on its
    module; and the model has to give the same without all of these, bit for bit. They run once, to see that.
    """
    if not any(held for held in _hooks_of(model)):
        return model
    watched, without = copied_model(model), twin(model)  # a hook may write to parameters
    acting: set[tuple[int, int]] = set()
    for at, held in enumerate(_hooks_of(watched)):
        held.update({key: partial(_watched, hook, partial(acting.add, (at, key))) for key, hook in held.items()})
    expected = _outputs(watched, args, kwargs)
    dropped = 0
    for at, held in enumerate(_hooks_of(without)):
        for key in [key for key in held if (at, key) not in acting]:
            del held[key]
            dropped += 1
    if expected is None or not dropped:
        return model
    found = _outputs(without, args, kwargs)
    return without if found is not None and _same_bits(expected, found) else model


def _hooks_of(model: nn.Module) -> Iterator[MutableMapping[int, Hook]]:
    """Of each module those before a forward and those after it."""
    for module in model.modules():
        yield from (module._forward_pre_hooks, module._forward_hooks)


def _watched(hook: Hook, acts: Callable[[], None], module: nn.Module, *given: Any) -> Any:
    before = _state(module, given)
    result = hook(module, *given)
    if result is not None or _state(module, given) != before:
        acts()
    return result


def _state(module: nn.Module, given: Any) -> list[Any]:
    """Which values a module has, and how often they and what a hook is given were written to."""
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False), *tree_leaves(given)]
    tensors = [version_of(tensor) for tensor in held if isinstance(tensor, Tensor)]
    return [*tensors, *((name, id(value)) for name, value in vars(module).items())]


def _outputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
    """None where the model does not run."""
    settle(model, "eval")
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    try:
        with same_randomness(model), torch.no_grad():
            return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
    except Exception:  # noqa: BLE001 - whatever the model or a hook raises: it is read as it is, and told by that
        return None


def _same_bits(expected: list[Tensor], found: list[Tensor]) -> bool:
    alike = len(expected) == len(found)
    return alike and all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
