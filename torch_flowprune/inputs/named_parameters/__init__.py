"""A model's parameters by the names users know: each once, what may be pruned, and what is masked."""

from torch_flowprune.inputs.named_parameters.aliases import forms, own_names
from torch_flowprune.inputs.named_parameters.factors import parameters_and_factors
from torch_flowprune.inputs.named_parameters.names import (
    is_mask,
    mask_of,
    masked_name,
    original,
    plain_name,
    without_wrappers,
)
from torch_flowprune.inputs.named_parameters.parameters import (
    parameters_of,
    prunable,
    unwrapped,
    wide,
    wide_type,
    with_names_of_state,
)
from torch_flowprune.inputs.named_parameters.patterns import Pattern, holds_modules, matching
from torch_flowprune.inputs.named_parameters.target import Pair, Target, check_shapes, is_computed_on_access
from torch_flowprune.inputs.named_parameters.unprunable import (
    computed,
    computed_weights,
    computes_weight,
    is_factor,
    no_such_parameter,
)
from torch_flowprune.inputs.named_parameters.zeros import (
    clear,
    flags,
    gradients_under_masks,
    lasting,
    masked,
    masked_for_now,
)

__all__ = [
    "Pair",
    "Pattern",
    "Target",
    "check_shapes",
    "clear",
    "computed",
    "computed_weights",
    "computes_weight",
    "flags",
    "forms",
    "gradients_under_masks",
    "holds_modules",
    "is_computed_on_access",
    "is_factor",
    "is_mask",
    "lasting",
    "mask_of",
    "masked",
    "masked_for_now",
    "masked_name",
    "matching",
    "no_such_parameter",
    "original",
    "own_names",
    "parameters_and_factors",
    "parameters_of",
    "plain_name",
    "prunable",
    "unwrapped",
    "wide",
    "wide_type",
    "with_names_of_state",
    "without_wrappers",
]
