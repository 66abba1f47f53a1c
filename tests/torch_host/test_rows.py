"""docs/explanation/host.md and the tests name the same rows."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "explanation" / "host.md"

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the tests alone, without docs/")


def rows():
    """Row number and state of every row of the tables."""
    return re.findall(r"^\| (\d+\.\d+) \|.*?\| (\w+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)


def in_tests():
    """The rows that test names carry: ``test_row_3_1_and_3_2_...``, ``test_row_7_1_to_7_3_...``."""
    found = set()
    for path in HERE.glob("test_*.py"):
        for section, first, word, last in re.findall(
            r"def test_row_(\d+)_(\d+)(?:_(to|and)_\d+_(\d+))?", path.read_text(encoding="utf-8")
        ):
            found |= {
                f"{section}.{row}"
                for row in (range(int(first), int(last) + 1) if word == "to" else filter(None, (first, last)))
            }
    return found


def test_every_row_is_tested_and_every_tested_row_is_in_the_table():
    assert sorted(number for number, _ in rows()) == sorted(in_tests())
    assert len(set(rows())) == len(rows())


def test_every_row_has_a_state():
    assert set(Counter(state for _, state in rows())) == {"handled", "refused", "documented"}


def test_the_table_of_torch_behaviours_counts_right():
    text = DOCS.read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \| `", text, re.MULTILINE)]
    source = (HERE / "test_torch_behaviours.py").read_text(encoding="utf-8")
    assert numbers == sorted({int(number) for number in re.findall(r"def test_(\d\d)_", source)}) == list(range(1, 35))
    holds, differ = len(re.findall(r"\| holds", text)), len(re.findall(r"\| differs", text))
    assert f"{holds} hold, {differ} differ on purpose" in text
