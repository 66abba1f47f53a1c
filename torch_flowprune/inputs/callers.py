"""Where the user's code calls the package: the line that a warning is for."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path

_INSIDE = (str(Path(__file__).parents[1]), contextlib.__file__)
"""The package, and what its decorators run through."""


def users_level() -> int:
    """The ``stacklevel`` at which ``warnings.warn``, called beside this, names the first line outside the package."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level
