"""What the user hands in: a model and its parameters, data, a loss, processes; looked at without a trace."""

from torch_flowprune.inputs.batches import Batch, as_batches, class_balanced, example_of, first, halves, parts, samples, shapes, sized
from torch_flowprune.inputs.objective import Closure, Loss, Objective, logits_of
from torch_flowprune.inputs.parameters import (
    Pair,
    Pattern,
    Target,
    clear,
    computed,
    flags,
    masked,
    no_such_parameter,
    parameters_of,
    prunable,
    unwrapped,
    wide,
    wide_type,
)
from torch_flowprune.inputs.processes import Ranks
from torch_flowprune.inputs.state_guard import Restore, cpu_generator, same_randomness, settle, untouched

__all__ = [
    "Batch",
    "Closure",
    "Loss",
    "Objective",
    "Pair",
    "Pattern",
    "Ranks",
    "Restore",
    "Target",
    "as_batches",
    "class_balanced",
    "clear",
    "computed",
    "cpu_generator",
    "example_of",
    "first",
    "flags",
    "halves",
    "logits_of",
    "masked",
    "no_such_parameter",
    "parameters_of",
    "parts",
    "prunable",
    "same_randomness",
    "samples",
    "settle",
    "shapes",
    "sized",
    "untouched",
    "unwrapped",
    "wide",
    "wide_type",
]
