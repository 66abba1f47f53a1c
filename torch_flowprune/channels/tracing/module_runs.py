"""In which module's forward the code is, and what each module was called with and gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import EllipsisType
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from torch_flowprune.channels.tracing.nodes import ModuleCall
from torch_flowprune.inputs import tree_leaves


class ModuleRuns:
    """Follows the modules of a model through one forward; ``node_of`` gives the node of a tensor, or None.

    Attributes:
        paths: of the modules that run, the innermost last; the model's own code before any other.
        running: these modules.
        calls: the tensors in the arguments of each module's first call, None for the rest.
        runs: that call and its result.
    """

    def __init__(self, node_of: Callable[[Tensor], Node | None]) -> None:
        self.node_of = node_of
        self.paths, self.running = [""], list[nn.Module]()
        self.calls: dict[str, list[Node | None]] = {}
        self.runs: dict[str, ModuleCall] = {}
        self._given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def follow(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True)
            module.register_forward_hook(self._leave)

    def _enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.paths.append(path)
        self.running.append(module)
        named = {name: self._seen(value) for name, value in kwargs.items()}
        self._given.append((tuple(map(self._seen, args)), named))
        if path not in self.calls:
            leaves = tree_leaves((args, dict(kwargs)))
            self.calls[path] = [self.node_of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]

    def _leave(self, _module: nn.Module, _args: Any, result: Any) -> None:
        args, kwargs = self._given.pop()
        seen = type(result)(map(self._seen, result)) if type(result) in (tuple, list) else self._seen(result)
        self.runs.setdefault(self.paths.pop(), ModuleCall(args, kwargs, seen))
        self.running.pop()

    def _seen(self, value: Any) -> Node | EllipsisType | None:
        """The node of a tensor; for None itself, and for anything else an ellipsis."""
        return self.node_of(value) if isinstance(value, Tensor) else None if value is None else ...
