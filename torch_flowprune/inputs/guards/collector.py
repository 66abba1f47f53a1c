"""Python's collector of cycles, paused where a call makes many objects and no cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside, no search for cycles: over a model of 10,000 tensors they take as long as all the rest of a prune.

    For work on tensors and names. Where the user's model runs, whose cycles may hold memory, it is not for.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
