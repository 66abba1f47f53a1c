"""Whether a mask's zeros are in the kernel that a model computes by: seen in a trial that leaves nothing behind.

A weight is masked where it is read. What the model makes of it on the way to its convolution or linear layer (weight
standardisation, say) may fill the zeros again, and no class says so: the kernels are looked at as they are used, and
traced back to the parameters that they are made of.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torch_flowprune.inputs import Target, original, untouched
from torch_flowprune.masking.carrier import CONVOLUTIONS, masked_kind, standardises
from torch_flowprune.masking.snapshots import as_it_was

_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
_KERNEL_CALLS = (*CONVOLUTIONS, *_TRANSPOSED, functional.linear)
_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_STEPS = 100  # from a kernel back to its parameter: a weight is standardised in under ten


@dataclass(frozen=True)
class LostZeros:
    """A masked weight, the share of it that is zero, and the share of the kernel made of it."""

    name: str
    kind: str
    of_weight: float
    of_kernel: float


def lost_zeros(
    model: nn.Module, targets: Mapping[str, Target], run: Callable[[], object] | None, data: object = None
) -> list[LostZeros]:
    """The masked weights among ``targets`` whose zeros are not in the kernel that is made of them.

    Args:
        model: the pruned model.
        targets: its parameters by name, as they are now.
        run: runs the model on a few samples; without it, or where it does not come to a layer, a layer with a forward
            of its own is tried by itself, on zeros.
        data: what ``run`` draws from, whose randomness is put back.

    What cannot be run is not judged.
    """
    pruned = {name: target for name, target in targets.items() if target.mask is not None}
    kernels = _Kernels({id(target.parameter): name for name, target in pruned.items()})
    if run is not None and not any(map(_is_fixed, model.modules())):
        # an exported model, say, has no modes to be put into
        with suppress(Exception), untouched(model, data, functions=[run]), as_it_was(model.modules()):
            kernels.see(run, [target.parameter for target in pruned.values()])
    for name, target in pruned.items():
        if name not in kernels.left and _may_be_tried_alone(target):
            _try_alone(*target.owners[0], name, kernels)
    return list(_lost(pruned, kernels.left))


class _Kernels(TorchFunctionMode):
    """How many entries of each watched parameter's kernel are left: of several kernels, the fullest."""

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.watched = dict(watched)
        self.left: dict[str, Tensor] = {}

    def see(self, run: Callable[[], object], parameters: Iterable[nn.Parameter]) -> None:
        """Run as far as it goes. A frozen parameter, too, has to have a graph to be traced back along."""
        for parameter in parameters:
            if parameter.is_floating_point():
                parameter.requires_grad_()
        with suppress(Exception), warnings.catch_warnings(), self:
            warnings.simplefilter("ignore")
            run()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func in _KERNEL_CALLS:
            self._look_at(args[1] if len(args) > 1 else options.get("weight"))
        return func(*args, **options)

    def _look_at(self, kernel: Any) -> None:
        name = self._parameter_of(kernel) if isinstance(kernel, Tensor) else None
        if name is not None:
            left = torch.count_nonzero(kernel.detach())
            self.left[name] = torch.maximum(left, self.left.get(name, left).to(left.device))

    def _parameter_of(self, kernel: Tensor) -> str | None:
        """The watched parameter, of as many entries, that autograd says a kernel is computed from."""
        if id(kernel) in self.watched:
            return self.watched[id(kernel)]
        nodes = [kernel.grad_fn]
        for node in nodes:
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in self.watched and leaf.numel() == kernel.numel():
                return self.watched[id(leaf)]
            if node is not None and len(nodes) < _MOST_STEPS:
                nodes.extend(before for before, _ in node.next_functions)
        return None


def _is_fixed(module: nn.Module) -> bool:
    """Whether a module is scripted, and shows no operator. What ``torch.compile`` made runs as its code in a trial."""
    return isinstance(module, torch.jit.ScriptModule)


def _may_be_tried_alone(target: Target) -> bool:
    """Whether the owner is of a kind whose input is known, and has a forward of its own that is not a known one."""
    module, attribute = target.owners[0]
    dense, _ = masked_kind(type(module))
    base = next((kind for kind in _MODULES if isinstance(module, kind)), None)
    own = base is not None and (dense.forward is not base.forward or "forward" in module.__dict__)
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return own and alone and attribute == "weight" and not standardises(dense)


def _try_alone(module: nn.Module, attribute: str, name: str, kernels: _Kernels) -> None:
    """One layer's copy on zeros; a forward of the instance's own may still be bound to the layer itself."""
    with suppress(Exception), untouched(module):
        trial = copy.deepcopy(module)
        own, copied = (getattr(one, original(attribute)) for one in (module, trial))
        kernels.watched[id(copied)] = name
        kernels.see(lambda: trial(_input_of(trial)), [own, copied])
        del kernels.watched[id(copied)]


def _input_of(module: Any) -> Tensor:
    if isinstance(module, nn.Linear):
        return module.weight.new_zeros(2, module.in_features)
    extent = [step * (size - 1) + 1 for step, size in zip(module.dilation, module.kernel_size, strict=True)]
    return module.weight.new_zeros(2, module.in_channels, *extent)  # type: ignore[no-any-return]


def _lost(pruned: Mapping[str, Target], left: Mapping[str, Tensor]) -> Iterator[LostZeros]:
    for name, entries in left.items():
        target = pruned[name]
        whole = target.parameter.numel()
        kept = int(torch.count_nonzero(cast("Tensor", target.mask)))
        if int(entries) > kept:
            kind, _ = masked_kind(type(target.owners[0][0]))
            yield LostZeros(name, kind.__name__, 1 - kept / whole, 1 - int(entries) / whole)
