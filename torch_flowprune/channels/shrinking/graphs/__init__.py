"""A module's exported graph in its place, guarded."""

from torch_flowprune.channels.shrinking.graphs.call_guard import BuiltForError, CallGuard, guard_of
from torch_flowprune.channels.shrinking.graphs.exported_module import (
    ExportedModule,
    canonical_call,
    free_sizes,
    recorded_calls,
    resized_graph,
)
from torch_flowprune.channels.shrinking.graphs.graft import graft
from torch_flowprune.channels.shrinking.graphs.graph_modes import Modes, modes_of
from torch_flowprune.channels.shrinking.graphs.graph_sizes import RESIZERS, flat_numbers, resized_arguments

__all__ = [
    "RESIZERS",
    "BuiltForError",
    "CallGuard",
    "ExportedModule",
    "Modes",
    "canonical_call",
    "flat_numbers",
    "free_sizes",
    "graft",
    "guard_of",
    "modes_of",
    "recorded_calls",
    "resized_arguments",
    "resized_graph",
]
