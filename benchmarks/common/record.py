"""What every benchmark does with its figures: names command and machine, and keeps them as JSON.

And a goal, met or missed.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measure import environment
from benchmarks.common.page import into_page

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One goal: ``measured`` should be at most ``goal``, or at least where ``more`` is better."""

    work: str
    subject: str
    measured: float
    goal: float
    unit: str
    more: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        return self.measured >= self.goal if self.more else self.measured <= self.goal

    def cells(self) -> list[str]:
        goal = f"{'≥' if self.more else '≤'} {self.goal:g} {self.unit}"
        return [self.work, self.subject, goal, f"{self.measured:.3g}", "met" if self.met else "**missed**", self.note]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Row:
        return cls(**{key: value for key, value in row.items() if key != "met"})


def steady(threads: int) -> None:
    """What keeps seconds alike from run to run.

    So many threads, and no denormals, with which a few layers of a random net take ten times as long.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")


def begun(command: str, arguments: Sequence[str] | None, **machine: Any) -> dict[str, Any]:
    """A record that names the command as it was given, and the machine."""
    given = sys.argv[1:] if arguments is None else arguments
    return {"command": " ".join([command, *map(str, given)]), "environment": {**environment(), **machine}}


def keep(record: dict[str, Any], out: Path | None) -> None:
    """As JSON, where a file was named."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def deliver(record: dict[str, Any], text: str, out: Path | None, page: Path | None, marks: tuple[str, str]) -> None:
    """The table printed, the record kept, and the table put into a page, where these are named."""
    print(text)
    keep(record, out)
    if page:
        into_page(page, marks, text)
