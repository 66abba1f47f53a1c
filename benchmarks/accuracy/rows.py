"""Cases and what was found of each: a file that only grows while a run goes on, and the record made of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One prune: what is asked for, and by which draw of images; ``sparsity`` is a share of units, or of FLOPs."""

    granularity: str
    sparsity: float
    measure: str
    sharing: str
    seed: int
    cost: str = "units"


class Rows:
    """Rows by stage and case, one line a row in a file that only grows."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[tuple[str, Case], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            self.found[row["stage"], Case(**row["case"])] = row["result"]

    def add(self, stage: str, case: Case, result: dict[str, Any]) -> None:
        self.found[stage, case] = result
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": stage, "case": asdict(case), "result": result}) + "\n")

    def same_masks(self, stage: str, case: Case, masks: str) -> dict[str, Any] | None:
        """What is known of a case with the same masks, and the same draw of images."""
        for (one, other), result in self.found.items():
            if (one, other.seed, other.granularity, result["masks"]) == (stage, case.seed, case.granularity, masks):
                return result
        return None

    def by_stage(self) -> dict[str, list[dict[str, Any]]]:
        """As plain values, with four decimals."""
        found: dict[str, list[dict[str, Any]]] = {}
        for (stage, case), result in self.found.items():
            rounded = {key: _rounded(value) for key, value in result.items()}
            found.setdefault(stage, []).append({**asdict(case), **rounded})
        return found


def _rounded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def write_lines(found: dict[str, Any], path: Path) -> None:
    """Whole or not at all: several runs write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(_lines(found) + "\n", encoding="utf-8")
    part.replace(path)


def _lines(found: Any, depth: int = 0) -> str:
    """JSON with one row a line."""
    if depth < 4 and isinstance(found, dict):
        inner = [f"{' ' * depth} {json.dumps(key)}: {_lines(value, depth + 1)}" for key, value in found.items()]
        return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}"
    if isinstance(found, list) and found and isinstance(found[0], dict):
        return "[\n" + ",\n".join(" " * depth + " " + json.dumps(row) for row in found) + "\n" + " " * depth + "]"
    return json.dumps(found)


def environment() -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
