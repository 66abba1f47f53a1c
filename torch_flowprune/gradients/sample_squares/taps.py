"""Watches a forward for the operators that parameters go through, and hooks what each tells onto its output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_flowprune.gradients.operators import is_plain
from torch_flowprune.gradients.sample_squares.squared_sums import SquaredSums
from torch_flowprune.gradients.sample_squares.tapped_operators import INNER, Contribution, Tapped, sample_axis, tapped


class Taps(TorchFunctionMode):
    """Inside, every operator that is understood tells the sums what single samples give to its parameters.

    Attributes:
        told: the parameters that something was told of, by number.
        uses: how often each parameter was met in such an operator, by number.
        axes: of each parameter, the axis that samples lie along where it is used; None is one output for all.
        strange: whether an operand has no place for all samples where it had in the probe.
        anchor: what outputs depend on, so that their gradients are computed.
    """

    def __init__(
        self, parameters: Sequence[Tensor], chosen: set[int], sums: SquaredSums, axes: dict[int, int | None] | None
    ) -> None:
        super().__init__()
        self.numbers = {id(parameters[number]): number for number in chosen}
        self.sums, self.uses, self.told = sums, Counter[int](), set[int]()
        self.fixed, self.axes, self.strange = axes, dict[int, int | None](), False
        self.anchor = torch.zeros((), device=parameters[0].device, dtype=parameters[0].dtype, requires_grad=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        met = [number for one in (*args, *options.values()) if (number := self._number(one)) is not None]
        result = func(*args, **options)
        if not met or not isinstance(result, Tensor) or not torch.is_grad_enabled() or not is_plain(result):
            return result
        first = met[0]
        axis = self._axis_of(args, options) if self.fixed is None else self.fixed.get(first)
        if self.fixed is not None and axis is not None and not self._fits(axis, args, options):
            self.strange = True
            return result
        use = tapped(func, args, options, self.sums.size, axis)
        hooks = [] if use is None else [(n, told) for one, told in use.uses if (n := self._number(one)) is not None]
        if use is None or len(hooks) != len(met):
            return result
        for number, _ in hooks:
            self.uses[number] += 1
            self.axes[number] = axis
        return self._hooked(result, use, hooks)

    def _axis_of(self, args: Any, options: Any) -> int | None:
        """That of the first operand that is no parameter; of none, no axis."""
        return next((sample_axis(one, self.sums.size) for one in self._data(args, options)), None)

    def _fits(self, axis: int, args: Any, options: Any) -> bool:
        """Whether the first operand that is no parameter has all samples along this axis."""
        shape, axis = next(one.shape for one in self._data(args, options)), axis % INNER
        return len(shape) > axis and bool(shape[axis]) and shape[axis] % self.sums.size == 0

    def _data(self, args: Any, options: Any) -> Iterator[Tensor]:
        return (one for one in (*args, *options.values()) if isinstance(one, Tensor) and self._number(one) is None)

    def _hooked(self, result: Tensor, use: Tapped, hooks: Sequence[tuple[int, Contribution]]) -> Tensor:
        if use.shared:
            own = result.shape[1:] if result.dim() > 1 and result.shape[0] == 1 else result.shape
            result = result.expand(self.sums.size, *own)
        if use.reads is None or not use.reads.requires_grad:
            result = result + self.anchor
        result.register_hook(partial(self._tell, hooks))
        return result

    @torch.no_grad()
    def _tell(self, hooks: Sequence[tuple[int, Contribution]], dy: Tensor) -> None:
        for number, contribute in hooks:
            self.told.add(number)
            contribute(self.sums, number, dy.detach())

    def _number(self, value: Any) -> int | None:
        """That of a parameter, or of the parameter that a masked one is made of."""
        if not isinstance(value, Tensor):
            return None
        if (known := self.numbers.get(id(value))) is not None or value.grad_fn is None or not self.sums.masks:
            return known
        leaves = [
            node.variable for node, _ in value.grad_fn.next_functions if node is not None and hasattr(node, "variable")
        ]
        found = [self.numbers[id(leaf)] for leaf in leaves if id(leaf) in self.numbers and leaf.shape == value.shape]
        return found[0] if len(leaves) == 1 and found and found[0] in self.sums.masks else None
