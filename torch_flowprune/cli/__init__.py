"""The command line."""

from torch_flowprune.cli.commands import main, parser

__all__ = ["main", "parser"]
