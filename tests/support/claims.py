"""Sentences of the pages that say never, always, exactly or any, which are promises: each names what holds it.

``python tests/support/claims.py`` lists those that have no test named in ``tests/project/claims.json``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "project" / "claims.json"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*/*.md"))]
ELSEWHERE = (
    "docs/results/",  # what was measured on a day
    "docs/reference/",  # what changed; and docstrings, whose examples run
    "docs/explanation/host.md",  # made of the tests that bear it
    "docs/guide/troubleshooting.md",  # each text is one that a test asks for
    "docs/architecture.md",  # for those who change the package, as the next
    "docs/CONTRIBUTING.md",
)
"""Pages that are held in another way."""
STRONG = re.compile(r"\b(never|always|exactly|any)\b", re.IGNORECASE)
_CODE = re.compile(r"```.*?```", re.DOTALL)


def claims() -> dict[str, str]:
    """The sentences, and the page that each is on; a cell of a table is one."""
    found: dict[str, str] = {}
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        if not name.startswith(ELSEWHERE):
            found |= dict.fromkeys((one for one in _sentences(page.read_text("utf-8")) if STRONG.search(one)), name)
    return found


def _sentences(text: str) -> list[str]:
    lines = [line for line in _CODE.sub("", text).split("\n") if not line.startswith("    ")]
    cells = [cell for line in lines if line.startswith("|") for cell in line.strip("|").split("|")]
    prose = " ".join(line for line in lines if not line.startswith(("|", "#")))
    parts = [*re.split(r"(?<=[.:;!?]) ", " ".join(prose.split())), *cells]
    return [part.strip(" -*").strip() for part in parts]


def tests() -> dict[str, list[str]]:
    """By sentence, the tests that hold it, as ``file::name``."""
    found: dict[str, list[str]] = json.loads(TESTS.read_text("utf-8"))
    return found


if __name__ == "__main__":
    for sentence, where in claims().items():
        if sentence not in tests():
            print(f"{where}: {sentence}")
