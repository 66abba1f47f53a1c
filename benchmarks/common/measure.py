"""How things are measured here.

Alternating in one run, medians with their spread, memory in fresh processes, the machine named.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Times:
    """Seconds that one thing took, repeatedly."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Median, least, most, and the spread: (most − least) / median."""
        low, high = min(self.seconds), max(self.seconds)
        return {
            "median": self.median,
            "min": low,
            "max": high,
            "spread": (high - low) / self.median,
            "runs": len(self.seconds),
        }


def alternating(
    works: Mapping[str, Callable[[], Callable[[], object]]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, Times]:
    """Each work's times over ``rounds`` by ``clock``, one after the other in every round, in turning order.

    A work is a function that prepares (untimed) and returns what is timed; processor time leaves out what others do
    meanwhile. What slows the machine for a while slows all of them, so that ratios of medians hold on a busy machine
    where seconds do not.
    """
    names = list(works)
    found: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            run = works[name]()
            start = clock()
            run()
            found[name].append(clock() - start)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def memory() -> tuple[int, int]:
    """Bytes this process holds now and has held at most (Linux: VmRSS, VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def forget_peak() -> None:
    """Start the high-water mark anew (Linux: 5 into clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def environment() -> dict[str, Any]:
    """The machine, named only by what its figures depend on, the versions and the commit."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "versions": {"python": platform.python_version(), **_versions("torch", "torchvision", "timm", "transformers")},
        "commit": commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _versions(*names: str) -> dict[str, str]:
    installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def commit() -> str:
    """The commit of the code that is measured."""
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
