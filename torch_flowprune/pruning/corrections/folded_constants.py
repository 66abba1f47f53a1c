"""What removed channels passed on whatever the input was, added to the bias of what reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.channels import Coupling, couple, living_channels
from torch_flowprune.gradients import FlowSource, flow_over
from torch_flowprune.inputs import (
    Closure,
    Loss,
    call,
    check_keywords,
    copied_model,
    example_of,
    parameters_of,
    tree_leaves,
    untouched,
    unwrapped,
)
from torch_flowprune.masking import masks
from torch_flowprune.pruning.corrections.constant_readers import (
    Reader,
    close_unfolded,
    closed_readers,
    find_shift,
    observe,
    open_removed,
    readers_of,
)

_LEAKS = "what is removed reaches more than layers that multiply it, such as a norm over channels"


@dataclass(frozen=True)
class FoldedLayer:
    """The constants that were added to one layer for the removed channels that it read.

    Attributes:
        name: the name of its weight.
        channels: how many of the removed channels that it read were constants.
        into: the bias, or the running mean of the norm behind it, that they were added to.
        largest: the largest value that was added.

    See Also:
        :class:`~torch_flowprune.FoldedConstants`: all layers together.
    """

    name: str
    channels: int
    into: str
    largest: float


@dataclass(frozen=True)
class FoldedConstants:
    """What :func:`fold_constants` did.

    Attributes:
        layers: one entry for each layer that took constants, in the order of the model's groups.
        left: the names of the other layers' weights, each with the reason.
        loss_before: the loss of the pruned model before, if data was given.
        loss_after: the loss afterwards.

    >>> import torch, torch_flowprune as fp
    >>> x = torch.randn(5, 4)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    >>> _ = fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    >>> fp.fold_constants(model, x).layers[0].into
    '2.bias'
    """

    layers: tuple[FoldedLayer, ...]
    left: dict[str, str]
    loss_before: float | None = None
    loss_after: float | None = None

    def __str__(self) -> str:
        lines = [
            f"{one.name}: {one.channels} channels into {one.into}, at most {one.largest:.3g}" for one in self.layers
        ]
        lines += [f"{name}: left, {reason}" for name, reason in self.left.items()]
        moved = [] if self.loss_after is None else [f"loss {self.loss_before:.4g} -> {self.loss_after:.4g}"]
        return "\n".join([*moved, *lines])


def fold_constants(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    data: object = None,
    loss: Loss | None = None,
    closure: Closure | None = None,
    coupling: Coupling | None = None,
    **unknown: Never,
) -> FoldedConstants:
    """Keep the constants that removed channels passed on: their biases, through the layers that follow.

    A channel without weights would still pass on a constant: its bias, or the shift of its norm, through the
    activation. Pruning removes this constant too. This call adds it to the bias of the layers that read the channel or,
    if they have none, to the running mean of a batch norm right behind. The model then computes what it would with only
    the weights of the removed channels at zero. The masked model and the result of ``shrink`` stay equal. It is done
    only where a test on the example shows that it is exact: not at zero padding, not behind a norm over
    channels, and not where a gate makes the constant depend on the input. The example should be as varied as the data.

    Args:
        model: pruned by channels, with its masks (``fp.remove`` and ``fp.shrink`` drop the biases); changed in place.
        example_inputs: what the model is called with, two samples or more; if left out, the inputs of the first batch.
        data, loss, closure: batches and the loss to measure before and after, see :func:`~torch_flowprune.flow`;
            without them no loss is measured.
        coupling: the result of :func:`~torch_flowprune.couple` for this model, if you have it.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        Which layers got how many constants, which did not and why, and the loss before and after.

    Raises:
        ValueError: if no channel is masked; the model is as it was.

    See Also:
        :func:`~torch_flowprune.recalibrate`: recomputes batch-norm statistics.

    >>> import torch, torch_flowprune as fp
    >>> _ = torch.manual_seed(0)
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)), torch.randn(5, 4)
    >>> _ = fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    >>> print(fp.fold_constants(model, x))  # doctest: +ELLIPSIS
    2.weight: 4 channels into 2.bias, at most 0...
    """
    check_keywords(fold_constants, unknown)
    source, inner = FlowSource(data, loss, closure), unwrapped(model)
    example = example_of(data, example_inputs, next(inner.parameters()).device)
    coupling = couple(inner, example) if coupling is None else coupling
    gone = {name: ~kept for name, kept in living_channels(coupling, masks(inner)).items() if not kept.all()}
    if not gone:
        raise ValueError(
            "no channel of this model is masked: prune it with granularity='channel' first, and fold before fp.remove "
            "or fp.shrink, which lose the biases"
        )
    before = None if data is None else flow_over(source, model, ("g",)).loss
    done = _fold(inner, example, coupling, gone)
    after = None if data is None else flow_over(source, model, ("g",)).loss
    return FoldedConstants(tuple(done.layers), done.left, before, after)


@dataclass
class _Done:
    layers: list[FoldedLayer] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def _fold(model: nn.Module, example: Any, coupling: Coupling, gone: Mapping[str, Tensor]) -> _Done:
    done = _folded(model, example, coupling, gone)
    if done is None:
        sealed = {name: units for name, units in gone.items() if _is_sealed(model, example, coupling, name, units)}
        done = _folded(model, example, coupling, sealed)
        parts = [part for name in gone if name not in sealed for part in coupling[name].slices]
        others = [part.parameter for part in parts if part.role == "consumer"]
        if done is not None:
            done.left.update(dict.fromkeys(others, _LEAKS))
    if done is None:
        raise RuntimeError(
            "with the removed channels' constants folded the model does not compute what it did with their weights "
            "alone at zero: nothing was changed"
        )
    return done


def _folded(model: nn.Module, example: Any, coupling: Coupling, gone: Mapping[str, Tensor]) -> _Done | None:
    """First into norms too, then without them, where a norm was not the only one to read what it normalised."""
    for norms in (True, False):
        opened = copied_model(model)
        readers = readers_of(opened, coupling, gone)
        open_removed(opened, coupling, gone)
        with untouched(opened, mode="eval"), torch.no_grad():
            observe(opened, readers, example)
            for reader in readers:
                find_shift(reader, norms=norms)
            close_unfolded(readers)
        expected = _given_out(opened, example)
        done, undo = _put_shifts(model, opened, readers)
        equal = False
        try:
            equal = _all_near(_given_out(model, example), expected)
        finally:
            if not equal:
                undo()
        if equal:
            done.left.update(closed_readers(model, coupling, gone))
            return done
    return None


def _is_sealed(model: nn.Module, example: Any, coupling: Coupling, name: str, units: Tensor) -> bool:
    """Whether what these channels pass on is read by layers alone: with their columns at zero it changes nothing."""
    opened = copied_model(model)
    open_removed(opened, coupling, {name: units})
    with torch.no_grad():
        close_unfolded(readers_of(opened, coupling, {name: units}))
    return _all_near(_given_out(opened, example), _given_out(model, example))


def _given_out(model: nn.Module, example: Any) -> list[Any]:
    with untouched(model, mode="eval"), torch.no_grad():
        return tree_leaves(call(model, example))


def _all_near(found: list[Any], expected: list[Any]) -> bool:
    return all(_near(a, b) for a, b in zip(found, expected, strict=True))


def _put_shifts(model: nn.Module, opened: nn.Module, readers: list[Reader]) -> tuple[_Done, Callable[[], None]]:
    """Onto the model itself; and the way back."""
    names = {module: name for name, module in opened.named_modules()}
    modules, known = dict(model.named_modules()), parameters_of(model)
    done, kept = _Done(), list[tuple[Tensor, Tensor]]()
    with torch.no_grad():
        for reader in readers:
            weight = known[reader.weight.name]
            if reader.shift is None or reader.folded is None:
                done.left[weight.name] = reader.reason
                continue
            if reader.bias is not None:
                into, bias = reader.bias.name, known[reader.bias.name]
                value, shift = bias.parameter.data, reader.shift
                shift = shift if bias.mask is None else torch.where(bias.mask.bool(), shift, 0)
            else:
                behind = names[reader.behind]
                into, value, shift = f"{behind}.running_mean", modules[behind].running_mean, -reader.shift
            places = reader.part.index[reader.folded.cpu()].reshape(-1).to(weight.parameter.device)
            kept += [(tensor, tensor.clone()) for tensor in (value, weight.parameter.data)]
            value.add_(shift.to(value.dtype))
            weight.parameter.data.index_fill_(reader.part.axis, places, 0)  # under the mask: it is read no second time
            count = int(reader.folded.sum())
            done.layers.append(FoldedLayer(weight.name, count, into, float(reader.shift.abs().max())))

    def undo() -> None:
        for tensor, value in reversed(kept):
            tensor.copy_(value)

    return done, undo


def _near(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return True
    size = max(float(expected.abs().max()), 1e-30)
    return bool(((found - expected).abs().max() / size) <= torch.finfo(found.dtype).eps ** 0.5)
