"""What each weight multiplies: E[x²], E|x|, and how often it is not zero, from forwards alone.

Read where the operators run: a product or convolution that has a parameter, a view of one or its masked values for an
operand says what its other operand is. So every layer is read that computes by such an operator, whatever its class.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_flowprune.gradients.flow_source import FlowSource
from torch_flowprune.inputs import Batch, Ranks, Target, same_randomness, wide
from torch_flowprune.torch_internals import OperatorMode, convolution_backward, storage_key, to_copy

MOMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "x2": torch.square,
    "x1": torch.abs,
    "x0": lambda x: (x != 0).to(x.dtype),
}
"""What the mean is taken of, by the name that measures ask for it by."""


class _Place(NamedTuple):
    """Where an operand lies in a parameter: whose it is, and its shape, strides and offset there."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Region(NamedTuple):
    """Memory that holds a parameter's values in the parameter's own layout, or a part of them."""

    name: str
    start: int
    size: int
    shift: int


class InputMoments:
    """E[x²], E|x| and E[x ≠ 0] at each weight, those that are wanted, over samples and positions of the output.

    0 where a weight meets padding, or nothing. Only weights that products and convolutions have for an operand are
    read.
    """

    def __init__(
        self, model: nn.Module, targets: Mapping[str, Target], source: FlowSource, kinds: Collection[str]
    ) -> None:
        self.model, self.source, self.kinds = model, source, sorted(kinds)
        self.parameters: dict[str, Tensor] = {name: target.parameter for name, target in targets.items()}
        self.sums: dict[str, dict[_Place, Tensor]] = {kind: {} for kind in self.kinds}
        self.counts: dict[_Place, float] = {}

    def add(self, batch: Batch, size: int) -> None:
        """One more forward; of no samples, it is one that other ranks wait for, and counts nothing."""
        dtype = self.source.autocast
        kind = next(self.model.parameters()).device.type
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it is one operator, in which no product can be seen
        try:
            with (
                same_randomness(self.model),
                torch.set_grad_enabled(self.source.closure is not None),
                torch.autocast(kind, dtype, enabled=dtype is not None),
                self._watched(SeenProducts(self._note if size else _leave_out)),
            ):
                self.source.objective.forward(self.model, batch)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def means(self, ranks: Ranks) -> dict[str, dict[str, Tensor]]:
        """By kind and name, in the shape of the parameter; what was not seen in a product is left out."""
        read = self._read(ranks)
        return {kind: {name: self._mean(kind, name, ranks) for name in read} for kind in self.kinds}

    @contextmanager
    def _watched(self, operands: SeenProducts) -> Iterator[None]:
        """Inside, products of the parameters are seen."""
        for name, parameter in self.parameters.items():
            operands.know(name, parameter)
        with operands:
            yield

    def _mean(self, kind: str, name: str, ranks: Ranks) -> Tensor:
        total, counts = self._totals(kind, name, self.parameters[name])
        ranks.sum([total, counts])
        return total.div_(counts.clamp_(min=1))

    def _totals(self, kind: str, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of this process, and over how many, in the layout of the parameter."""
        total = _zeros_like(like)
        counts = torch.zeros_like(total)
        for place, value in self.sums[kind].items():
            if place.name == name:
                _at(total, place).add_(value.to(total.dtype))
                _at(counts, place).add_(self.counts[place])
        return total, counts

    def _read(self, ranks: Ranks) -> list[str]:
        """Those that a rank has seen in a product."""
        seen = {place.name for place in self.counts}
        device = next(iter(self.parameters.values())).device
        ranks.sum([counts := torch.tensor([float(name in seen) for name in self.parameters], device=device)])
        return [name for name, count in zip(self.parameters, counts.tolist(), strict=True) if count]

    def _note(self, place: _Place, moment: Callable[[Callable[[Tensor], Tensor]], Tensor], count: int) -> None:
        self.counts[place] = self.counts.get(place, 0) + count
        for kind, sums in self.sums.items():
            value = moment(MOMENTS[kind])
            sums[place] = sums[place].add_(value) if place in sums else value.clone()


def _leave_out(place: _Place, moment: Any, count: int) -> None:
    """What is run for others."""


def _zeros_like(parameter: Tensor) -> Tensor:
    return torch.zeros_like(wide(parameter.detach()))


def _at(whole: Tensor, place: _Place) -> Tensor:
    return whole.as_strided(place.shape, place.stride, place.offset)


class SeenProducts(OperatorMode):
    """Sees the products and convolutions of parameters, and of what is a parameter's values in its own layout."""

    def __init__(self, note: Callable[[_Place, Any, int], None]) -> None:
        super().__init__()
        self.note, self.regions = note, dict[int, list[_Region]]()

    def know(self, name: str, values: Tensor, *, for_good: bool = True) -> None:
        """That a tensor has a parameter's values; ``for_good``, or until its memory is freed."""
        region = _Region(name, int(values.storage_offset()), values.numel(), 0)
        storage = values.untyped_storage()
        key = storage_key(storage)
        if key not in self.regions and not for_good:
            weakref.finalize(storage, self.regions.pop, key, None)
        if region not in (known := self.regions.setdefault(key, [])):
            known.append(region)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__module__.startswith("torch.distributed") for kind in types):
            return NotImplemented  # what each rank does with its part comes by once torch has told them
        result = func(*args, **(kwargs or {}))
        if (read := _PRODUCTS_READ.get(func)) is not None:
            for operand, moment, count in read(result, *args):
                if (place := self._place(operand())) is not None:
                    self.note(place, moment, count)
        elif (copied := _COPIES.get(func)) is not None:
            self._follow(args[copied], result)
        return result

    def _region(self, tensor: Tensor) -> _Region | None:
        regions = self.regions.get(storage_key(tensor.untyped_storage()), ())
        return next((r for r in regions if r.start <= tensor.storage_offset() < r.start + r.size), None)

    def _place(self, tensor: Tensor) -> _Place | None:
        region = self._region(tensor)
        if region is None or 0 in tensor.stride():  # one weight in many places of a product
            return None
        offset = int(tensor.storage_offset()) - region.start + region.shift
        return _Place(region.name, tuple(tensor.shape), tensor.stride(), offset)

    def _follow(self, source: Any, result: Tensor) -> None:
        """A copy, a cast, a selection by a mask: the values stay where they are in the layout."""
        place = self._place(source) if isinstance(source, Tensor) else None
        if place is None or (result.shape, result.stride()) != (source.shape, source.stride()):
            return
        storage = result.untyped_storage()
        key = storage_key(storage)
        self.regions[key] = [_Region(place.name, int(result.storage_offset()), result.numel(), place.offset)]
        weakref.finalize(storage, self.regions.pop, key, None)


def _of_product(_: Tensor, x: Tensor, w: Tensor) -> Any:
    """X @ w, either of which may be the weight, with a first axis of several products or without."""
    yield lambda: w, lambda of: of(_float_values(x)).sum(-2).unsqueeze(-1), x.shape[-2]
    yield lambda: x, lambda of: of(_float_values(w)).sum(-1).unsqueeze(-2), w.shape[-1]


def _added_product(y: Tensor, _: Tensor, x: Tensor, w: Tensor) -> Any:
    return _of_product(y, x, w)


def _of_nested(_: Tensor, x: Tensor, w: Tensor, *_bias: Any) -> Any:
    """A linear layer on samples of several lengths in one tensor, for which it is no product of matrices."""
    values = torch.cat([one.flatten(0, -2) for one in x.unbind()])
    yield lambda: w, lambda of: of(_float_values(values)).sum(0, keepdim=True), len(values)


def _convolved(
    y: Tensor, x: Tensor, w: Tensor, _: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, more: Any, groups: int,
) -> Any:  # fmt: skip
    """The sum over a kernel's places at each offset is a gradient: of kernels of one channel each, for ones."""

    def moment(of: Callable[[Tensor], Tensor]) -> Tensor:
        squares = of(_float_values(x)).sum(0, keepdim=True)
        channels, kernel = squares.shape[1], w.shape[2:]
        ones = squares.new_ones((1, channels, *y.shape[2:]))
        alone = squares.new_zeros((channels, 1, *kernel))
        options = stride, padding, dilation, transposed, more, channels
        sums: Tensor = convolution_backward(ones, squares, alone, [channels], *options, (False, True, False))[1]
        if transposed:
            return sums  # (in, 1, kernel) beside (in, out / groups, kernel)
        by_group: Tensor = sums.view(groups, channels // groups, *kernel)
        return by_group.repeat_interleave(len(w) // groups, 0) if groups > 1 else by_group

    yield lambda: w, moment, y.numel() // y.shape[1]


def _float_values(x: Tensor) -> Tensor:
    return wide(x.detach())


_PRODUCTS_READ: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.default: _of_product,
    torch.ops.aten.bmm.default: _of_product,
    torch.ops.aten.addmm.default: _added_product,
    torch.ops.aten.baddbmm.default: _added_product,
    torch.ops.aten.linear.default: _of_nested,  # of plain tensors it is taken apart before a mode sees it
    torch.ops.aten.convolution.default: _convolved,
}
_COPIES = {
    torch.ops.aten.where.self: 1,
    torch.ops.aten.clone.default: 0,
    to_copy.default: 0,  # type: ignore[attr-defined]
}
