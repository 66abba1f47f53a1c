"""The loss of a model on data that its scores need not have seen."""

from __future__ import annotations

import torch
from torch import nn

from torch_flowprune.gradients import DataRanks, FlowSource, LossWeights, in_shards, other_mode_told
from torch_flowprune.inputs import Ranks, as_batches, parameters_of, sized, untouched


def mean_loss(model: nn.Module, source: FlowSource, ranks: Ranks) -> tuple[float, int]:
    """The mean loss over all the data of all ranks, and the number of samples; the model is left as it was."""
    total, whole, samples, ranks = 0.0, 0.0, 0, DataRanks.of_shards(model, ranks)
    weights = LossWeights(model, source.objective, source.reduction, source.batch_dim)
    device = next(iter(parameters_of(model).values())).parameter.device
    with in_shards(model), untouched(model, source.data, source.mode, source.functions):
        own = sized(as_batches(source.data), device, None, source.batch_size, source.batch_dim)
        for batch, size in ranks.in_step(own):
            samples += size
            weight = weights(batch, size) if size else 0.0
            if weight or ranks.run_together:
                with other_mode_told(model, source.objective, batch, source.mode, alone=not ranks.run_together):
                    loss = source.objective.number_alone(model, batch)
                total += weights.mean(loss, size).item() * weight if weight else 0.0
                whole += weight
    sums = torch.tensor([total, whole, samples], dtype=torch.float64, device=device)
    ranks.sum([sums])
    total, whole, samples = sums[0].item(), sums[1].item(), int(sums[2])
    if not samples:
        raise ValueError("the held-out data is empty: at least one batch is needed")
    return total / whole if whole else float("nan"), samples
