"""Which channels live or die together, what they cost, and their physical removal."""

from torch_flowprune.channels.costs import COUNTED, Costs, Kept, LatencyTable, Size
from torch_flowprune.channels.counting import costs_of
from torch_flowprune.channels.coupling import couple, coupling_of, reading_of
from torch_flowprune.channels.group_masks import (
    channel_masks,
    clear_removed,
    kept_units,
    living_channels,
    living_channels_of,
    rows,
)
from torch_flowprune.channels.groups import Branch, Coupling
from torch_flowprune.channels.shrinking import (
    NarrowAttention,
    NarrowGroupNorm,
    NarrowLayerNorm,
    NarrowRMSNorm,
    ShrinkError,
    StandIn,
    Surgery,
    describe,
    is_as_built,
    is_left_behind,
    made_like,
    own_description,
    rebuild,
    register,
    replaced_modules,
    shrink,
    state_sizes,
)
from torch_flowprune.channels.slices import MASKED, Group, Slice
from torch_flowprune.channels.tracing import canonical_names
from torch_flowprune.channels.uniform import Dial, UniformSizes, uniform_sizes

__all__ = [
    "COUNTED",
    "MASKED",
    "Branch",
    "Costs",
    "Coupling",
    "Dial",
    "Group",
    "Kept",
    "LatencyTable",
    "NarrowAttention",
    "NarrowGroupNorm",
    "NarrowLayerNorm",
    "NarrowRMSNorm",
    "ShrinkError",
    "Size",
    "Slice",
    "StandIn",
    "Surgery",
    "UniformSizes",
    "canonical_names",
    "channel_masks",
    "clear_removed",
    "costs_of",
    "couple",
    "coupling_of",
    "describe",
    "is_as_built",
    "is_left_behind",
    "kept_units",
    "living_channels",
    "living_channels_of",
    "made_like",
    "own_description",
    "reading_of",
    "rebuild",
    "register",
    "replaced_modules",
    "rows",
    "shrink",
    "state_sizes",
    "uniform_sizes",
]
