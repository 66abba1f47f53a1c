"""The functions of the pruning methods, in torch's naming, and what both forms say of themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_flowprune.pruning.methods.base_method import MeasureMethod, Structured, Unstructured
from torch_flowprune.scoring import measure_lookup


def unstructured(method: type[Unstructured]) -> Callable[..., nn.Module]:
    """The functional form of a class of this kind."""

    def function(
        module: nn.Module,
        name: str,
        amount: float,
        importance_scores: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> nn.Module:
        method.apply(module, name, amount, generator=generator, importance_scores=importance_scores)
        return module

    return _described(function, method, "_unstructured", "weights")


def structured(method: type[Structured]) -> Callable[..., nn.Module]:
    """The functional form of a class of this kind."""

    def function(
        module: nn.Module,
        name: str,
        amount: float,
        dim: int = 0,
        importance_scores: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> nn.Module:
        method.apply(module, name, amount, dim, generator=generator, importance_scores=importance_scores)
        return module

    return _described(function, method, "_structured", "slices")


_DIM = (
    "    dim: the axis along which the slices lie; 0 is the outputs of linear layers and convolutions (torch's own "
    "classes\n        have -1).\n"
)
_GENERATOR = (
    "    generator: the random generator for ``random``; if left out, torch's global generator, which then advances."
)
_OF_A_FUNCTION = """Prune the {units}{along} with the lowest ``{measure}`` from one tensor of a module.

The module gets a mask under torch's names, ``weight_orig`` and ``weight_mask``. It is :meth:`{method}.apply`.

Args:
    module: the module that has the tensor; changed in place.
    name: the tensor's name in it (``"weight"``).
    amount: how many are pruned of the {units} that are left: a fraction (float) or a number (int).
{dim}    importance_scores: scores computed earlier, in the tensor's shape; for measures that need data,
        :func:`~torch_flowprune.importance_scores` has them. If left out, the weight and its ``.grad`` are read.
{generator}

Returns:
    The module.

Raises:
    ValueError: for a tensor that the module does not have or that cannot carry a mask, scores of another shape or with
        nan, an amount out of range, or a measure that reads more than the weight and its ``.grad``, without scores.
        The module is as it was.
    TypeError: for an amount{or_dim} of another type.

See Also:
    :func:`~torch_flowprune.scoring.measures.{measure}`: the measure.
    :func:`~torch_flowprune.global_prune`: prunes a whole model.

>>> import torch, torch_flowprune as fp
>>> layer, scores = torch.nn.Linear(3, 2), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
>>> _ = fp.{function}(layer, "weight", amount=1, importance_scores=scores)
>>> layer.weight_mask.int().tolist()
{mask}
"""
_OF_A_CLASS = """
Use it as torch's own classes, with ``apply``{elsewhere}.

Args:
    amount: how many are pruned of the {units} that are left: a fraction (float) or a number (int).
{dim}{generator}

Raises:
    ValueError: for an amount out of range.
    TypeError: for an amount{or_dim} of another type.

See Also:
    :func:`~torch_flowprune.{function}`: the same as a function, with an example.
    :func:`~torch_flowprune.scoring.measures.{measure}`: the measure.
"""


def _described(
    function: Callable[..., nn.Module], method: type[MeasureMethod], suffix: str, units: str
) -> Callable[..., nn.Module]:
    measure, slices = measure_lookup.name_of(method.measure), units == "slices"
    function.__name__ = function.__qualname__ = f"{measure}{suffix}"
    words = {
        "function": function.__name__,
        "method": method.__name__,
        "measure": measure,
        "units": units,
        "along": " along ``dim``" if slices else "",
        "dim": _DIM if slices else "",
        "or_dim": " or a ``dim``" if slices else "",
        "elsewhere": "" if slices else ", or in ``prune.global_unstructured``",
        "generator": _GENERATOR,
        "mask": "[[0, 0, 0], [1, 1, 1]]" if slices else "[[0, 1, 1], [1, 1, 1]]",
    }
    function.__doc__ = _OF_A_FUNCTION.format(**words)
    method.__doc__ = f"{method.__doc__}\n{_OF_A_CLASS.format(**words)}"
    return function
