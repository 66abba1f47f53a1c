"""Modules put back as they were: where an error cut the work on them short, or where the work was only a trial."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from torch_flowprune.inputs import Target, no_collection
from torch_flowprune.masking.carrier import pruning_hooks, values_back, values_back_on_error

_REGISTRIES = (dict, OrderedDict)
"""What modules have their tensors, parts and hooks in, and caches of their own."""


def all_or_nothing(targets: Iterable[Target]) -> AbstractContextManager[None]:
    """An error inside leaves every owner of these parameters exactly as it was."""
    return intact_on_error(_owners(targets))


@contextmanager
def intact_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """An error inside leaves these modules exactly as they were, but for values that are written to parameters.

    What masks have cleared in shards comes back.
    """
    restore = _snapshots(modules)
    with values_back_on_error():
        try:
            yield
        except BaseException:
            restore()
            raise


def restored(targets: Iterable[Target]) -> AbstractContextManager[None]:
    """Masks put on inside are gone afterwards, in any case."""
    return as_it_was(_owners(targets))


@contextmanager
def as_it_was(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever happens to these modules inside is gone afterwards, but for values that are written to tensors.

    What masks have cleared in shards comes back.
    """
    restore = _snapshots(modules)
    with values_back():
        try:
            yield
        finally:
            restore()


def _owners(targets: Iterable[Target]) -> Iterable[nn.Module]:
    """Each once, however many of its parameters are among these."""
    return {id(module): module for target in targets for module, _ in target.owners}.values()


@no_collection()
def _snapshots(modules: Iterable[nn.Module]) -> Callable[[], None]:
    restores = [_snapshot(module) for module in modules]

    def restore() -> None:
        for restore_module in restores:
            restore_module()

    return restore


def _snapshot(module: nn.Module) -> Callable[[], None]:
    """A function that puts back the module's class, parameters, buffers, hooks and attributes as they are now."""
    kind, attributes = type(module), dict(module.__dict__)
    dicts = [value for value in attributes.values() if type(value) in _REGISTRIES]
    held = [(value, list(value.items())) for value in dicts if value]
    histories = [(hook, dict(vars(hook))) for hook in pruning_hooks(module).values()]

    def restore() -> None:
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for value in dicts:
            value.clear()
        for value, items in held:
            value.update(items)
        for hook, history in histories:
            vars(hook).update(history)

    return restore
