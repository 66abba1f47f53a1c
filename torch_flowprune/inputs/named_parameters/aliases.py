"""A parameter under any of its names: of a tied weight's other owners, and with or without the names of wrappers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch_flowprune.inputs.named_parameters.names import without_wrappers
from torch_flowprune.inputs.named_parameters.target import Target


def own_names(known: Mapping[str, Target], given: Iterable[str]) -> dict[str, str]:
    """Each given name with the model's own for the same parameter; one that names no parameter stays as it is.

    >>> import torch
    >>> from torch_flowprune.inputs import parameters_of
    >>> model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 2), "head": torch.nn.Linear(2, 4, bias=False)})
    >>> model["head"].weight = model["embed"].weight
    >>> own_names(parameters_of(model), ["head.weight", "_orig_mod.embed.weight", "tail.weight"])
    {'head.weight': 'embed.weight', '_orig_mod.embed.weight': 'embed.weight', 'tail.weight': 'tail.weight'}
    """
    index = {name: target.name for target in known.values() for name in reversed(target.names)}
    return {name: next((index[form] for form in forms(name) if form in index), name) for name in given}


def forms(name: str) -> tuple[str, ...]:
    """How a name may be meant, the likeliest first.

    As it is, without wrappers' names, and without the ``module.`` that data parallelism and averages put first.
    """
    plain = without_wrappers(name)
    return name, plain, plain.removeprefix("module.")
