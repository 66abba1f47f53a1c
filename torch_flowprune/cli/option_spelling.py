"""Texts of the library for a reader of the command line: its keywords, spelled as options."""

from __future__ import annotations

import re
from collections.abc import Collection

_CALL = re.compile(r"(\w+(?:\.\w+)*\([^()]*\))")
_KEYWORD = re.compile(r"(?<![\w.-])(\w+)=(?:'([^']*)'|(-?\d[\d.e+-]*\d|\d)|(?=[\s,;:.)]|$))")


def as_options(text: str, names: Collection[str]) -> str:
    """``round_to=8`` as ``--round-to 8``, where a command has the option; calls of Python stay as they are.

    >>> as_options("leave cost= out, or pass granularity='channel' (fp.scores(model, mode='eval'))", {"cost", "mode"})
    "leave --cost out, or pass granularity='channel' (fp.scores(model, mode='eval'))"
    """

    def spelled(keyword: re.Match[str]) -> str:
        name, word, number = keyword.groups()
        if name not in names:
            return keyword[0]
        return " ".join(filter(None, (f"--{name.replace('_', '-')}", word, number)))

    parts = _CALL.split(text)
    return "".join(part if place % 2 else _KEYWORD.sub(spelled, part) for place, part in enumerate(parts))
