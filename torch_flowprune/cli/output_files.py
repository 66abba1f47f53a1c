"""What a command writes: files that are known to be writable before anything is computed, and words on a terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path

IMAGES = (".png", ".svg", ".pdf")


def check_output(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """An output that could not be written is an error before anything is computed: a file is opened to see."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise ValueError(f"{option} {path}: expected a file name that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}; make it first")
    try:
        new = not path.exists()
        path.open("ab").close()
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{option} {path}: this is a folder; expected the name of a file") from error
    except OSError as error:
        raise PermissionError(
            f"{option} {path}: it cannot be written here ({error.strerror}); choose another folder, or another file"
        ) from error
    if new:
        path.unlink()


def tell(text: object) -> None:
    """Print; a reader that has seen enough (``| head``) ends nothing but the printing."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
