"""Parameters picked as users name them: ``(module, name)`` pairs, globs of names, module types, modules."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from torch_flowprune.inputs.named_parameters.aliases import forms
from torch_flowprune.inputs.named_parameters.target import Pair, Target
from torch_flowprune.inputs.named_parameters.unprunable import computed_weights, no_such_parameter

Pattern: TypeAlias = str | type[nn.Module] | nn.Module


def of_pairs(targets: list[Target], pairs: Iterable[Pair]) -> list[Target]:
    """Exactly the parameters that these pairs name, in model order."""
    by_owner: dict[tuple[int, str], list[str]] = {}
    for target in targets:
        for module, attribute in target.owners:
            by_owner.setdefault((id(module), attribute), []).append(target.name)
    chosen: set[str] = set()
    for pair in pairs:
        if _key(pair) not in by_owner:
            raise ValueError(no_such_parameter(pair))
        chosen.update(by_owner[_key(pair)])
    if not chosen:
        raise ValueError(
            "parameters= is empty: expected (module, name) pairs such as (model.fc, 'weight'), or leave it out"
        )
    return [target for target in targets if target.name in chosen]


def _key(pair: object) -> tuple[int, str]:
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], nn.Module) and isinstance(pair[1], str)):
        kind = "a tensor" if isinstance(pair, Tensor) else repr(pair)
        raise TypeError(
            f"parameters= takes (module, name) pairs such as (model.fc, 'weight'), got {kind}; to prune all of a "
            "model leave it out"
        )
    return id(pair[0]), pair[1]


def matching(
    targets: list[Target], patterns: Pattern | Sequence[Pattern], argument: str, default_first: bool = True
) -> list[Target]:
    """The parameters that any of the patterns names, in model order.

    With ``default_first`` a glob or a module that names some of the weights pruned by default names only those, and a
    layer whose weight is computed from other parameters is not named by them.
    """
    chosen: set[str] = set()
    for pattern in each(patterns):
        named = _reader(pattern, argument)
        matches = [target for target in targets if named(target)]
        if not matches:
            raise ValueError(_no_match(targets, pattern, argument))
        if default_first:
            matches = _without_computed(matches, pattern, argument)
        preferred = [] if isinstance(pattern, type) or not default_first else [one for one in matches if one.is_default]
        chosen.update(target.name for target in preferred or matches)
    return [target for target in targets if target.name in chosen]


def each(patterns: Pattern | Sequence[Pattern]) -> list[Pattern]:
    """One pattern, or several, as a list."""
    kinds = (str, type, nn.Module, Tensor)  # a Sequential can be walked through, and is one
    one = isinstance(patterns, kinds) or not isinstance(patterns, Iterable)
    return [patterns] if one else list(patterns)  # type: ignore[list-item, arg-type]


def holds_modules(patterns: Pattern | Sequence[Pattern] | None) -> bool:
    """Whether some pattern is a module itself, which names nothing in a copy of the model."""
    return any(isinstance(pattern, nn.Module) for pattern in each(patterns or ()))


def names_module(pattern: Pattern, path: str, module: nn.Module) -> bool:
    """Whether a pattern picks a layer by itself, its name, its type, or the name of its weight."""
    if isinstance(pattern, nn.Module):
        return any(part is module for part in pattern.modules())
    if isinstance(pattern, str):
        return any(fnmatchcase(name, form) for form in forms(pattern) for name in (path, f"{path}.weight"))
    return isinstance(pattern, type) and isinstance(module, pattern)


def _without_computed(matches: list[Target], pattern: Pattern, argument: str) -> list[Target]:
    """Without what stands beside a computed weight: a bias, or a factor of the weight, that was not named itself."""
    meant = [one for one in matches if one.is_default or _is_named(one, pattern) or not _of_computed(one)]
    if not meant:
        reason = ", ".join(_of_computed(matches[0]))
        raise ValueError(f"{argument}={pattern!r} picks no weight: {reason}; or name a parameter in full")
    return meant


def _is_named(target: Target, pattern: Pattern) -> bool:
    """Whether the end of a glob is a parameter's own name: ``"*.bias"``."""
    return isinstance(pattern, str) and any(attribute == pattern.rpartition(".")[2] for _, attribute in target.owners)


def _of_computed(target: Target) -> list[str]:
    """Why the weight beside this parameter, or made from it, cannot be pruned; empty where it can."""
    return [reason for module, _ in target.owners for reason in computed_weights(module)]


def _reader(pattern: object, argument: str) -> Callable[[Target], bool]:
    """What says of a parameter whether a pattern names it."""
    if isinstance(pattern, str):
        return lambda target: any(fnmatchcase(name, form) for form in forms(pattern) for name in _names(target))
    if isinstance(pattern, type) and issubclass(pattern, nn.Module):
        return lambda target: any(isinstance(owner, pattern) and "weight" in name for owner, name in target.owners)
    if isinstance(pattern, nn.Module):
        parts = {id(part) for part in pattern.modules()}
        return lambda target: any(id(owner) in parts for owner, _ in target.owners)
    kind = "a tensor" if isinstance(pattern, Tensor) else repr(pattern)
    raise TypeError(f"{argument}= takes name globs, module types or modules, got {kind}")


def _names(target: Target) -> list[str]:
    """A parameter's names, and those of the modules that hold it."""
    return [form for name in target.names for form in (name, name.rpartition(".")[0])]


def _no_match(targets: list[Target], pattern: Pattern, argument: str) -> str:
    if isinstance(pattern, type):
        owners = [module for target in targets for module, _ in target.owners if isinstance(module, pattern)]
        reasons = "".join(f": {reason}" for reason in dict.fromkeys(r for m in owners for r in computed_weights(m)))
        return f"{argument}=: no weight of a {pattern.__name__} in this model{reasons}"
    if isinstance(pattern, nn.Module):
        what = "is none of this model" if next(pattern.parameters(), None) is not None else "has no parameters"
        return f"{argument}=: the {type(pattern).__name__} that was given {what}; give a part of the model, or its name"
    names = {name for target in targets for name in _names(target)}
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    return f"{argument}={pattern!r} matches no parameter; " + (
        f"near: {', '.join(near)}" if near else "see model.named_parameters()"
    )
