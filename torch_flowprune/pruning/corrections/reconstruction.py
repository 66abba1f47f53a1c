"""The weights that are left of a layer, set so that its outputs change least: one layer after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import Never

from torch_flowprune.inputs import (
    Target,
    check_keywords,
    check_readable_again,
    flags,
    parameters_of,
    shards_of,
    untouched,
    unwrapped,
    wide,
)
from torch_flowprune.pruning.corrections.layer_inputs import columns, input_products, unfit

_DAMPING = 1e-2
"""Of the mean second moment, added to each: a direction that the data never show keeps its weights."""
_SOLVER_STEPS = 500


@dataclass(frozen=True)
class LayerReconstruction:
    """What :func:`reconstruct` did to one layer.

    Attributes:
        name: the name of its weight.
        error_before: E‖(W − W₀)x‖² / E‖W₀x‖² over the data, with the masked weights W and the dense weights W₀ under
            the mask, each with the layer's bias.
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
        convolutions with zero padding, layers whose own forward does more than multiply, and layers that the data does
        not reach. A bias that a layer with another weight adds too stays as it is.

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
    biases = {module: one for one in known.values() for module, attribute in one.owners if attribute == "bias"}
    masked = {name: target for name, target in known.items() if target.mask is not None and target.parameter.dim() > 1}
    if not masked:
        raise ValueError("nothing is masked in this model: prune it first, and reconstruct before fp.remove")
    skipped = {name: reason for name, target in masked.items() if (reason := unfit(target))}
    done = []
    with untouched(inner, data), torch.no_grad(), _values_back_on_error([*masked.values(), *biases.values()]):
        for name, target in masked.items():
            if name in skipped:
                continue
            added, places = _biases_added(target, biases)
            products = input_products(inner, target, places, data, max_samples)
            if isinstance(products, str):
                skipped[name] = products
            else:
                done.append(_reconstruct_layer(target, added, products, damping))
    return Reconstruction(tuple(done), skipped)


def _biases_added(
    target: Target, biases: Mapping[nn.Module, Target]
) -> tuple[list[Target], dict[nn.Module, int | None]]:
    """The biases of the layers that have this weight, each once, and which of them each layer adds."""
    modules = [module for module, _ in target.owners]
    added = list({biases[module].name: biases[module] for module in modules if module in biases}.values())
    return added, {module: added.index(biases[module]) if module in biases else None for module in modules}


def _reconstruct_layer(target: Target, biases: list[Target], products: Tensor, damping: float) -> LayerReconstruction:
    """The layer's kept weights and biases, set in place: a bias is one more column, of an input that is 1.

    A bias that a layer of another weight adds too stays as it is.
    """
    modules = {module for module, _ in target.owners}
    kept = [columns(target, _free(target)), *(_free(bias)[:, None] for bias in biases)]
    owned = [True, *(all(module in modules for module, _ in bias.owners) for bias in biases)]
    goal = torch.cat(
        [columns(target, wide(target.parameter)), *(wide(b.parameter.detach())[:, None] for b in biases)], 1
    )
    free = torch.cat([mask & is_owned for mask, is_owned in zip(kept, owned, strict=True)], dim=1)
    start = torch.where(torch.cat(kept, dim=1), goal, 0)
    width = goal.shape[1] - len(biases)
    damped = products + damping * products.diagonal()[:width].mean() * torch.eye(len(products), device=products.device)
    solved = start + _least_squares(damped, start - goal, free)
    _set_kept(target, solved[:, :width].T if target.output_axis == 1 else solved[:, :width])
    for place, bias in enumerate(biases):
        _set_kept(bias, solved[:, width + place])
    errors = [_mean_square(change, products) for change in (goal, start - goal, solved - goal)]
    return LayerReconstruction(target.name, *(error / errors[0] if errors[0] else 0.0 for error in errors[1:]))


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
