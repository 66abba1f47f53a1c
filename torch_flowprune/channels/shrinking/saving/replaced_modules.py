"""What of a smaller model is not the code that its user wrote."""

from __future__ import annotations

from torch import nn

from torch_flowprune.channels.shrinking.graphs import ExportedModule
from torch_flowprune.channels.shrinking.own_code import edits_of, lines_of
from torch_flowprune.channels.shrinking.removed_branches import StandIn
from torch_flowprune.inputs import unwrapped


def replaced_modules(model: nn.Module) -> dict[str, list[str]]:
    """The modules of a shrunk model that do not run the code of their original class.

    Args:
        model: the result of :func:`~torch_flowprune.shrink`.

    Returns:
        Module path -> a description: the class that replaces another, the lines of code in which a number is replaced,
        the exported graph, or what replaces a removed branch. Empty if every module runs the code of its class.

    See Also:
        :func:`~torch_flowprune.shrink`: replaces them.

    >>> import torch, torch_flowprune as fp
    >>> x = torch.randn(5, 8)
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> report = fp.global_prune(net, "magnitude", 0.5, granularity="channel", example_inputs=x)
    >>> fp.replaced_modules(fp.shrink(net, x))
    {}
    """
    found = {path: _said_of_module(module) for path, module in unwrapped(model).named_modules()}
    return {path: said for path, said in found.items() if said}


def _said_of_module(module: nn.Module) -> list[str]:
    if isinstance(module, StandIn):
        return [f"{module.extra_repr()}, since a branch is gone"]
    if isinstance(module, ExportedModule):
        return [module.extra_repr()]
    if before := vars(module).get("written_for"):
        return [f"a {type(module).__name__}, written for {before}"]
    return lines_of(type(module)) if edits_of(type(module)) else []
