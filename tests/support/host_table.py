"""The tables of docs/explanation/host.md, made of what the tests of tests/torch_host say of the rows that they bear.

A file of tests has ``ROWS``, by number: what is wrong in torch, one of three states, what happens here. ``python
tests/support/host_table.py`` writes the page; ``problems`` is what the tests and the build of the docs ask. The
files are read and not imported: a build of the docs needs none of what they test.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1] / "torch_host"
PAGE = HERE.parents[1] / "docs" / "explanation" / "host.md"
STATES = ("handled", "refused", "documented")
_SECTION = re.compile(r"<!-- rows of section (\d+) -->\n.*?<!-- end of rows -->", re.DOTALL)
_BEHAVIOURS = re.compile(r"<!-- PyTorch's behaviours -->\n.*?<!-- end of behaviours -->", re.DOTALL)
_TEST = re.compile(r"test_row_(\d+)_(\d+)(?:_(to|and)_\d+_(\d+))?")


@cache
def parsed() -> dict[str, ast.Module]:
    """The files of tests, by name."""
    return {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("test_*.py"))}


def _said(tree: ast.Module, name: str) -> dict[Any, Any]:
    """The literal of this name in a file; nothing where there is none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [name]:
            found: dict[Any, Any] = ast.literal_eval(node.value)
            return found
    return {}


def rows() -> list[tuple[str, tuple[str, str, str]]]:
    """Every row that some file has, in the order of their numbers."""
    found = [item for tree in parsed().values() for item in _said(tree, "ROWS").items()]
    return sorted(found, key=lambda item: [int(part) for part in item[0].split(".")])


@cache
def tested() -> set[str]:
    """The rows in the names of tests: ``test_row_3_1_and_3_2_...``, ``test_row_7_1_to_7_3_...``."""
    found = set()
    for tree in parsed().values():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and (match := _TEST.match(node.name)):
                section, first, word, last = match.groups()
                numbers = range(int(first), int(last) + 1) if word == "to" else filter(None, (first, last))
                found |= {f"{section}.{number}" for number in numbers}
    return found


def behaviours() -> dict[int, tuple[str, str]]:
    """PyTorch's own tests of pruning, and what is here of what they ask."""
    return _said(parsed()["test_torch_behaviours.py"], "BEHAVIOURS")


def page() -> str:
    """The page, its tables as the tests have them."""
    text = PAGE.read_text(encoding="utf-8")
    text = _SECTION.sub(lambda match: _table_of(match[1]), text)
    return _BEHAVIOURS.sub(lambda _: _table_of_behaviours(), text)


def problems() -> list[str]:
    """Why the page is not what the tests bear; nothing where it is."""
    given = [number for number, _ in rows()]
    found = [f"row {number} is in several files" for number, times in Counter(given).items() if times > 1]
    found += [f"row {number} has no test" for number in given if number not in tested()]
    found += [f"row {number} is tested, and no file says what it is" for number in sorted(tested() - set(given))]
    found += [f"row {number} has the state {row[1]!r}" for number, row in rows() if row[1] not in STATES]
    if page() != PAGE.read_text(encoding="utf-8"):
        found.append("the page is not that of the tests: python tests/support/host_table.py")
    return found


def _table_of(section: str) -> str:
    fault = "what fails in torch" if section == "9" else "torch's fault"
    mine = [(number, row) for number, row in rows() if number.split(".")[0] == section]
    lines = [f"| row | {fault} | state | here |", "|---|---|---|---|"]
    lines += [f"| {number} | {' | '.join(row)} |" for number, row in mine]
    return "\n".join([f"<!-- rows of section {section} -->", "", *lines, "", "<!-- end of rows -->"])


def _table_of_behaviours() -> str:
    lines = ["| | behaviour (PyTorch's test) | |", "|---|---|---|"]
    lines += [f"| {number} | `{name}` | {what} |" for number, (name, what) in behaviours().items()]
    return "\n".join(["<!-- PyTorch's behaviours -->", "", *lines, "", "<!-- end of behaviours -->"])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print("\n".join(problems()) or f"{len(rows())} rows, each with a test")
