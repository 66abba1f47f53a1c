"""How figures look on a page: tables, commands as a reader can copy them, lines of a length that fits."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

WIDTH = 120
"""Of prose."""
SHOWN = 88
"""Of a command: what a page shows of a line without cutting it."""
_MARKER = re.compile(r" (?=%|(?:[-+*>#|=]+|\d+[.)])(?: |$))")
"""The space before what would begin a list, a heading, a table or a comment (%), were it at the beginning of a line."""


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table, figures to the right."""
    return ["| " + " | ".join(row) + " |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows]]


def shown(command: str) -> str:
    """The command as a block of code, broken before its options where it is too long."""
    lines = ["   "]
    for part in re.split(r" (?=--)", command):
        if len(lines[-1]) + len(part) + len("  \\") > SHOWN:
            lines[-1] += " \\"
            lines.append("       ")
        lines[-1] += f" {part}"
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """The text, its long lines of prose broken; tables, headings and code stay as they are."""
    return "\n".join(_broken(line) for line in text.split("\n"))


def _broken(line: str) -> str:
    if line.startswith(("|", "#", "    ", "<!--")):
        return line
    indent = " " * (len(line) - len(line.lstrip("- ")))
    parts = textwrap.wrap(
        _MARKER.sub("\0", line), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(parts).replace("\0", " ")


def into_page(page: Path, marks: tuple[str, str], text: str) -> None:
    """Put the text between two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    page.write_text(f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{after}", encoding="utf-8")
