"""Sums over samples, one tensor a parameter, and the weighted means and errors taken from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torch_flowprune.gradients.batches.batch_derivatives import Grads
from torch_flowprune.inputs import Ranks, wide, wide_type
from torch_flowprune.torch_internals import foreach_add_, foreach_addcmul_, foreach_mul_, storage_key


def zero_sums(parameters: Sequence[Tensor], *, on_host: bool) -> list[Tensor]:
    """Sums of nothing, in float32 or better."""
    device = "cpu" if on_host else None
    return [torch.zeros_like(value, dtype=wide_type(value), device=device) for value in map(Tensor.detach, parameters)]


def taken(grads: Grads, parameters: Sequence[Tensor], besides: Sequence[Tensor] = ()) -> list[Tensor]:
    """Gradients as tensors of their own, in float32 or better: the engine's as they are, where nobody else has them."""
    known = {storage_key(tensor.untyped_storage()) for tensor in (*parameters, *besides)}
    own: list[Tensor] = []
    for grad, total in zip(grads, map(_empty_sum, parameters), strict=True):
        if grad is None:
            value = total.zero_()
        elif _is_apart(grad, total) and storage_key(grad.untyped_storage()) not in known:
            value = grad.detach()
        else:
            value = total.copy_(grad.detach())
        known.add(storage_key(value.untyped_storage()))
        own.append(value)
    return own


def _empty_sum(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter.detach(), dtype=wide_type(parameter))


def _is_apart(grad: Tensor, like: Tensor) -> bool:
    """Whether it is a tensor that has all its memory, laid out as this one."""
    kinds = (grad.layout, grad.dtype, grad.stride()) == (like.layout, like.dtype, like.stride())
    return kinds and grad.untyped_storage().nbytes() == grad.nbytes


def add_weighted(total: list[Tensor], values: Sequence[Tensor | None], weight: float) -> list[Tensor]:
    """``total``, which takes the values that many times."""
    if pairs := _pairs(total, values):
        into, added = zip(*pairs, strict=True)
        foreach_add_(into, added, alpha=weight)
    return total


def add_weighted_squares(total: list[Tensor], values: Grads, weight: float) -> None:
    """``total`` takes the squares of the values that many times."""
    dense = [value if value is None or value.layout is torch.strided else value.to_dense() for value in values]
    if pairs := _pairs(total, dense):  # a sparse gradient names rows more than once, which are summed before a square
        into, squared = zip(*pairs, strict=True)
        foreach_addcmul_(into, squared, squared, value=weight)


def _pairs(total: list[Tensor], values: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """Where sums are on the host, the values come to it."""
    return [(into, wide(value).to(into.device)) for into, value in zip(total, values, strict=True) if value is not None]


def scale(total: list[Tensor], factor: float) -> list[Tensor]:
    """``total``, multiplied in place."""
    foreach_mul_(total, factor)
    return total


def detached(grads: Grads) -> Grads:
    """The values alone."""
    return [None if grad is None else grad.detach() for grad in grads]


def dot_product(a: Sequence[Tensor], b: Sequence[Tensor | None]) -> Tensor:
    """Σ a·b over all parameters, in float64."""
    return torch.stack(
        [
            (x.to(y.device) * y).sum(dtype=torch.float64).to(a[0].device)
            for x, y in zip(a, b, strict=True)
            if y is not None
        ]
    ).sum()


def check_read(samples: int, weights: Sequence[float] = (1.0,)) -> None:
    """An error for data without any sample, or without any that counts."""
    if not samples:
        raise ValueError(
            "the data is empty: at least one batch is needed (an exhausted iterator? pass a list or a DataLoader)"
        )
    if not sum(weights):
        raise ValueError("every target is ignored: there is nothing to take a mean loss over")


def finite_mean_loss(losses: list[Tensor], weights: Sequence[float]) -> float:
    """The weighted mean, read from the device once; an infinite or nan loss is an error that names its batch."""
    values: list[float] = torch.stack(losses).double().tolist()
    for index, value in enumerate(values):
        if not abs(value) < float("inf"):
            raise ValueError(
                f"the loss of batch {index} is {value}: scores would mean nothing (check the data; try "
                "mode='train' on an untrained model; for a batch without targets, let reduction= be a function that "
                "returns 0 for it)"
            )
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def over_ranks(
    ranks: Ranks, sums: Iterable[list[Tensor]], count: int, weight: float, loss: float = 0.0
) -> tuple[int, float, float]:
    """Sums in place, and number of samples, their weight and mean loss, of all ranks together."""
    device = torch.device("cpu")
    for values in sums:
        ranks.sum(values)
        device = values[0].device
    totals = torch.tensor([count, weight, loss * weight], dtype=torch.float64, device=device)
    ranks.sum([totals])
    samples, whole, total = totals.tolist()
    return int(samples), whole, total / whole


def standard_error(values: Tensor, weights: Sequence[float], ranks: Ranks) -> float:
    """Of the weighted mean of a batch quantity, over the batches of all ranks; nan for one batch."""
    weight = torch.tensor(weights, dtype=torch.float64, device=values.device)
    moments = torch.stack(
        [
            weight.new_tensor(len(weights)),
            weight.sum(),
            (weight * values).sum(),
            *((weight**2 * values**i).sum() for i in range(3)),
        ]
    )
    ranks.sum([moments])
    batches, total, weighted, zeroth, first, second = moments.tolist()
    mean = weighted / total
    spread = max(second - 2 * mean * first + mean**2 * zeroth, 0.0)
    return float((spread * batches / (batches - 1)) ** 0.5 / total) if batches > 1 else float("nan")
