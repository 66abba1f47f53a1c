"""How long operators take, measured once for each size and kept: the sum over a model's operators is its latency."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch

from torch_flowprune.channels.costs.operators import Call

Timer: TypeAlias = Callable[[Sequence[Callable[[], object]], torch.device], Sequence[float]]
"""From what to run, one after the other, and where, to the seconds that each takes."""

_PASSES, _LEAST_SECONDS, _MOST_PASSES = 5, 0.05, 50


def median_seconds(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The median of each over five passes or more, after one that counts for nothing."""
    return in_turns(runs, device, time.perf_counter)


def in_turns(runs: Sequence[Callable[[], object]], device: torch.device, clock: Callable[[], float]) -> list[float]:
    """As :func:`median_seconds`, by any clock."""
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", lambda: None)
    passes: list[list[float]] = []
    for run in runs:
        run()
    while len(passes) < _PASSES or (sum(map(sum, passes)) < _LEAST_SECONDS and len(passes) < _MOST_PASSES):
        seconds = []
        for run in runs:
            synchronize()
            start = clock()
            run()
            synchronize()
            seconds.append(clock() - start)
        passes.append(seconds)
    return [statistics.median(of_one) for of_one in zip(*passes, strict=True)]


class LatencyTable:
    """The latency of operators by their sizes, in milliseconds; each is measured once, when it is first needed.

    The latency of a model is the sum over the operators of its forward on the example inputs. They are run and timed
    one after the other, each on the output of the one before. The sum leaves out Python code between operators, and
    operators that a device runs in parallel. :doc:`/guide/allocation` compares predicted with measured latencies.

    Args:
        path: a JSON file to read measurements from and write them to; None keeps them in this object only.
        timer: a function of a list of functions to run in order and the device that returns the seconds of each; if
            left out, medians over five passes or more.
        multiple: widths are rounded up to a multiple of it before they are measured, so that the table stays small.

    Raises:
        ValueError: if a file was measured on another device than the model's, or is not a latency table.

    See Also:
        :func:`~torch_flowprune.global_prune`: prunes to a latency, with ``cost=`` and ``at_most=``.

    >>> import torch, torch_flowprune as fp
    >>> table = fp.LatencyTable(timer=lambda runs, device: [0.002 for run in runs])  # without timer=, they are timed
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> fp.range(model, torch.ones(2, 3), cost=table).dense
    6.0
    """

    def __init__(
        self, path: str | PathLike[str] | None = None, *, timer: Timer = median_seconds, multiple: int = 8
    ) -> None:
        if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
            raise ValueError(f"multiple should be a whole number of at least 1, got {multiple!r}")
        self.path, self.timer, self.multiple = None if path is None else Path(path), timer, multiple
        self.where, self.known = "", dict[str, float]()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def milliseconds(self, calls: Iterable[Call], device: torch.device) -> float:
        """The sum over the calls; if some are not in the table, all calls are run in turn and these are measured."""
        calls = list(calls)
        if any(str(call) not in self.known for call in calls):
            self._check_is_on(device)
            self._measure(calls, device)
            self._write()
        return sum(self.known[str(call)] for call in calls)

    def _measure(self, calls: Sequence[Call], device: torch.device) -> None:
        with torch.no_grad():
            seconds = self.timer(_chained(calls, device), device)
        times: dict[str, list[float]] = {}
        for call, taken in zip(calls, seconds, strict=True):
            times.setdefault(str(call), []).append(1e3 * taken)
        self.known = {text: statistics.fmean(taken) for text, taken in times.items()} | self.known

    def _check_is_on(self, device: torch.device) -> None:
        here = _where(device)
        if self.where not in ("", here):
            raise ValueError(
                f"{self.path} was measured on {self.where}, and the model is on {here}: name another file, or move the "
                "model"
            )
        self.where = here

    def _read(self, path: Path) -> None:
        try:
            entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.where, self.known = entries["device"], {str(k): float(v) for k, v in entries["milliseconds"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} should be a table that LatencyTable wrote, JSON with 'device' and 'milliseconds': {error}; "
                "name another file"
            ) from error

    def _write(self) -> None:
        if self.path is not None:
            text = json.dumps({"device": self.where, "milliseconds": self.known}, indent=1)
            beside = self.path.with_name(self.path.name + ".new")
            beside.write_text(text + "\n", encoding="utf-8")
            beside.replace(self.path)


def _where(device: torch.device) -> str:
    """What seconds depend on: the kind of device, and on a CPU its threads."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _chained(calls: Sequence[Call], device: torch.device) -> list[Callable[[], object]]:
    """Each is handed what the one before made, as in the model: it is in the caches, and what is older is not."""
    last: list[Any] = [None]

    def chained(run: Callable[[Any], Any]) -> Callable[[], object]:
        def go() -> object:
            last[0] = run(last[0])
            return last[0]

        return go

    return [chained(call.ready(device)) for call in calls]
