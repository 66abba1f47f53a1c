"""A trial run of a model on a few samples of what a call was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from torch_flowprune.gradients import FlowSource
from torch_flowprune.inputs import as_batches, call, example_of, sized

_SAMPLES = 2


def trial_of(model: nn.Module, source: FlowSource) -> Callable[[], object] | None:
    """Runs the model as a sweep does, on two samples, or else on the example input.

    None where there is neither, or only an iterator, which is not there to be used up.
    """
    has_data = source.data is not None and not isinstance(source.data, Iterator)
    if not has_data and source.example_inputs is None:
        return None
    device = next(model.parameters()).device

    def run() -> object:
        with torch.autocast(device.type, source.autocast, enabled=source.autocast is not None):
            if not has_data:
                return call(model, example_of(None, source.example_inputs, device))
            few = _SAMPLES if source.batch_size is None else None  # else where samples lie may not be known
            batch, _ = next(sized(as_batches(source.data), device, few, source.batch_size, source.batch_dim))
            return source.objective.forward(model, batch)

    return run
