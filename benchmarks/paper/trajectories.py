"""Where ‖θ(t)‖² goes after a cut, beside where it goes without one (claim ii): in the flow itself, and in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import torch_flowprune as fp
from benchmarks.paper import experiment, models
from benchmarks.paper.data import Batch, Data
from benchmarks.paper.experiment import Part, Row, Setting

NONE = "none"
Loss = Callable[[nn.Module, list[nn.Parameter], Batch], tuple[float, tuple[Tensor, ...]]]
"""The loss, and its gradient with respect to the parameters."""
DRAWN = (
    "magnitude", "loss_preservation", "biased_loss_preservation", "fisher", "random",
    "gradient_norm_increase T=200", "gradient_norm_preservation T=1",
)  # fmt: skip
HORIZON = 0.5
"""Of the flow, in its own time; SGD at rate 0.05 with momentum 0.9 covers as much in a step."""
POINTS, EPOCHS = 20, 2


def trajectories(data: Data, setting: Setting, seed: int) -> Iterator[Part]:
    """‖θ(t)‖² from each cut, and from the net that was not cut, at every age of the net."""
    batches, whole = experiment.scored(data, setting, seed)
    for epoch, model in experiment.snapshots(data, setting, seed).items():
        yield f"{epoch}/symmetry", partial(symmetry, model, whole)
        yield f"{epoch}/{NONE}", partial(_paths, model, NONE, 0.0, whole, data, setting, seed, epoch)
        scores = experiment.scores_of(model, batches, seed, "filter")
        for name in DRAWN:
            yield f"{epoch}/{name}", partial(_cut_paths, model, scores[name], name, whole, data, setting, seed, epoch)


def _cut_paths(
    model: nn.Module, scores: fp.Scores, name: str, whole: Batch, data: Data, setting: Setting, seed: int, epoch: int
) -> list[Row]:
    cuts = {sparsity: experiment.pruned(model, scores, sparsity) for sparsity in setting.sparsities}
    return [
        row for sparsity, cut in cuts.items() for row in _paths(cut, name, sparsity, whole, data, setting, seed, epoch)
    ]


def _paths(
    model: nn.Module, name: str, sparsity: float, whole: Batch, data: Data, setting: Setting, seed: int, epoch: int
) -> list[Row]:
    times, norms = flowing(model, whole)
    row = {"method": name, "sparsity": sparsity}
    trained = training(model, data, setting, range(epoch, epoch + EPOCHS), seed)
    return [
        {**row, "kind": "flow", "times": times, "norms": norms},
        {**row, "kind": "training", "times": None, "norms": trained},
    ]


def flowing(
    model: nn.Module,
    batch: Batch,
    horizon: float = HORIZON,
    points: int = POINTS,
    limit: int = 60,
    step: float | None = None,
    loss: Loss | None = None,
) -> tuple[list[float], list[float]]:
    """‖θ(t)‖² along dθ/dt = −g of the loss that is scored, in eval mode.

    By Euler steps that are halved until the loss falls. The times are those of the steps nearest behind ``points``
    equal shares of the horizon; a flow that is too stiff for ``limit`` steps ends early, and its last time says so.
    """
    model = copy.deepcopy(model).eval()
    parameters, derive = [p for p in model.parameters() if p.requires_grad], loss or _loss
    longest = step or horizon / points
    time, step, wanted = 0.0, longest, 1
    times, norms = [0.0], [norm(model)]
    value, g = derive(model, parameters, batch)
    for _ in range(limit):
        size = min(step, horizon * wanted / points - time)
        _move(parameters, g, -size)
        new_value, new_g = derive(model, parameters, batch)
        if not new_value <= value:
            _move(parameters, g, size)
            step = size / 2
            continue
        time, value, g, step = time + size, new_value, new_g, min(longest, max(step, 1.5 * size))
        if time >= horizon * wanted / points * (1 - 1e-9):
            times.append(time)
            norms.append(norm(model))
            wanted += 1
            if wanted > points:
                break
    return times, norms


def training(
    model: nn.Module, data: Data, setting: Setting, epochs: range, seed: int, points: int = POINTS
) -> list[float]:
    """‖θ‖² at equal distances of steps, as the setting trains: momentum, weight decay, batch norm in train mode."""
    model, norms = copy.deepcopy(model), [norm(model)]
    every = max(1, len(epochs) * -(-len(data.train) // setting.batch) // points)
    for step, _ in enumerate(experiment.steps(model, data, setting, epochs, seed), 1):
        if step % every == 0:
            norms.append(norm(model))
    return norms


def symmetry(model: nn.Module, batch: Batch) -> list[Row]:
    """Σ|θᵀg| over filters where a batch norm follows, by mode, and the Σ|θ·g| that it could be at most.

    In train mode batch norm undoes any rescaling of a filter, so θᵀg = 0 but for its ε: the first-order motion of ‖θ‖²
    is a matter of mode.
    """
    rows = []
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if any(module is owner for owner, _ in models.prunable(model))
    ]
    for mode in ("eval", "train"):
        at = fp.flow(model, batch, needs=("g",), mode=mode, progress=False)
        products = [at.tensors("theta")[name] * at.tensors("g")[name] for name in names]
        filters = sum(one.flatten(1).sum(1).abs().sum().item() for one in products)
        weights = sum(one.abs().sum().item() for one in products)
        rows.append(
            {"method": NONE, "kind": "symmetry", "sparsity": 0.0, "mode": mode, "filters": filters, "weights": weights}
        )
    return rows


def norm(model: nn.Module) -> float:
    return sum(theta.square().sum(dtype=torch.float64).item() for theta in fp.flow(model, needs=()).theta.values())


def _loss(model: nn.Module, parameters: list[nn.Parameter], batch: Batch) -> tuple[float, tuple[Tensor, ...]]:
    loss = functional.cross_entropy(model(batch[0]), batch[1])
    return loss.item(), torch.autograd.grad(loss, parameters)


@torch.no_grad()
def _move(parameters: list[nn.Parameter], direction: tuple[Tensor, ...], size: float) -> None:
    for parameter, one in zip(parameters, direction, strict=True):
        parameter.add_(one, alpha=size)
