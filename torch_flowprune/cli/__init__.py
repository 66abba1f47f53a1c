"""The command line."""

from torch_flowprune.cli.arguments import parser
from torch_flowprune.cli.commands import main

__all__ = ["main", "parser"]
