"""What the loss of a batch counts for in the mean over all the data: samples, or whatever else it is a mean over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_flowprune.inputs import Batch, BatchDim, Loss, Objective, call, first, in_two, logits_of, untouched

REDUCTIONS = ("mean", "sum", "token")
_IGNORED = -100  # what torch's cross-entropy and all who build on it leave out


Reduction: TypeAlias = str | Callable[[Batch], float | Tensor]


def check_reduction(reduction: object) -> None:
    """An error for what is neither one of :data:`REDUCTIONS`, nor a function, nor None."""
    if not callable(reduction) and reduction not in (None, *REDUCTIONS):
        raise ValueError(
            f"reduction should be one of {REDUCTIONS}, a function of a batch that returns how many terms its loss is "
            f"the mean of, or None to infer it from the loss, got {reduction!r}"
        )


@dataclass(frozen=True)
class _Counted:
    """How many places of a target torch's cross-entropy takes its mean over, each by the weight of its class."""

    ignore_index: int = _IGNORED
    weight: Tensor | None = None

    def of(self, target: Any) -> float | None:
        """None for what is no tensor."""
        if not isinstance(target, Tensor):
            return None
        if target.is_floating_point():  # probabilities of classes
            return target.numel() / target.shape[min(1, target.dim() - 1)]
        kept = target[target != self.ignore_index]
        return float(kept.numel() if self.weight is None else self.weight.to(kept.device)[kept].sum())


class LossWeights:
    """``weights(batch, size)``, by which means over batches and over parts of one are those over all of it.

    ``reduction`` says what the loss of a batch is: a ``"mean"`` over its samples, their ``"sum"``, or a mean over the
    places of the target that are not ignored (``"token"``); or it is a function of a batch, which says how many the
    loss of it is a mean over. Where it is None torch's cross-entropy is known to be
    the last, by class weights if it has them, and so is the loss that a language model itself returns, where it is
    seen to be; the rest are means over samples.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, reduction: Reduction | None = None, along: BatchDim = 0
    ) -> None:
        self.model, self.objective, self.reduction, self.along = model, objective, reduction, along
        self.sums = reduction == "sum" or (reduction is None and _setting(objective.loss, "reduction") == "sum")
        self._count: Callable[[Batch], float | None] | None = None
        self._decided = False

    def __call__(self, batch: Batch, size: int) -> float:
        if callable(self.reduction):
            return _counted_by_user(self.reduction(batch))
        if self.sums or self.reduction == "mean":
            return size
        count = None if (counting := self._counted_by(batch, size)) is None else counting(batch)
        return size if count is None else count

    def are_supposed(self, batch: Batch, size: int) -> bool:
        """Whether nothing tells what the loss is a mean over; a class made from torch's may have its own forward."""
        if self.reduction is not None or self.sums:
            return False
        return self._counted_by(batch, size) is None or _has_own_forward(self.objective.loss)

    def _counted_by(self, batch: Batch, size: int) -> Callable[[Batch], float | None] | None:
        """What is counted in each batch, decided on the first; None for samples."""
        if not self._decided:
            self._count, self._decided = self._counting(batch, size), True
        return self._count

    def mean(self, loss: Tensor, size: int) -> Tensor:
        """The loss of a batch as a mean: a sum is divided by the number of samples."""
        return loss / size if self.sums else loss

    def _counting(self, batch: Batch, size: int) -> Callable[[Batch], float | None] | None:
        own = isinstance(batch, Mapping) and self.objective.is_the_models
        counted = None if own else self._by_settings()
        if counted is None and self.reduction == "token":
            counted = _Counted(_setting(self.objective.loss, "ignore_index", _IGNORED))
        if own and (found := _language_model(self.model, _few(batch, size, self.along))) is not None:
            return found
        return None if counted is None else lambda batch: counted.of(in_two(batch)[1])

    def _by_settings(self) -> _Counted | None:
        """Of torch's cross-entropy, and of the default."""
        loss = self.objective.loss
        if self.objective.closure is not None or not (loss is None or _is_cross_entropy(loss)):
            return None
        return _Counted(_setting(loss, "ignore_index", _IGNORED), _setting(loss, "weight"))


def _counted_by_user(count: Any) -> float:
    """What a user's function of a batch gives, as a number."""
    value = float(count)
    if not 0 <= value < float("inf"):
        raise ValueError(
            "reduction= should give how many terms the loss of a batch is the mean of, a number of at least 0, got "
            f"{count!r}"
        )
    return value


def _is_cross_entropy(loss: Loss) -> bool:
    while isinstance(loss, partial):
        loss = loss.func
    return isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)) or loss in (
        functional.cross_entropy,
        functional.nll_loss,
    )


def _has_own_forward(loss: Loss | None) -> bool:
    return isinstance(loss, nn.Module) and type(loss).forward not in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)


def _setting(loss: Loss | None, name: str, default: Any = None) -> Any:
    """A setting of a loss: an attribute of a module, or a keyword that is set beforehand."""
    if isinstance(loss, partial):
        return loss.keywords.get(name, _setting(loss.func, name, default))
    return getattr(loss, name, default) if isinstance(loss, nn.Module) else default


def _language_model(model: nn.Module, batch: Mapping[str, Any]) -> Callable[[Batch], float | None] | None:
    """The counting of tokens of a model whose own loss is their mean; None where it is seen to be something else.

    The loss is compared with the cross-entropy of the model's logits and the labels at each place, and at the next, as
    causal models take it.
    """
    labels = in_two(batch)[1]
    if not (isinstance(labels, Tensor) and labels.dim() == 2 and labels.dtype is torch.long):
        return None
    with untouched(model), torch.no_grad():
        output = call(model, batch)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if own is None:
        return _at_each  # by the default
    try:
        logits = logits_of(output)
    except TypeError:  # one of several heads, whose losses are added up
        return None
    if logits.shape[:2] != labels.shape:
        return None
    here, after = _token_loss(logits, labels), _token_loss(logits[:, :-1], labels[:, 1:])
    differences = [abs(float(own) - value) for value in (here, after)]
    if not min(differences) <= (1e-4 if own.dtype.itemsize >= 4 else 2e-2) * abs(float(own)):
        return None
    return _at_the_next if differences[1] <= differences[0] else _at_each


def _few(batch: Batch, size: int, along: BatchDim) -> Batch:
    try:
        return first(batch, size, 2, along)
    except ValueError:  # one that cannot be cut
        return batch


def _token_loss(logits: Tensor, labels: Tensor) -> float:
    return float(functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()))


def _at_each(batch: Batch) -> float | None:
    return _Counted().of(in_two(batch)[1])


def _at_the_next(batch: Batch) -> float | None:
    return _Counted().of(in_two(batch)[1][:, 1:])
