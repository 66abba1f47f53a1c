"""Layers of experts behind a router: found by their forms, cut, and held against the router that never picks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torch_flowprune.inputs import call, logits_of, untouched


@dataclass(frozen=True)
class ExpertBlock:
    """A module that may be one, as its tensors are: nothing but a run shows that it is.

    Attributes:
        name: of the module that holds both.
        module: that one.
        router: the parameter with a row for each expert.
        rows: tensors by owner and name, which hold something of each expert along their first axis.
        listed: containers of one module an expert.
        count: how many experts there are.
    """

    name: str
    module: nn.Module
    router: nn.Parameter
    rows: tuple[tuple[nn.Module, str], ...]
    listed: tuple[nn.Module, ...]
    count: int

    def rows_of(self, tensors: dict[nn.Parameter, Tensor]) -> Tensor:
        """(experts, elements): what each expert and its row of the router hold of these, by parameter."""
        held = [p for owner, key in self.rows if (p := owner._parameters.get(key)) in tensors]
        parts = [tensors[p].reshape(self.count, -1) for p in held if p is not None]
        for container in self.listed:
            experts = [
                torch.cat([tensors[p].flatten() for p in child.parameters() if p in tensors])
                for child in container.children()
            ]
            parts.append(torch.stack(experts))
        return torch.cat(parts, 1)


def expert_blocks(model: nn.Module) -> Iterator[ExpertBlock]:
    """Every module with experts, one a child of a container or one a row of its tensors, and a router beside them."""
    for name, module in model.named_modules():
        children = list(module.children())
        for holder in children:
            count = _experts_in(holder)
            others = [owner for child in children if child is not holder for owner in child.modules()]
            routers = [(owner, key) for owner in (module, *others) for key in _routing(owner, count)] if count else []
            if len(routers) != 1:
                continue
            owner, key = routers[0]
            router = owner._parameters[key]
            fused = [] if _is_list(holder) else [(holder, key) for key in _entries_of(holder, count)]
            beside = [(one, name) for one in dict.fromkeys((owner, module)) for name in _entries_of(one, count)]
            rows = tuple(dict.fromkeys((*fused, *beside)))
            listed = (holder,) if _is_list(holder) else ()
            if isinstance(router, nn.Parameter):
                yield ExpertBlock(name, module, router, rows, listed, count)


def _is_list(holder: nn.Module) -> bool:
    return isinstance(holder, (nn.ModuleList, nn.ModuleDict))


def _experts_in(holder: nn.Module) -> int:
    """0 where it holds none."""
    if _is_list(holder):
        forms = {tuple((name, tuple(p.shape)) for name, p in child.named_parameters()) for child in holder.children()}
        return len(holder) if len(forms) == 1 and next(iter(forms)) else 0  # type: ignore[arg-type]  # both have a length
    kernels = [p for p in holder._parameters.values() if p is not None]
    counts = {len(p) for p in kernels if p.dim()}
    return counts.pop() if len(counts) == 1 and any(p.dim() == 3 for p in kernels) else 0


def _routing(owner: nn.Module, count: int) -> list[str]:
    return [key for key, p in owner._parameters.items() if p is not None and p.dim() == 2 and len(p) == count]


def _entries_of(owner: nn.Module, count: int) -> list[str]:
    """Of its own tensors those that have an entry for each."""
    held = {**owner._parameters, **owner._buffers}
    return [key for key, tensor in held.items() if tensor is not None and tensor.dim() and len(tensor) == count]


@dataclass
class Undo:
    """What was, to be put back."""

    steps: list[Callable[[], Any]] = field(default_factory=list)

    def __call__(self) -> None:
        while self.steps:
            self.steps.pop()()

    def set(self, owner: Any, key: str, value: Any) -> None:
        """Another value for an attribute."""
        self.steps.append(partial(setattr, owner, key, getattr(owner, key)))
        setattr(owner, key, value)


def cut_experts(block: ExpertBlock, keep: Tensor) -> Undo:
    """Leave these experts, in order, their rows of the router, and what states how many there are."""
    undo, chosen = Undo(), keep.nonzero().flatten()
    for owner, key in block.rows:
        tensor = getattr(owner, key)
        part = tensor.detach()[chosen.to(tensor.device)].clone()
        undo.set(owner, key, nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part)
    for container in block.listed:
        names, children = list(container._modules), list(container._modules.values())
        kept = dict(zip(names, [children[i] for i in chosen.tolist()], strict=False))
        undo.set(container, "_modules", kept)
    for module in block.module.modules():
        _restate(undo, module, block.count, len(chosen))
    return undo


def state_experts(model: nn.Module, before: int, after: int) -> None:
    """Say in the configs that modules hold how many experts there are."""
    configs = {id(value): value for m in model.modules() if (value := getattr(m, "config", None)) is not None}
    for config in configs.values():
        for key, value in list(getattr(config, "__dict__", {}).items()):
            if "expert" in key and value == before and isinstance(value, int):
                setattr(config, key, after)


def _restate(undo: Undo, module: nn.Module, before: int, after: int) -> None:
    named = [key for key, value in vars(module).items() if type(value) is int and value == before]
    for key in named:
        if "expert" in key or (key == "out_features" and len(module._parameters["weight"]) == after):  # type: ignore[arg-type]
            undo.set(module, key, after)


class _NeverPicked(TorchFunctionMode):
    """Inside, the router gives −∞ for some experts."""

    def __init__(self, router: nn.Parameter, gone: Tensor) -> None:
        super().__init__()
        self.router, self.gone, self.met = router, gone, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear and self._is_router(args[1] if len(args) > 1 else (kwargs or {})["weight"]):
            self.met = True
            return result.masked_fill(self.gone.to(result.device), float("-inf"))
        return result

    def _is_router(self, weight: Tensor) -> bool:
        same = weight.shape == self.router.shape
        return weight is self.router or (same and torch.equal(weight.detach().to(self.router.dtype), self.router))


def without_experts(model: nn.Module, block: ExpertBlock, keep: Tensor, example: Any) -> Tensor | None:
    """What the model gives where the router never picks those that go; None where it does not ask this router."""
    mode = _NeverPicked(block.router, ~keep)
    with untouched(model, mode="eval"), torch.no_grad(), mode:
        output = logits_of(call(model, example))
    return output if mode.met else None


def outputs_of(model: nn.Module, example: Any) -> Tensor:
    """The tensor that the proof compares."""
    with untouched(model, mode="eval"), torch.no_grad():
        return logits_of(call(model, example))


def parameters_in(blocks: Iterable[ExpertBlock]) -> set[nn.Parameter]:
    """Of the experts and their routers."""
    found: set[nn.Parameter] = set()
    for block in blocks:
        found |= {p for owner, key in block.rows if (p := owner._parameters.get(key)) is not None}
        found |= {p for container in block.listed for p in container.parameters()}
    return found
