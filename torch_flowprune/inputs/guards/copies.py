"""A copy of a model that is a model of its own, whatever it kept of earlier forwards, however these are patched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from torch_flowprune.inputs.shards import is_fully_sharded

_DEEPEST = 4  # containers in objects in containers: activations are not kept deeper


def copied_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """As ``copy.deepcopy``, which takes no tensor that a graph leads to, and leaves a closure with the old modules.

    Args:
        model: any; hooks, caches and patched forwards go along.
        memo: what is not to be copied, as ``copy.deepcopy`` takes it.

    Raises:
        ValueError: for a model that ``fully_shard`` has wrapped, which torch does not copy.
    """
    if any(map(is_fully_sharded, model.modules())):
        raise ValueError(
            "this works on a copy of the model, and torch cannot copy one under fully_shard: load its full state dict "
            "into a model that is not sharded (fp.load_state_dict), and pass that"
        )
    memo = {} if memo is None else memo
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) in (dict, OrderedDict) and not value:
                memo[id(value)] = type(value)()  # a module holds a dozen for hooks, and each is slow to copy deeply
            elif name not in ("_parameters", "_modules"):
                for tensor in tensors_kept(value):
                    if not tensor.is_leaf and id(tensor) not in memo:
                        memo[id(tensor)] = tensor.detach().clone()
    new = copy.deepcopy(model, memo)
    _take_modes(new, model)
    held = [place for module in new.modules() for place in _functions_of(module)]
    if held:
        others = dict(zip(map(id, model.modules()), new.modules(), strict=False))
        for values, name, function in held:
            values[name] = _rebound(function, others)
    return new


def _take_modes(new: nn.Module, model: nn.Module) -> None:
    """A graph of torch.fx that has another one for training loses its mode in a copy."""
    for module, old in zip(new.modules(), model.modules(), strict=False):
        module.training = old.training


def _functions_of(module: nn.Module) -> Iterator[tuple[dict[Any, Any], Any, FunctionType]]:
    """Those that a module holds, as a forward of its own or as hooks, with where it holds them."""
    registries = [value for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)]
    for values in (vars(module), *registries):
        yield from ((values, name, value) for name, value in list(values.items()) if isinstance(value, FunctionType))


def tensors_kept(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in a value: in containers and in attributes of objects, not those of modules."""
    if isinstance(value, Tensor):
        yield value
    elif depth < _DEEPEST and not isinstance(value, (nn.Module, type, FunctionType, MethodType)):
        held = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple, set)) else ()
        for item in (*held, *getattr(value, "__dict__", {}).values()):
            yield from tensors_kept(item, depth + 1)


def _rebound(value: Any, others: Mapping[int, nn.Module], depth: int = 0) -> Any:
    """A function whose closure has the copies where it had modules or their methods; all else as it is."""
    if isinstance(value, nn.Module):
        return others.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in others:
        return MethodType(value.__func__, others[id(value.__self__)])
    if not isinstance(value, FunctionType) or not value.__closure__ or depth == _DEEPEST:
        return value
    held = [_content(cell) for cell in value.__closure__]
    new = [_rebound(one, others, depth + 1) for one in held]
    if all(one is other for one, other in zip(held, new, strict=True)):
        return value
    made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, _cells(value, held, new))
    made.__kwdefaults__ = value.__kwdefaults__
    made.__dict__.update({name: _rebound(one, others, depth + 1) for name, one in vars(value).items()})
    return made


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put in it yet
        return cell


def _cells(function: FunctionType, held: list[Any], new: list[Any]) -> tuple[CellType, ...]:
    """What did not change is shared with the old function: counters and lists that it writes to are the user's."""
    cells = zip(function.__closure__ or (), held, new, strict=True)
    return tuple(cell if one is other else CellType(other) for cell, one, other in cells)
