"""The command line: ``python -m torch_flowprune demo | prune | score | prune-checkpoint``."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence

from torch_flowprune.cli.arguments import parser

_FAULTS = (ValueError, TypeError, OSError, ImportError, RuntimeError)
"""What a user can cause and mend: these end in one line and exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for an error that the user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sign that the terminal cannot show is no reason to write nothing
    chosen = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _one_line  # type: ignore[assignment]
        try:
            chosen.run(chosen)
        except BrokenPipeError:  # the reader (`| head`) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except _FAULTS as error:
            if chosen.traceback:
                raise
            print(f"torch-flowprune {chosen.command}: {error}", file=sys.stderr)
            return 2
    return 0


def _one_line(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"{category.__name__}: {message}", file=sys.stderr)
