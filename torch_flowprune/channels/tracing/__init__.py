"""A model's operators as a graph whose tensor axes are labelled."""

from torch_flowprune.channels.tracing.exported_program import program_of, twin
from torch_flowprune.channels.tracing.label_propagation import Walk, flat
from torch_flowprune.channels.tracing.labelled_graph import Reading, canonical_names, read, relabelled
from torch_flowprune.channels.tracing.labels import Block, Value
from torch_flowprune.channels.tracing.nodes import (
    ModuleCall,
    Traced,
    concrete,
    handed_on,
    is_in_place,
    module_path,
    operator_name,
    sharing,
)
from torch_flowprune.channels.tracing.onlookers import without_onlookers

__all__ = [
    "Block",
    "ModuleCall",
    "Reading",
    "Traced",
    "Value",
    "Walk",
    "canonical_names",
    "concrete",
    "flat",
    "handed_on",
    "is_in_place",
    "module_path",
    "operator_name",
    "program_of",
    "read",
    "relabelled",
    "sharing",
    "twin",
    "without_onlookers",
]
