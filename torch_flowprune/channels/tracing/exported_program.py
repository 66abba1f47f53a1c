"""A model's operators as ``torch.export`` reads them, which goes on where code looks at values."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from torch_flowprune.channels.tracing.nodes import Traced
from torch_flowprune.inputs import copied_model


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares parameters and constants.

    What tracing writes (caches, running statistics) the model never sees.
    """
    shared = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    shared += model.parameters()
    return copied_model(model, {id(t): t for t in shared})


def program_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool | None, sizes: Any = None
) -> Traced:
    """As ``torch.export`` gives it. training: None for the model as it is. sizes: dynamic shapes, as it takes them."""
    copied = twin(model) if training is None else twin(model).train(training)
    with torch.random.fork_rng(), warnings.catch_warnings(), _without_stack_traces(), _in_silence():
        warnings.simplefilter(
            "ignore"
        )  # export warns of caches that modules fill while traced; the twin is thrown away
        program = torch.export.export(copied, args, dict(kwargs), dynamic_shapes=sizes, strict=False)
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    kinds = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}
    sources = {
        nodes[s.arg.name]: (kinds[s.kind], str(s.target))
        for s in program.graph_signature.input_specs
        if s.kind in kinds
    }
    return Traced(program.graph, sources, program)


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Nobody reads the source line of an operator here, and finding it takes a tenth of an export."""
    config, name = getattr(torch.fx, "config", None), "do_not_emit_stack_traces"
    before = getattr(config, name, None)  # older versions of torch have no such setting
    try:
        if before is not None:
            setattr(config, name, True)
        yield
    finally:
        if before is not None:
            setattr(config, name, before)


@contextmanager
def _in_silence() -> Iterator[None]:
    """An export that fails prints its graph and logs advice for its own users; what is wrong, our error says."""
    loggers = [logging.getLogger(name) for name in ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with redirect_stderr(StringIO()):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
