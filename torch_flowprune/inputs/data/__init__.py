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
    Batch,
    OneBatch,
    as_batches,
    check_readable_again,
    class_balanced,
    example_of,
    in_dtype,
    inputs_of,
    tensors_in,
)
from torch_flowprune.inputs.data.objective import Closure, Loss, Objective, answer, logits_of

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
    "call",
    "check_batch_dim",
    "check_batch_size",
    "check_readable_again",
    "class_balanced",
    "example_of",
    "first",
    "first_axis",
    "halves",
    "in_dtype",
    "in_two",
    "inputs_of",
    "logits_of",
    "parts",
    "samples",
    "shapes",
    "sized",
    "spread_out",
    "takes",
    "tensors_in",
    "without_cache",
]
