"""What carries the mask of one module: its class, its hook, and what is written to its weight."""

from torch_flowprune.masking.carrier.class_chain import quiet_subclass
from torch_flowprune.masking.carrier.hook import (
    check_removable,
    drop_hook,
    factors,
    list_again,
    permanent,
    pruned_names,
    pruning_hooks,
    put_on,
    take_off,
    undress,
    write,
)
from torch_flowprune.masking.carrier.own_loaders import values_intact_on_error
from torch_flowprune.masking.carrier.parametrization import masked_kind
from torch_flowprune.masking.carrier.same_bits import same_bits
from torch_flowprune.masking.carrier.sharded import (
    hold_in_shard,
    release_shard,
    shard_hook,
    values_back,
    values_back_on_error,
)
from torch_flowprune.masking.carrier.weight_standardization import CONVOLUTIONS, standardises

__all__ = [
    "CONVOLUTIONS",
    "check_removable",
    "drop_hook",
    "factors",
    "hold_in_shard",
    "list_again",
    "masked_kind",
    "permanent",
    "pruned_names",
    "pruning_hooks",
    "put_on",
    "quiet_subclass",
    "release_shard",
    "same_bits",
    "shard_hook",
    "standardises",
    "take_off",
    "undress",
    "values_back",
    "values_back_on_error",
    "values_intact_on_error",
    "write",
]
