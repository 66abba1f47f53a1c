"""What builds a model of a class from numbers: the config that it carries, as models of transformers do.

No library is imported and no number known by name: a config is what turns into a dict and comes back from one, and the
class takes it as its only argument.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import nn

from torch_flowprune.inputs import is_mask, plain_name

Numbers: TypeAlias = Mapping[str, "int | float"]
"""By name; a number of a config inside the config is called ``text_config.hidden_size``."""
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def constructor_of(model: nn.Module) -> Constructor | None:
    """Of a model that carries a config of which a new one of its class has its tensors; else None."""
    config = getattr(model, "config", None)
    if not all(callable(getattr(config, word, None)) for word in ("to_dict", "from_dict")):
        return None
    with suppress(Exception):  # what is called so, and takes or gives something else
        return Constructor(type(model), config)
    return None


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of everything in the state dict, whatever it wears, under plain names; of tied tensors under every name."""
    held = model.state_dict(keep_vars=True)
    return {plain_name(name, held): tuple(tensor.shape) for name, tensor in held.items() if not is_mask(name, held)}


class Constructor:
    """A class and the config that its models are built from."""

    def __init__(self, kind: type[nn.Module], config: Any) -> None:
        self.kind, self.config = getattr(kind, "code_base", kind), copy.deepcopy(config)
        self._said = json.dumps(config.to_dict(), sort_keys=True, default=repr)
        self._shapes: dict[frozenset[tuple[str, int | float]], Shapes | None] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constructor) and (self.kind, self._said) == (other.kind, other._said)

    def __hash__(self) -> int:
        return hash((self.kind, self._said))

    @property
    def numbers(self) -> dict[str, int | float | None]:
        """The numbers of the config, and what it leaves open."""
        return {
            name: value
            for name, value in _said_values(self.config.to_dict())
            if value is None or (type(value) in (int, float) and value > 0)
        }

    def with_numbers(self, numbers: Numbers) -> Any:
        """A config that says these, as one that was written and read again."""
        said = self.config.to_dict()
        for name, value in numbers.items():
            *path, last = name.split(".")
            inner = said
            for part in path:
                inner = inner[part]
            inner[last] = value
        new = type(self.config).from_dict(copy.deepcopy(said))
        _go_along(self.config, new)
        return new

    def build(self, numbers: Numbers, device: torch.device | str = "meta") -> nn.Module:
        """A new model with random weights; the source of randomness is as it was."""
        with torch.random.fork_rng(), torch.device(device), _quietly():
            return self.kind(self.with_numbers(numbers))

    def shapes(self, numbers: Numbers) -> Shapes | None:
        """What :meth:`build` would make; None where the class refuses these numbers."""
        key = frozenset(numbers.items())
        if key not in self._shapes:
            self._shapes[key] = None
            with suppress(Exception):  # whatever a config says against the numbers that are tried
                self._shapes[key] = shapes_of(self.build(numbers))
        return self._shapes[key]

    def read_besides(self) -> list[str]:
        """Names that the class asks its config for, which the config does not have."""
        missing: dict[str, None] = {}
        with suppress(Exception), torch.random.fork_rng(), torch.device("meta"), _quietly():
            config = self.with_numbers({})
            for path, inner in _configs(config):
                _note_misses(inner, path, missing)
            self.kind(config)
        return list(missing)


def _said_values(said: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in said.items():
        if isinstance(value, dict):
            yield from _said_values(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and those inside it."""
    yield path, config
    for name, value in vars(config).items():
        if callable(getattr(value, "to_dict", None)):
            yield from _configs(value, f"{path}{name}.")


def _go_along(old: Any, new: Any) -> None:
    """What a config keeps for itself, such as the kernels that a model was loaded with, is not written with it."""
    inner = dict(_configs(new))
    for path, config in _configs(old):
        if path in inner:
            private = {name: value for name, value in vars(config).items() if name.startswith("_")}
            inner[path].__dict__.update({n: v for n, v in private.items() if isinstance(v, (str, bool, type(None)))})


def _note_misses(config: Any, path: str, missing: dict[str, None]) -> None:
    """Note which attributes are asked for in vain."""
    kind: Any = type(config)

    def getattribute(self: Any, name: str) -> Any:
        try:
            return kind.__getattribute__(self, name)
        except AttributeError:
            if not name.startswith("_"):
                missing[f"{path}{name}"] = None
            raise

    config.__class__ = type(kind.__name__, (kind,), {"__getattribute__": getattribute, "__module__": kind.__module__})


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what a library logs of numbers that nobody is going to keep."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
