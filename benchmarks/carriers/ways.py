"""Four ways to carry a mask on a module, alike to use: put on, taken off, and the parameter that optimizers hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import torch_flowprune as fp
from torch_flowprune.inputs import masked
from torch_flowprune.masking.carrier import parametrization as own
from torch_flowprune.masking.carrier import put_on
from torch_flowprune.masking.carrier.class_chain import quiet_subclass


class Way(Protocol):
    """One carrier."""

    name: ClassVar[str]

    def put(self, module: nn.Module, name: str, mask: Tensor) -> None:
        """Mask one parameter."""

    def off(self, module: nn.Module, name: str) -> None:
        """Make the mask permanent."""

    def parameter(self, module: nn.Module, name: str) -> nn.Parameter:
        """What holds the values, those under the mask too."""

    def here(self) -> Any:
        """Inside, modules carry masks in this way."""


class SharedProperty:
    """A property on a subclass of the module's class: one for each class and set of names, kept weakly (as here)."""

    name: ClassVar[str] = "property, a subclass for each class"

    def put(self, module: nn.Module, name: str, mask: Tensor) -> None:
        put_on(module, name, mask.clone())

    def off(self, module: nn.Module, name: str) -> None:  # noqa: ARG002 - of the one tensor that the trials mask
        fp.remove(module)

    def parameter(self, module: nn.Module, name: str) -> nn.Parameter:
        return module._parameters[f"{name}_orig"]  # type: ignore[return-value]

    @contextmanager
    def here(self) -> Iterator[None]:
        yield


class PropertyOfEachModule(SharedProperty):
    """The same property on a class of each module's own, as torch's parametrization makes them."""

    name: ClassVar[str] = "property, a class for each module"

    @contextmanager
    def here(self) -> Iterator[None]:
        def anew(dense: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
            return quiet_subclass(dense, dense.__name__, own._namespace(dense, names))

        with mock.patch.object(own, "_masked_class", anew):
            yield


class _Select(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, value: Tensor) -> Tensor:
        return masked(value, self.get_buffer("mask"))


class Parametrization:
    """torch.nn.utils.parametrize, with a module that selects."""

    name: ClassVar[str] = "torch's parametrization"

    def put(self, module: nn.Module, name: str, mask: Tensor) -> None:
        parametrize.register_parametrization(module, name, _Select(mask.clone()))

    def off(self, module: nn.Module, name: str) -> None:
        parametrize.remove_parametrizations(module, name)

    def parameter(self, module: nn.Module, name: str) -> nn.Parameter:
        return module.parametrizations[name].original  # type: ignore[index,union-attr,return-value]

    @contextmanager
    def here(self) -> Iterator[None]:
        yield


class MaskedParameter(nn.Parameter):
    """A parameter that every function of torch sees masked, but for those that write to it or ask what it is."""

    mask: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("__get__", "__set__", "detach", "is_floating_point", "requires_grad_") or _writes(name):
                return func(*args, **(kwargs or {}))
            return func(*map(_seen, args), **{key: _seen(value) for key, value in (kwargs or {}).items()})


def _writes(name: str) -> bool:
    return name.endswith("_") and not name.startswith("__")


def _seen(value: Any) -> Any:
    if isinstance(value, MaskedParameter):
        return torch.where(value.mask, value.view_as(value), 0)
    return [_seen(one) for one in value] if isinstance(value, list) else value


class TensorSubclass:
    """The parameter itself is of a class of its own; the module stays as it is."""

    name: ClassVar[str] = "tensor subclass"

    def put(self, module: nn.Module, name: str, mask: Tensor) -> None:
        parameter = module._parameters[name]
        parameter.__class__ = MaskedParameter  # type: ignore[assignment]
        parameter.mask = mask.clone()  # type: ignore[union-attr]

    def off(self, module: nn.Module, name: str) -> None:
        parameter: Any = module._parameters[name]
        mask = parameter.mask
        parameter.__class__ = nn.Parameter
        with torch.no_grad():
            parameter.masked_fill_(~mask, 0)

    def parameter(self, module: nn.Module, name: str) -> nn.Parameter:
        return module._parameters[name]  # type: ignore[return-value]

    @contextmanager
    def here(self) -> Iterator[None]:
        yield


class TorchPrune:
    """torch.nn.utils.prune itself, for comparison."""

    name: ClassVar[str] = "torch.nn.utils.prune"

    def put(self, module: nn.Module, name: str, mask: Tensor) -> None:
        prune.custom_from_mask(module, name, mask.clone())

    def off(self, module: nn.Module, name: str) -> None:
        prune.remove(module, name)

    def parameter(self, module: nn.Module, name: str) -> nn.Parameter:
        return module._parameters[f"{name}_orig"]  # type: ignore[return-value]

    @contextmanager
    def here(self) -> Iterator[None]:
        yield


WAYS: tuple[Way, ...] = (SharedProperty(), PropertyOfEachModule(), Parametrization(), TensorSubclass(), TorchPrune())


def alive(kinds: list[weakref.ref[Any]]) -> int:
    """How many of these are still there."""
    return sum(kind() is not None for kind in kinds)
