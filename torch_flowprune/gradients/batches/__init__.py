"""The loss and its derivatives on one batch, and sums over batches."""

from torch_flowprune.gradients.batches.batch_derivatives import Derivatives, Grads
from torch_flowprune.gradients.batches.batch_streams import SizedBatch, length_of, until, with_progress
from torch_flowprune.gradients.batches.checkpointing import no_hidden_blocks
from torch_flowprune.gradients.batches.loss_of_parts import Additivity
from torch_flowprune.gradients.batches.loss_weights import LossWeights, Reduction, check_reduction
from torch_flowprune.gradients.batches.memory_budget import Resources, in_bytes
from torch_flowprune.gradients.batches.microbatches import Graphs, MicroBatches, check_runs_alone
from torch_flowprune.gradients.batches.other_mode import other_mode_told
from torch_flowprune.gradients.batches.parts_that_run import parts_that_run
from torch_flowprune.gradients.batches.same_data import SampleLosses, check_same_count, check_same_losses
from torch_flowprune.gradients.batches.weighted_sums import (
    add_weighted,
    add_weighted_squares,
    check_read,
    detached,
    dot_product,
    finite_mean_loss,
    over_ranks,
    scale,
    standard_error,
    taken,
    zero_sums,
)

__all__ = [
    "Additivity",
    "Derivatives",
    "Grads",
    "Graphs",
    "LossWeights",
    "MicroBatches",
    "Reduction",
    "Resources",
    "SampleLosses",
    "SizedBatch",
    "add_weighted",
    "add_weighted_squares",
    "check_read",
    "check_reduction",
    "check_runs_alone",
    "check_same_count",
    "check_same_losses",
    "detached",
    "dot_product",
    "finite_mean_loss",
    "in_bytes",
    "length_of",
    "no_hidden_blocks",
    "other_mode_told",
    "over_ranks",
    "parts_that_run",
    "scale",
    "standard_error",
    "taken",
    "until",
    "with_progress",
    "zero_sums",
]
