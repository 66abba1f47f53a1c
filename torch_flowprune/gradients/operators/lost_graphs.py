"""Backward functions that leave autograd's graph: what passes them has no second derivative, and nothing says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor
from torch.autograd.function import BackwardCFunction

_Grads: TypeAlias = Sequence[Tensor | None]


@contextmanager
def no_lost_graph(loss: Tensor) -> Iterator[None]:
    """Watch the functions written in Python that the loss went through, while it is differentiated with a graph.

    A gradient is linear in the one that it comes from. So where that one depends on the parameters and this one does
    not, a function has computed it outside of autograd (with numpy, a kernel, a collective, or under ``no_grad``).

    Raises:
        RuntimeError: naming the function.
    """
    lost: list[str] = []
    handles = [node.register_hook(_watch(node.name(), lost)) for node in _written_in_python(loss)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if lost:
        raise RuntimeError(
            f"H·g needs second derivatives, and {lost[0]} computes its gradient outside of autograd's graph, so H·g "
            "would lack a part. Use a measure that reads only g, or write that backward with torch's operators"
        )


def _watch(name: str, lost: list[str]) -> Callable[[_Grads, _Grads], None]:
    def note(inner: _Grads, outer: _Grads) -> None:
        depends = any(grad is not None and grad.requires_grad for grad in outer)
        if depends and any(grad is not None and not grad.requires_grad and bool(grad.any()) for grad in inner):
            lost.append(name)

    return note


def _written_in_python(loss: Tensor) -> Iterator[Any]:
    seen: set[Any] = set()
    todo: list[Any] = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)
        if isinstance(node, BackwardCFunction):
            yield node
