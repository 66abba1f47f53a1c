"""Numbers and arrays of numpy, numbers in tensors, and lists, wherever a number or a tensor is taken."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor


def plain_number(value: Any) -> Any:
    """A number of Python, of a tensor or array that holds one, or of numpy; anything else as it is.

    float32 numbers are what they were written as: 0.1, not 0.10000000149.

    >>> plain_number(torch.tensor(0.1)), plain_number(3), plain_number("3")
    (0.1, 3, '3')
    """
    if not hasattr(value, "dtype") or getattr(value, "ndim", 1) != 0:
        return value
    number = value.item()
    if not isinstance(number, float) or value.dtype.itemsize > 4:
        return number
    return float(f"{number:.7g}" if value.dtype.itemsize == 4 else f"{number:.3g}")


def plain_sequence(value: Any) -> Any:
    """The numbers of an array or a tensor with one axis as a list; anything else as it is.

    >>> plain_sequence(torch.tensor([0.1, 0.2])), plain_sequence("linear")
    ([0.1, 0.2], 'linear')
    """
    many = hasattr(value, "dtype") and getattr(value, "ndim", 0) == 1
    return [plain_number(one) for one in value] if many else value


def whole_number(value: Any, argument: str, hint: str = "") -> int:
    """A whole number of at least 1.

    Raises:
        ValueError: for anything else.

    >>> whole_number(torch.tensor(2), "rounds")
    2
    """
    number = plain_number(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{argument} should be a whole number of at least 1{hint}, got {value!r}")
    return number


def real_tensor(value: Any, what: str) -> Tensor:
    """A tensor of real numbers, of such a tensor, an array of numpy or a list; of at least 32 bits each.

    Raises:
        ValueError: for what holds none.
    """
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} should be numbers in a tensor, an array or a list, got {value!r}") from error
    if tensor.is_meta or tensor.is_complex() or tensor.is_quantized or tensor.dtype is torch.bool:
        raise ValueError(f"{what} should be numbers with values, got {tensor.dtype} on {tensor.device}")
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return tensor.float() if narrow else tensor


def without_nan(value: Any) -> Any:
    """Plain values that JSON has words for: None in place of nan and infinities.

    >>> without_nan({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_nan(one) for one in value)
    return None if isinstance(value, float) and not isfinite(value) else value
