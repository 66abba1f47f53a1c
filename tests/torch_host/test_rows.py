"""docs/explanation/host.md has the rows that the tests bear, each with a test."""

from __future__ import annotations

import re

import host_table
import pytest

pytestmark = pytest.mark.skipif(not host_table.PAGE.exists(), reason="the tests alone, without docs/")


def test_the_page_has_the_rows_that_the_tests_bear():
    assert host_table.problems() == []
    assert len(host_table.rows()) > 100


WRONG = {
    "a row without a test": ('ROWS = {"1.99": ("a", "handled", "b")}', "row 1.99 has no test"),
    "a test without a row": ("def test_row_1_98_x(): ...", "row 1.98 is tested, and no file says what it is"),
    "a state of its own": ('ROWS = {"1.1": ("a", "fine", "b")}', "row 1.1 has the state 'fine'"),
    "a row twice": ('ROWS = {"2.1": ("a", "handled", "b")}', "row 2.1 is in several files"),
    "a page of older rows": ('ROWS = {"1.1": ("a", "handled", "b")}', "the page is not that of the tests"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_told(kind, tmp_path, monkeypatch):
    for path in host_table.HERE.glob("test_*.py"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    code, problem = WRONG[kind]
    (tmp_path / "test_more.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(host_table, "HERE", tmp_path)
    for read in (host_table.parsed, host_table.tested):
        read.cache_clear()
    try:
        assert any(problem in found for found in host_table.problems())
    finally:
        for read in (host_table.parsed, host_table.tested):
            read.cache_clear()


def test_the_table_of_torch_behaviours_counts_right():
    text = host_table.PAGE.read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \| `", text, re.MULTILINE)]
    source = (host_table.HERE / "test_torch_behaviours.py").read_text(encoding="utf-8")
    assert numbers == sorted({int(number) for number in re.findall(r"def test_(\d\d)_", source)}) == list(range(1, 35))
    holds, differ = len(re.findall(r"\| holds", text)), len(re.findall(r"\| differs", text))
    assert f"{holds} hold, {differ} differ on purpose" in text
