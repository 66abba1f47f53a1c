"""Batches, how a model is called with them, and the loss on one."""

from torch_flowprune.inputs.data.arguments import arguments, call, takes, without_cache
from torch_flowprune.inputs.data.batch_axes import BatchDim, check_batch_dim
from torch_flowprune.inputs.data.batch_sizes import (
    BatchSize,
    check_batch_size,
    first,
    first_axis,
    halves,
    in_two,
    parts,
    samples,
    shapes,
    sized,
    spread_out,
)
from torch_flowprune.inputs.data.batches import (
    OneBatch,
    as_batches,
    check_readable_again,
    class_balanced,
    in_dtype,
    inputs_of,
)
from torch_flowprune.inputs.data.containers import Batch, mapped, tensors_in
from torch_flowprune.inputs.data.examples import example_for, example_of
from torch_flowprune.inputs.data.joined_batches import as_one
from torch_flowprune.inputs.data.objective import Closure, Loss, Objective, answer, logits_of, summed_outputs

__all__ = [
    "Batch",
    "BatchDim",
    "BatchSize",
    "Closure",
    "Loss",
    "Objective",
    "OneBatch",
    "answer",
    "arguments",
    "as_batches",
    "as_one",
    "call",
    "check_batch_dim",
    "check_batch_size",
    "check_readable_again",
    "class_balanced",
    "example_for",
    "example_of",
    "first",
    "first_axis",
    "halves",
    "in_dtype",
    "in_two",
    "inputs_of",
    "logits_of",
    "mapped",
    "parts",
    "samples",
    "shapes",
    "sized",
    "spread_out",
    "summed_outputs",
    "takes",
    "tensors_in",
    "without_cache",
]
