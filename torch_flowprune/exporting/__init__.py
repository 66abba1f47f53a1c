"""A pruned model for others: files that are read back and compared, and kernels that know 2:4."""

from torch_flowprune.exporting.exported import Exported, export, format_of
from torch_flowprune.exporting.formats import FORMATS
from torch_flowprune.exporting.pruned_file import PrunedFile, load_pruned, save_pruned
from torch_flowprune.exporting.semi_structured import to_semi_structured

__all__ = [
    "FORMATS",
    "Exported",
    "PrunedFile",
    "export",
    "format_of",
    "load_pruned",
    "save_pruned",
    "to_semi_structured",
]
