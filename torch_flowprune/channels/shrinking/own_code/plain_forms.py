"""Modules whose code says other numbers than their class's, as the class has them.

A number that the class reads off its config needs nothing but the config. A root-mean-square norm that divides by a
dense width becomes a constant in weight and epsilon. Over d' of d channels of which the others are zero, Σx²/d + ε is
(Σx²/d' + ε·d/d')·d'/d: the class itself computes the same with γ·√(d/d') and ε·d/d'. No name of either is known: each
is tried on a few inputs. Of a norm that takes the mean off first there is no such form, as the mean of all is none of
those that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_flowprune.channels.shrinking.own_code.edited_code import SPAN, edits_of, own_class

_SCALED: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda weight, factor: weight * factor,
    lambda weight, factor: (1 + weight) * factor - 1,
)
"""How a weight stands in a norm: as a factor, or as a factor's distance from one."""
_NORMS_WITHIN = 1e-5


@dataclass(frozen=True)
class PlainForm:
    """What a module with edited code is as its class has it.

    Attributes:
        path: of the module.
        weight: of a norm, the name of its parameter, and its values.
        epsilon: of a norm, the name of its attribute; what it was, and is to be.
    """

    path: str
    weight: tuple[str, Tensor] | None = None
    epsilon: tuple[str, float, float] | None = None

    def put_on(self, model: nn.Module) -> None:
        """Change the module in place."""
        _change(model.get_submodule(self.path), self)


def plain_forms(model: nn.Module) -> list[PlainForm] | None:
    """Of all modules whose code was edited; None where one of them divides by a dense width, and has no plain form."""
    edited = [(path, module) for path, module in model.named_modules() if edits_of(type(module))]
    found = [_plain_form(path, module) for path, module in edited]
    return None if None in found else [one for one in found if one is not None]


@torch.no_grad()
def _plain_form(path: str, module: nn.Module) -> PlainForm | None:
    """Of one, that which computes the same."""
    spans = {edit.value[-1] for edit in edits_of(type(module)) if edit.slot == SPAN}
    if not spans:
        return PlainForm(path)
    held = list(module.named_parameters())
    if len(held) != 1 or len(spans) != 1 or any(edit.slot != SPAN for edit in edits_of(type(module))):
        return None
    (name, weight), (dense,) = held[0], spans
    ratio = dense / weight.shape[-1]
    for epsilon, small in _small_numbers(module):
        for scaled in _SCALED:
            values = scaled(weight.detach(), ratio**0.5)
            one = PlainForm(path, (name, values), (epsilon, small, small * ratio))
            with suppress(Exception):  # a forward that takes more than one tensor
                if _is_norm_alike(module, one, values, small):
                    return one
    return None


def _small_numbers(module: nn.Module) -> Iterator[tuple[str, float]]:
    for name, value in vars(module).items():
        if type(value) is float and 0 < value < 1:
            yield name, value


def _is_norm_alike(module: nn.Module, one: PlainForm, weight: Tensor, epsilon: float) -> bool:
    """On inputs of which epsilon is a small part, and on such of which it is most."""
    other = copy.deepcopy(module)
    _change(other, one)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, weight.shape[-1], generator=generator).to(weight)
    within = max(_NORMS_WITHIN, 4 * torch.finfo(weight.dtype).eps)
    pairs = [(module(inputs), other(inputs)) for inputs in (drawn, drawn * epsilon**0.5)]
    return all(bool((expected - got).abs().max() <= within * expected.abs().max()) for expected, got in pairs)


@torch.no_grad()
def _change(module: nn.Module, one: PlainForm) -> None:
    module.__class__ = own_class(type(module))
    if one.weight is not None:
        module.get_parameter(one.weight[0]).copy_(one.weight[1])
    if one.epsilon is not None:
        setattr(module, one.epsilon[0], one.epsilon[2])
