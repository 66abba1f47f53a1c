"""A folder that is made step by step and appears at once, and how a run that was interrupted goes on.

Whatever is finished is a file with its final name in a folder beside the target, ``TARGET.unfinished``; the last step
gives that folder the target's name. Files are written under another name first, so that half a file never counts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_RUN = "run.json"
_COUNTS = "counts"
_FILES = "files"


class Unfinished:
    """The folder beside a target in which it is made.

    Raises:
        FileExistsError: where the target is there already.
        ValueError: where another run has begun the same target.
    """

    def __init__(self, target: Path, run: dict[str, Any]) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.unfinished")
        check_target(target)
        known = self.path / _RUN
        text = json.dumps(run, sort_keys=True)
        if known.exists() and known.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{self.path} holds an interrupted run with another source or other arguments: delete it, or pass "
                "another target"
            )
        for folder in (_COUNTS, _FILES):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        if not known.exists():
            self._write(known, lambda path: path.write_text(text, encoding="utf-8"))

    def counts(self, name: str, write: Callable[[Path], object]) -> Path:
        """A file of counts, written unless it is there."""
        return self._once(self.path / _COUNTS / name, write)

    def file(self, name: str, write: Callable[[Path], object]) -> Path:
        """A file of the target, written unless it is there."""
        return self._once(self.path / _FILES / name, write)

    def _once(self, path: Path, write: Callable[[Path], object]) -> Path:
        return path if path.exists() else self._write(path, write)

    @staticmethod
    def _write(path: Path, write: Callable[[Path], object]) -> Path:
        """On the disk before it has its name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f"{path.name}.{os.getpid()}.half")
        write(half)
        with half.open("rb+") as file:
            os.fsync(file.fileno())
        half.replace(path)
        return path

    @contextmanager
    def taken_back(self) -> Iterator[None]:
        """An error of the weights leaves nothing behind; whatever else stops a run leaves what is finished."""
        try:
            yield
        except ValueError:
            shutil.rmtree(self.path)
            raise

    def finish(self) -> None:
        """All files appear under the target's name."""
        for half in (self.path / _FILES).rglob("*.half"):
            half.unlink()
        (self.path / _FILES).replace(self.target)
        shutil.rmtree(self.path)


def check_target(target: Path) -> None:
    """An error where nothing can be made under this name."""
    if target.exists():
        raise FileExistsError(f"target {target} is already there: delete it, or pass another")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"target {target}: there is no folder {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"target {target}: {target.parent} is not writable; pass another folder")
