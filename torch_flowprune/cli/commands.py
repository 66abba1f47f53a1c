"""The command line: ``python -m torch_flowprune demo | prune | score | compare | diagnose | prune-checkpoint``."""

from __future__ import annotations

import argparse
import difflib
import io
import sys
import warnings
from collections.abc import Sequence

from torch_flowprune.cli.arguments import COMMANDS, parser
from torch_flowprune.cli.option_spelling import as_options
from torch_flowprune.cli.output_files import tell

_FAULTS = (ValueError, TypeError, OSError, ImportError, RuntimeError)
"""What a user can cause and mend: these end in one line and exit code 2."""
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for an error that the user can mend, or 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sign that the terminal cannot show is no reason to write nothing
    words = list(sys.argv[1:] if arguments is None else arguments)
    whole = parser()
    if not words:
        tell(whole.format_help())
        return 0
    chosen = _parsed_words(whole, words)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: _warn_user(chosen, message, category)
        try:
            chosen.run(chosen)
        except KeyboardInterrupt:
            _say(chosen.command, "interrupted")
            return _INTERRUPTED
        except _FAULTS as error:
            if chosen.traceback:
                raise
            _say(chosen.command, as_options(_told(error), vars(chosen)))
            return 2
    return 0


def _parsed_words(whole: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The command and its options; a mistyped one is answered with the nearest."""
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        whole.error(f"no command is called {words[0]!r}: {hint}The commands are {', '.join(COMMANDS)}")
    chosen, unknown = whole.parse_known_args(words)
    if unknown:
        known = [option for option in vars(chosen) if option not in ("run", "command")]
        near = difflib.get_close_matches(unknown[0].lstrip("-").replace("-", "_"), known, n=1)
        hint = f": did you mean --{near[0].replace('_', '-')}?" if near else ""
        command = f"{whole.prog} {chosen.command}"
        whole.exit(2, f"{command}: unknown {' '.join(unknown)}{hint} ({command} --help lists the options)\n")
    return chosen


def _told(error: BaseException) -> str:
    """An error in one line; one from another process comes with its traceback, and says itself in the last line."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def _say(command: str, text: str) -> None:
    print(f"torch-flowprune {command}: {text}", file=sys.stderr)


def _warn_user(chosen: argparse.Namespace, message: Warning | str, category: type[Warning]) -> None:
    print(f"{category.__name__}: {as_options(str(message), vars(chosen))}", file=sys.stderr)
