"""A model whose own ``load_state_dict`` takes pruned states: frameworks that resume by themselves call no other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_flowprune.inputs import is_mask, parameters_of, unwrapped
from torch_flowprune.masking.apply import set_mask
from torch_flowprune.masking.snapshots import all_or_nothing
from torch_flowprune.masking.states.checkpoint import wanted_masks


def accept_masks(model: nn.Module) -> RemovableHandle:
    """Make the model's own ``load_state_dict`` apply the masks of a pruned state before it loads the values.

    This is for code that loads state dicts itself: trainers that resume, savers, averages. The model then has exactly
    the masks of the state. A state without masks is loaded as before, and so is any state after ``handle.remove()``.
    Copies of the model accept pruned states too.

    Args:
        model: any module.

    Returns:
        The handle of the hook.

    See Also:
        :func:`~torch_flowprune.load_state_dict`: loads such a state itself.

    >>> import torch, torch_flowprune as fp
    >>> pruned, fresh = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    >>> report = fp.global_prune(pruned, "magnitude", sparsity=0.5)
    >>> handle = fp.accept_masks(fresh)
    >>> fresh.load_state_dict(pruned.state_dict())
    <All keys matched successfully>
    >>> int(fp.masks(fresh)["weight"].sum())
    4
    """
    wrapped = list(_one_in_another(unwrapped(model)))
    handles = [module.register_load_state_dict_pre_hook(_put_on_masks_first) for module in wrapped]
    return _Handles(handles)


class _Handles(RemovableHandle):
    """The handle of several hooks."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        super().__init__(OrderedDict())
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _one_in_another(module: nn.Module) -> Iterator[nn.Module]:
    """A model, and while it is but a wrapper of one module, that: frameworks load into what they have wrapped."""
    while True:
        yield module
        inside = list(module.children())  # each once, whatever names it has
        if len(inside) != 1 or any(True for _ in module.parameters(recurse=False)):
            return
        (module,) = inside


def _put_on_masks_first(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Torch's hook before a state is loaded: the masks go on, and in the state they are as the model has them."""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    given = [key for key in own if is_mask(key, own)]
    if not given:
        return
    known = parameters_of(module)
    wanted = wanted_masks(known, own)
    with all_or_nothing(known.values()):
        for name, target in known.items():
            set_mask(target, wanted.get(name))
    masked = module.state_dict()
    state.update({prefix + key: masked[key] for key in given if key in masked})
