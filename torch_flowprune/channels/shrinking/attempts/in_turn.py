"""The ways to build a smaller model, tried in turn: its own code, some modules as graphs, all of it as one graph."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from torch_flowprune.channels.shrinking.attempts.bench import Bench
from torch_flowprune.channels.shrinking.proof import (
    first_line,
    statement_of,
)
from torch_flowprune.channels.shrinking.surgery import ShrinkError, Surgery


def untried(bench: Bench) -> tuple[nn.Module, Surgery]:
    """The modules' own code by the likeliest plan, and no proof."""
    plan = replace(bench.surgery, attributes=bench.plans[0], code=bench.spans)
    return bench.made(plan)


def attempt(bench: Bench, graphs: bool) -> tuple[nn.Module, Surgery]:
    """The first way that passes: the modules' own code, then some modules as graphs, then all of the model as one."""
    plans = [replace(bench.surgery, attributes=attributes, code=bench.spans) for attributes in bench.plans]
    errors = []
    for plan in plans:
        error = bench.tried(plan)
        if error is None:
            return bench.made(plan)
        errors.append(f"{type(error).__name__}: {first_line(error)}{statement_of(error)}")
    tried = list(plans)
    for edited in (one for shares in (False, True) for plan in plans for one in bench.in_own_code(plan, shares)):
        if edited not in tried:
            tried.append(edited)
            error = bench.tried(edited)
            if error is None:
                return bench.made(edited)
            errors.append(f"with other numbers in it, {type(error).__name__}: {first_line(error)}{statement_of(error)}")
    if not graphs:
        said = "; ".join(dict.fromkeys((errors[0], errors[-1] if len(errors) > len(plans) else errors[0])))
        raise ShrinkError(
            f"the model's own code does not take the smaller sizes: {said}; read the size from an attribute or a "
            "tensor, register how its class is updated (fp.channels.register), prune to widths that its operators "
            "support (round_to=), leave its layers out (exclude=), or use a graph that supports only calls like the "
            "example (graphs=True)"
        )
    replaced = bench.replacements(plans[0])
    if replaced is not None:
        return bench.made(plans[0], replaced)
    error = bench.tried(bench.surgery, [""])
    if error is not None:
        raise ShrinkError(
            f"neither the model's code ({errors[0]}) nor its graph ({first_line(error)}) takes the smaller sizes"
        )
    return bench.made(bench.surgery, [""])
