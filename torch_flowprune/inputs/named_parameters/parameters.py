"""Which parameters a model has, under the names users know, pruned or not; and which of them may be pruned."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from torch_flowprune.inputs.callers import users_level
from torch_flowprune.inputs.named_parameters.names import mask_of, plain_name
from torch_flowprune.inputs.named_parameters.patterns import Pattern, each, matching, names_module, of_pairs
from torch_flowprune.inputs.named_parameters.target import DEFAULT_KINDS, Pair, Target, default_weights
from torch_flowprune.inputs.named_parameters.uncovered import warn_uncovered
from torch_flowprune.inputs.named_parameters.unprunable import computed
from torch_flowprune.inputs.named_parameters.zeros import flags
from torch_flowprune.inputs.shards import alike, is_sharded, local, register_shards
from torch_flowprune.torch_internals import inside_compiled


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and data-parallel wrappers.

    They do not differentiate twice, and prefix every name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper runs; None for what is no wrapper."""
    data_parallel = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = module.module if data_parallel else inside_compiled(module)
    return inner if isinstance(inner, nn.Module) else None


def with_names_of_state(model: nn.Module) -> nn.Module:
    """The module inside all wrappers, and inside one that hands out its state dict: their names are the same."""
    while (inner := _inside(model) or _named_by(model)) is not None:
        model = inner
    return model


def _named_by(module: nn.Module) -> nn.Module | None:
    """The one module that another holds and nothing else, where its state dict has that one's names, as Fabric's."""
    kind, held = type(module), {id(child): child for child in module._modules.values()}
    has_own = kind.state_dict is not nn.Module.state_dict and kind.load_state_dict is not nn.Module.load_state_dict
    return next(iter(held.values())) if has_own and len(held) == 1 and not module._parameters else None


def wide(value: Tensor) -> Tensor:
    """Half-precision values in float32, where products such as θ·g do not underflow; the others as they are."""
    return value.to(wide_type(value))


def wide_type(value: Tensor) -> torch.dtype:
    """The dtype of :func:`wide`."""
    return torch.float32 if value.dtype.itemsize < 4 else value.dtype


def parameters_of(model: nn.Module) -> dict[str, Target]:
    """Every parameter of the model once, by its name in the unpruned model, in model order."""
    targets: dict[int, Target] = {}
    for path, plain, module, in_adapter in _modules(model):
        register_shards(module)
        adapters = _adapters(module) if module._parameters and not in_adapter else ()
        for key, parameter in module._parameters.items():
            if parameter is not None:
                target = _target(path, plain, module, key, parameter, in_adapter=in_adapter or key in adapters)
                known = targets.get(id(parameter))
                targets[id(parameter)] = _tied(known, target) if known else target
    return {target.name: target for target in targets.values()}


def _modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, bool]]:
    """Every module under each of its paths, the path without the names of wrappers on the way, and if it is added."""
    todo: list[tuple[str, str, nn.Module, bool, tuple[int, ...]]] = [("", "", model, False, ())]
    while todo:
        path, plain, module, in_adapter, above = todo.pop()
        yield path, plain, module, in_adapter
        if not module._modules:
            continue
        inner, adapters, above = _inside(module) or _named_by(module), _adapters(module), (*above, id(module))
        for name, child in reversed(module._modules.items()):
            if child is not None and id(child) not in above:
                plainly = plain if child is inner else _join(plain, name)
                todo.append((_join(path, name), plainly, child, in_adapter or name in adapters, above))


def _adapters(module: nn.Module) -> Sequence[str]:
    """The names of what a layer with an adapter says is of the adapter, as those of peft do."""
    listed = getattr(type(module), "adapter_layer_names", ())
    return listed if isinstance(listed, (tuple, list)) else ()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _target(path: str, plain: str, module: nn.Module, key: str, parameter: nn.Parameter, *, in_adapter: bool) -> Target:
    name = plain_name(key, module._buffers)
    mask = _mask_on_shard(module, key, parameter) if name == key else module._buffers[mask_of(name)]
    attribute = key if mask is None else name
    aliases = () if plain == path else (_join(plain, attribute),)
    return Target(_join(path, attribute), ((module, attribute),), parameter, mask, aliases, in_adapter)


def _mask_on_shard(module: nn.Module, name: str, parameter: Tensor) -> Tensor | None:
    """The mask beside a sharded parameter, which keeps its name."""
    mask = module._buffers.get(mask_of(name)) if is_sharded(parameter) else None
    return mask if is_sharded(mask) else None


def _tied(first: Target, other: Target) -> Target:
    """One parameter held by the owners of both.

    Any owner's mask holds: ours are one tensor, and where torch's differ, what either removed counts as removed.
    """
    mask = other.mask if first.mask is None else first.mask
    if first.mask is not None and other.mask is not None and first.mask is not other.mask:
        mask = alike(local(flags(first.mask)) & local(flags(other.mask)), first.mask)
    owners = dict.fromkeys([*first.owners, *other.owners])  # a module that is held twice is one owner
    aliases = dict.fromkeys([*first.aliases, *other.names])
    return replace(first, owners=tuple(owners), mask=mask, aliases=tuple(aliases))


def prunable(
    model: nn.Module,
    parameters: Iterable[Pair] | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    known: Mapping[str, Target] | None = None,
) -> list[Target]:
    """The parameters to prune, each once, in model order.

    Args:
        parameters: ``(module, name)`` pairs, as ``torch.nn.utils.prune`` takes them; exactly these.
        include: globs of parameter or module names, module types, or modules of the model. A glob, or a module with
            everything in it, selects from the weights that are pruned by default (of linear, bilinear, recurrent and
            attention layers and convolutions). If it matches none of these, it selects from all parameters. A type
            selects the weights of its modules.
        exclude: the same kinds of patterns, for parameters to leave out.
        known: the model's parameters and what else these are called; with the factors of weights that layers compute,
            these are picked in place of the weights.

    Raises:
        ValueError: for a pattern that matches nothing, a pair that is not of this model, or when nothing is left.
        TypeError: for entries of another kind.
    """
    targets = list((parameters_of(model) if known is None else known).values())
    if parameters is not None:
        if include is not None:
            raise ValueError("give parameters= or include=, not both: parameters= names exactly what to prune")
        chosen = of_pairs(targets, parameters)
    elif include is not None:
        chosen = matching(targets, include, "include")
        if known is None:
            _warn_computed(model, each(include))
    else:
        chosen = [target for target in targets if target.is_default]
        if known is None:
            _warn_computed(model)
        warn_uncovered(targets)
    if exclude is not None:
        gone = {id(target) for target in matching(targets, exclude, "exclude", default_first=False)}
        chosen = [target for target in chosen if id(target) not in gone]
    if not chosen:
        raise ValueError(_nothing_left(targets))
    return chosen


def _nothing_left(targets: list[Target]) -> str:
    known = ", ".join(target.name for target in targets[:5]) or "none at all"
    kinds = ", ".join(kind.__name__ for kind in DEFAULT_KINDS)
    return (
        f"nothing to prune: by default the weights of {kinds} are; this model's parameters are {known}; pick with "
        "include="
    )


def _warn_computed(model: nn.Module, patterns: Sequence[Pattern] = ("*",)) -> None:
    """A layer that looks like the others, but has no weight to put a mask on."""
    for path, module in model.named_modules():
        for name in default_weights(module):
            reason = computed(module, name)
            if reason and any(names_module(pattern, path, module) for pattern in patterns):
                text = f"{path}.{name} is {reason}; it stays dense".lstrip(".")
                warnings.warn(text, UserWarning, stacklevel=users_level())
