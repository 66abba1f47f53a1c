"""Dropout off for a while, with a note of every call that would have dropped something."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from inspect import Parameter, signature
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_RATE_OF_ATTENTION = 4
"""Where ``scaled_dot_product_attention``, which has no signature to look at, takes its rate."""


class DropoutCalls(TorchFunctionMode):
    """Dropout passes its input on, whether a module, a function or an exported graph calls it.

    What it drops is drawn by shape, so models of other widths can be compared only without; which rates it was called
    with can be compared too.

    Attributes:
        rates: of the calls that were on, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if "dot_product_attention" in getattr(func, "__name__", ""):
            _check_not_empty([*args, *options.values()])
        if "dropout" in getattr(func, "__name__", ""):
            rest = args[1:] if "input" not in options else args
            rate = options.get("p", rest[0] if rest else 0.5)
            self._note(
                rate, options.get("training", options.get("train", rest[1] if len(rest) > 1 else _default(func)))
            )
            return args[0] if args else options["input"]
        if "dropout_p" in (names := list(_parameters_of(func))):
            options = {**dict(zip(names, args, strict=False)), **options}
            self._note(options.get("dropout_p"), options.get("training", True))
            return func(**{**options, "dropout_p": 0.0})
        if "dropout_p" in options:
            self._note(options["dropout_p"], True)
            options["dropout_p"] = 0.0
        elif "dot_product_attention" in getattr(func, "__name__", "") and len(args) > _RATE_OF_ATTENTION:
            self._note(args[_RATE_OF_ATTENTION], True)
            args = (*args[:_RATE_OF_ATTENTION], 0.0, *args[_RATE_OF_ATTENTION + 1 :])
        return func(*args, **options)

    def _note(self, rate: Any, on: Any) -> None:
        if on and rate:
            self.rates.append(float(rate))


def _check_not_empty(operands: list[Any]) -> None:
    """Of sizes that do not fit there may be no heads left, by which kernels of torch 2.6 divide: the process ends."""
    if any(isinstance(one, Tensor) and not one.numel() for one in operands):
        raise ValueError("attention over nothing: an operand is empty")


@cache
def _parameters_of(func: Any) -> Mapping[str, Parameter]:
    """Of a function; none of what is written in another language, in whole or within."""
    try:
        return signature(func).parameters if isinstance(func, FunctionType) else {}
    except ValueError:
        return {}


def _default(func: Any) -> bool:
    """Whether dropout that is not told is on: some functions say so, and others have to be told."""
    training = _parameters_of(func).get("training")
    return training is None or bool(training.default)
