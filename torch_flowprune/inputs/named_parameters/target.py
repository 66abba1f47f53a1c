"""One parameter of a model, and whether pruning takes it unless told otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from torch_flowprune.inputs.named_parameters.names import plain_name
from torch_flowprune.inputs.named_parameters.zeros import clear

Pair: TypeAlias = tuple[nn.Module, str]
_Habits: TypeAlias = tuple[tuple[str, ...], int]

# Module kind -> the weights pruned unless told otherwise (or globs of their names), and the axis of a weight that its
# outputs lie along.
DEFAULT_KINDS: dict[type[nn.Module], _Habits] = {
    nn.Linear: (("weight",), 0),
    nn.Conv1d: (("weight",), 0),
    nn.Conv2d: (("weight",), 0),
    nn.Conv3d: (("weight",), 0),
    nn.ConvTranspose1d: (("weight",), 1),
    nn.ConvTranspose2d: (("weight",), 1),
    nn.ConvTranspose3d: (("weight",), 1),
    nn.Bilinear: (("weight",), 0),
    nn.RNNBase: (("weight_ih_l*", "weight_hh_l*", "weight_hr_l*"), 0),
    nn.RNNCellBase: (("weight_ih", "weight_hh"), 0),
    nn.MultiheadAttention: (("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), 0),
}


@dataclass(frozen=True, eq=False)
class Target:
    """One parameter of a model: its name, every module attribute that holds it (several when tied), and its mask.

    ``name`` is the parameter's name in the unpruned model: ``fc.weight``, also where torch's pruning calls it
    ``fc.weight_orig``. ``aliases`` are what else it is called: by a tied weight's other owners, and without the names
    that ``torch.compile`` and data parallelism put before those of a part. ``in_adapter`` says that it is of what an
    adapter adds to a layer (peft's ``lora_A``), which is small already.
    """

    name: str
    owners: tuple[Pair, ...]
    parameter: nn.Parameter
    mask: Tensor | None
    aliases: tuple[str, ...] = ()
    in_adapter: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All that it is called."""
        return self.name, *self.aliases

    @property
    def theta(self) -> Tensor:
        """The values the forward uses: the parameter where kept, exactly 0 elsewhere.

        Detached; the parameter's own storage if unpruned.
        """
        value = self.parameter.detach()
        return value if self.mask is None else clear(value.clone(), self.mask)

    @property
    def output_axis(self) -> int:
        """The axis that the owner's outputs lie along.

        1 for the weights of transposed convolutions and transformers' ``Conv1D``, else 0.
        """
        return _habits(self.owners[0][0])[1] if self.parameter.dim() > 1 else 0

    @property
    def is_default(self) -> bool:
        """Whether pruning takes this parameter unless told otherwise."""
        known = any(attribute in default_weights(module) for module, attribute in self.owners)
        return known and not self.in_adapter


def check_shapes(targets: Iterable[Target]) -> None:
    """An error for parameters that have no shape yet."""
    for target in targets:
        if isinstance(target.parameter, UninitializedParameter):
            raise ValueError(f"{target.name!r} has no shape yet (a lazy module): run one batch through the model first")


def is_computed_on_access(module: nn.Module, name: str) -> bool:
    """Whether a pruned tensor is computed whenever it is read, which its class sees to; torch's hook caches it."""
    return isinstance(getattr(type(module), name, None), property)


def default_weights(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's weights that are pruned unless told otherwise."""
    return tuple(
        name
        for pattern in _habits(module)[0]
        for name in (_numbered_weights(module, pattern) if "*" in pattern else (pattern,))
    )


def _numbered_weights(module: nn.Module, pattern: str) -> Iterator[str]:
    """The weights of layers that number them, with those that a parametrization computes."""
    for key in (*module._parameters, *getattr(module, "parametrizations", ())):
        if fnmatchcase(name := plain_name(key, module._buffers), pattern):
            yield name


def _habits(module: nn.Module) -> _Habits:
    return next((habits for kind, habits in _all_kinds().items() if isinstance(module, kind)), ((), 0))


def _all_kinds() -> dict[type[nn.Module], _Habits]:
    """The kinds above, and transformers' Conv1D (GPT-2's transposed linear layer) where that library is loaded."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return DEFAULT_KINDS if conv1d is None else {**DEFAULT_KINDS, conv1d: (("weight",), 1)}
