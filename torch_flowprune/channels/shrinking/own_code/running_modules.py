"""Which modules of a model are running: where an error came from can be told without reading its traceback."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import nn


class RunningModules:
    """The paths of the modules that are running; after an error, of those that it came out of. The innermost is last.

    Hooks note them, and some of torch's modules run other code where they have hooks: a model that is watched proves
    nothing.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []

    def watch(self, model: nn.Module, paths: Collection[str]) -> None:
        """The model itself is always watched, as the empty path."""
        for path, module in model.named_modules():
            if not path or path in paths:
                module.register_forward_pre_hook(partial(self._enter, path))
                module.register_forward_hook(partial(self._leave, path))

    def _enter(self, path: str, *_: Any) -> None:
        self.paths.append(path)

    def _leave(self, path: str, *_: Any) -> None:
        """Those that failed inside have left too, without a call of their hooks: this one's code caught the error."""
        while self.paths.pop() != path:
            pass
