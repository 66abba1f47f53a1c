"""What the user hands in: a model and its parameters, data, a loss, processes; looked at without a trace."""

from torch_flowprune.inputs.aliases import forms, own_names
from torch_flowprune.inputs.arguments import arguments, call
from torch_flowprune.inputs.batch_sizes import (
    BatchSize,
    check_batch_size,
    first,
    first_axis,
    halves,
    in_two,
    parts,
    samples,
    sized,
    spread_out,
)
from torch_flowprune.inputs.batches import Batch, as_batches, class_balanced, example_of, inputs_of, shapes
from torch_flowprune.inputs.names import is_mask, mask_of, masked_name, original, plain_name, without_wrappers
from torch_flowprune.inputs.objective import Closure, Loss, Objective, logits_of
from torch_flowprune.inputs.options import check_options, from_options
from torch_flowprune.inputs.parameters import parameters_of, prunable, unwrapped, wide, wide_type
from torch_flowprune.inputs.patterns import Pattern
from torch_flowprune.inputs.processes import Ranks
from torch_flowprune.inputs.state_guard import (
    Restore,
    check_mode,
    cpu_generator,
    on_host,
    same_randomness,
    settle,
    untouched,
)
from torch_flowprune.inputs.target import Pair, Target
from torch_flowprune.inputs.unprunable import computed, no_such_parameter
from torch_flowprune.inputs.zeros import clear, flags, lasting, masked

__all__ = [
    "Batch",
    "BatchSize",
    "Closure",
    "Loss",
    "Objective",
    "Pair",
    "Pattern",
    "Ranks",
    "Restore",
    "Target",
    "arguments",
    "as_batches",
    "call",
    "check_batch_size",
    "check_mode",
    "check_options",
    "class_balanced",
    "clear",
    "computed",
    "cpu_generator",
    "example_of",
    "first",
    "first_axis",
    "flags",
    "forms",
    "from_options",
    "halves",
    "in_two",
    "inputs_of",
    "is_mask",
    "lasting",
    "logits_of",
    "mask_of",
    "masked",
    "masked_name",
    "no_such_parameter",
    "on_host",
    "original",
    "own_names",
    "parameters_of",
    "parts",
    "plain_name",
    "prunable",
    "same_randomness",
    "samples",
    "settle",
    "shapes",
    "sized",
    "spread_out",
    "untouched",
    "unwrapped",
    "wide",
    "wide_type",
    "without_wrappers",
]
