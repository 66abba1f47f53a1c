"""The weights that are left of a layer, set so that its outputs change least: one layer after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold
from typing_extensions import Never

from torch_flowprune.inputs import (
    Objective,
    Target,
    as_batches,
    check_keywords,
    check_readable_again,
    first_axis,
    flags,
    parameters_of,
    shards_of,
    sized,
    untouched,
    unwrapped,
    wide,
)

_DAMPING = 1e-2
"""Of the mean second moment, added to each: a direction that the data never show keeps its weights."""
_SOLVER_STEPS = 500


@dataclass(frozen=True)
class LayerReconstruction:
    """What :func:`reconstruct` did to one layer.

    Attributes:
        name: the name of its weight.
        error_before: E‖(W − W₀)x‖² / E‖W₀x‖² over the data, with the masked weights W and the dense weights W₀ under
            the mask.
        error_after: the same after the kept weights and the bias were refitted.

    See Also:
        :class:`~torch_flowprune.Reconstruction`: all layers together.
    """

    name: str
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Reconstruction:
    """What :func:`reconstruct` did.

    Attributes:
        layers: one entry for each refitted layer, in model order.
        skipped: the names of the other masked weights, each with the reason.

    >>> import torch, torch_flowprune as fp
    >>> layer, x = torch.nn.Linear(8, 4), torch.randn(64, 8)
    >>> _ = fp.global_prune(layer, "magnitude", 0.5)
    >>> found = fp.reconstruct(layer, (x, torch.zeros(64)))
    >>> found.layers[0].name, found.skipped
    ('weight', {})
    """

    layers: tuple[LayerReconstruction, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':{width}}  {'error before':>12}  {'after':>10}"]
        lines += [f"{one.name:{width}}  {one.error_before:>12.3g}  {one.error_after:>10.3g}" for one in self.layers]
        return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in self.skipped.items())])


def reconstruct(
    model: nn.Module,
    data: object = None,
    *,
    max_samples: int | None = None,
    damping: float = _DAMPING,
    **unknown: Never,
) -> Reconstruction:
    """Refit the kept weights of each masked layer, so that its outputs are as close to the dense layer's as possible.

    Layer by layer, in model order, this matches the outputs of the dense weights (kept under the mask), on the inputs
    that the layer gets in the pruned model: min ‖(W − W₀)x‖² over the kept weights and the bias. This is a
    least-squares problem, solved to working precision by conjugate gradients. The model's gradient is not needed. Masks
    and the zeros under them stay.

    Args:
        model: pruned, with its masks (``fp.remove`` would have dropped the dense weights); changed in place.
        data: an iterable of batches, or one batch, that can be read once per layer; targets are not read. A few hundred
            samples or sequences are usually enough.
        max_samples: read at most this many samples.
        damping: the fraction of the mean of the inputs' second moments that is added to each of them.
        unknown: no other keyword is accepted; the error names the one meant.

    Returns:
        Each layer's error before and after, and the layers that were skipped: all but linear layers and ungrouped 2-d
        convolutions with zero padding, and layers that the data does not reach.

    Raises:
        ValueError: if nothing is masked, if the data is empty or can be read only once, or for a sharded model; the
            model is as it was.

    Source: Frantar & Alistarh 2023, "SparseGPT", solve the same problem approximately, in one sweep over the columns.

    See Also:
        :func:`~torch_flowprune.recalibrate`: recomputes batch-norm statistics.

    >>> import torch, torch_flowprune as fp
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(64, 8)
    >>> _ = fp.global_prune(model, "magnitude", 0.5)
    >>> layers = fp.reconstruct(model, (x, torch.zeros(64))).layers
    >>> all(layer.error_after < layer.error_before for layer in layers)
    True
    """
    check_keywords(reconstruct, unknown)
    check_readable_again("the data are read once a layer", data)
    if damping < 0:
        raise ValueError(f"damping should be at least 0, got {damping}")
    inner = unwrapped(model)
    if shards_of(inner):
        raise ValueError(
            "reconstruct solves for the weights of whole layers, and this model is sharded: reconstruct it before it "
            "is sharded, or where it is whole, on one rank with the full state dict"
        )
    known = parameters_of(inner)
    biases = {owner: target for target in known.values() for owner in target.owners if owner[1] == "bias"}
    masked = {name: target for name, target in known.items() if target.mask is not None and target.parameter.dim() > 1}
    if not masked:
        raise ValueError("nothing is masked in this model: prune it first, and reconstruct before fp.remove")
    skipped = {name: reason for name, target in masked.items() if (reason := _unfit(target))}
    done = []
    with untouched(inner, data), torch.no_grad(), _values_back_on_error([*masked.values(), *biases.values()]):
        for name, target in masked.items():
            if name in skipped:
                continue
            moments = _moments(inner, target, data, max_samples)
            if moments is None:
                skipped[name] = "the data do not reach it"
            else:
                done.append(_reconstruct_layer(target, biases.get((target.owners[0][0], "bias")), moments, damping))
    return Reconstruction(tuple(done), skipped)


def _unfit(target: Target) -> str | None:
    for module, attribute in target.owners:
        if attribute != "weight" or not (_is_linear(module) or isinstance(module, nn.Conv2d)):
            return f"a {type(module).__name__}'s {attribute} is not multiplied with the layer's inputs alone"
        if isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros"):
            return "a convolution in groups, or padded with other values than 0"
    return None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _moments(model: nn.Module, target: Target, data: object, max_samples: int | None) -> Tensor | None:
    """E[x xᵀ] of what the layer's weight is multiplied with, and of a 1 for the bias behind it."""
    total, count = None, 0

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal total, count
        rows = _rows(module, args[0] if args else next(iter(keywords.values())))
        rows = pad(rows, (0, 1), value=1.0)
        product = rows.T @ rows
        total, count = product if total is None else total.add_(product), count + len(rows)

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module, _ in target.owners]
    try:
        read = 0
        for batch, size in sized(as_batches(data), target.parameter.device, max_samples, first_axis):
            read += size
            Objective().forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not read:
        raise ValueError("the data is empty: at least one batch is needed (an exhausted iterator? pass a DataLoader)")
    return None if total is None else total / count


def _rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """What one row of the weight is multiplied with, one a row."""
    inputs = wide(inputs.detach())
    if isinstance(module, nn.Conv2d):
        padded = pad(inputs, [side for both in reversed(_padding(module)) for side in both])
        columns = unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
        return columns.transpose(1, 2).flatten(0, 1)
    return inputs.flatten(0, -2)


def _padding(module: nn.Conv2d) -> list[tuple[int, int]]:
    """How many zeros a convolution puts before and behind each axis of an image."""
    if module.padding == "same":
        more = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(zeros // 2, zeros - zeros // 2) for zeros in more]
    return [(0, 0)] * 2 if module.padding == "valid" else [(zeros, zeros) for zeros in module.padding]  # type: ignore[misc]


def _reconstruct_layer(target: Target, bias: Target | None, moments: Tensor, damping: float) -> LayerReconstruction:
    """The layer's kept weights and bias, set in place: the bias is one more column, of an input that is 1."""
    dense, kept = _columns(target, target.parameter), _columns(target, _free(target))
    if bias is None:
        goal, free = pad(wide(dense), (0, 1)), pad(kept, (0, 1))
    else:
        goal = torch.cat([wide(dense), wide(bias.parameter.detach())[:, None]], dim=1)
        free = torch.cat([kept, _free(bias)[:, None]], dim=1)
    start = torch.where(free, goal, 0)
    damped = moments + damping * moments.diagonal().mean() * torch.eye(len(moments), device=moments.device)
    solved = start + _least_squares(damped, start - goal, free)
    _set_kept(target, solved[:, :-1].T if target.output_axis == 1 else solved[:, :-1])
    if bias is not None:
        _set_kept(bias, solved[:, -1])
    errors = [_mean_square(change, moments) for change in (goal, start - goal, solved - goal)]
    return LayerReconstruction(target.name, *(error / errors[0] if errors[0] else 0.0 for error in errors[1:]))


def _columns(target: Target, tensor: Tensor) -> Tensor:
    """A weight, or its mask, with a row for each output."""
    return tensor.detach().T if target.output_axis == 1 else tensor.detach().flatten(1)


def _free(target: Target) -> Tensor:
    mask = target.mask
    return (
        torch.ones_like(target.parameter, dtype=torch.bool) if mask is None else flags(mask).to(target.parameter.device)
    )


def _mean_square(change: Tensor, moments: Tensor) -> float:
    """E‖change · x‖²."""
    return float(((change @ moments) * change).sum(dtype=torch.float64))


def _least_squares(H: Tensor, change: Tensor, free: Tensor) -> Tensor:
    """The step s, zero where not ``free``, that makes (change + s) H (change + s)ᵀ least, row by row.

    Conjugate gradients, all rows at once, with the diagonal of H as preconditioner.
    """
    tolerance = 100 * torch.finfo(change.dtype).eps
    scale = H.diagonal().clamp_min(torch.finfo(H.dtype).tiny)
    step, rest = torch.zeros_like(change), torch.where(free, -(change @ H), 0)
    along = rest / scale
    product = (rest * along).sum(-1, keepdim=True)
    enough = tolerance**2 * product
    for _ in range(_SOLVER_STEPS):
        if bool((product <= enough).all()):
            break
        image = torch.where(free, along @ H, 0)
        length = _ratio(product, (along * image).sum(-1, keepdim=True))
        step, rest = step + length * along, rest - length * image
        scaled = rest / scale
        before, product = product, (rest * scaled).sum(-1, keepdim=True)
        along = scaled + _ratio(product, before) * along
    return step


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """0 for rows that are done."""
    return torch.where(other > 0, one / other, 0)


def _set_kept(target: Target, values: Tensor) -> None:
    """The kept weights; what lies under the mask stays as it is."""
    parameter = target.parameter
    parameter.copy_(torch.where(_free(target), values.reshape(parameter.shape).to(parameter.dtype), parameter))


@contextmanager
def _values_back_on_error(targets: list[Target]) -> Iterator[None]:
    tensors = [target.parameter for target in targets]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        raise
