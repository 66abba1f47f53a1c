"""What a model that saves itself writes while it wears masks: dense names with zeros, and its masks beside them.

``save_pretrained`` of transformers and of hub mixins stores ``state_dict()``, and what loads such files fills names it
does not find, ``weight`` in place of ``weight_orig``, with random numbers. So with masks on, the method is laid over on
the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torch_flowprune.inputs import is_mask, mask_of, parameters_of, plain_name, whole, write_tensors
from torch_flowprune.masking.carrier import permanent
from torch_flowprune.masking.packed_bits import pack

MASKS_FILE = "flowprune_masks.safetensors"
_METHOD, _STATE = "save_pretrained", "state_dict"


def with_zeros(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the names of the unpruned model, with zeros where its masks are; one tensor if tied."""
    made: dict[tuple[int, int], Tensor] = {}

    def value_of(name: str, value: Any) -> Any:
        plain = plain_name(name, state)
        if plain == name:
            return value
        mask = state[mask_of(plain)]
        same = (value.data_ptr() or id(value), mask.data_ptr() or id(mask))
        return made.setdefault(same, made[same] if same in made else permanent(value, mask))

    return {plain_name(name, state): value_of(name, one) for name, one in state.items() if not is_mask(name, state)}


def guard_saving(model: nn.Module) -> None:
    """From here on, what in this model saves itself by ``save_pretrained`` writes dense names."""
    for module in model.modules():
        if callable(getattr(type(module), _METHOD, None)) and _METHOD not in vars(module):
            vars(module)[_METHOD] = partial(_save_with_zeros, module)


def unguard_saving(modules: Iterable[nn.Module]) -> None:
    """As before :func:`guard_saving`."""
    for module in modules:
        if getattr(vars(module).get(_METHOD), "func", None) is _save_with_zeros:
            del vars(module)[_METHOD]


def _save_with_zeros(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own ``save_pretrained`` on a dense state; its masks, packed, go into a file beside."""
    if isinstance(kwargs.get(_STATE), Mapping):
        kwargs[_STATE] = with_zeros(kwargs[_STATE])
    with _dense_state(model):
        result = getattr(type(model), _METHOD)(model, save_directory, *args, **kwargs)
    masks = {name: pack(whole(one.mask)) for name, one in parameters_of(model).items() if one.mask is not None}
    if masks and kwargs.get("is_main_process", True) and Path(save_directory).is_dir():
        write_tensors(Path(save_directory) / MASKS_FILE, masks, {"masks": list(masks)})
    return result


@contextmanager
def _dense_state(model: nn.Module) -> Iterator[None]:
    """Inside, the model's state dict has dense names."""
    own: Callable[..., Any] = model.state_dict
    before = vars(model).get(_STATE)
    vars(model)[_STATE] = lambda *args, **kwargs: with_zeros(own(*args, **kwargs))
    try:
        yield
    finally:
        del vars(model)[_STATE]
        if before is not None:
            vars(model)[_STATE] = before
