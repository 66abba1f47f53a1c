"""The config of a shrunk model of transformers whose layers gave up equally much: the same class, of smaller sizes.

Which numbers of the config say the sizes is not known by name. Those are taken that make a newly built model's tensors
as large as the shrunk one's; then both are run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_flowprune.channels import describe

_ALIKE_WITHIN = 1e-4


def refitted_config(model: Any) -> Any | None:
    """The config of which a new model of the class is this one, or None; the model's own where that says its sizes."""
    config = copy.deepcopy(model.config)
    misplaced = _misfits(model, config)
    while misplaced:
        better = [(len(misfits), number, misfits) for number in _numbers(config, misplaced)
                  if (misfits := _misfits(model, _with(config, *number))) is not None]  # fmt: skip
        fewest, number, misfits = min(better, key=lambda one: one[:2], default=(len(misplaced), ("", 0), misplaced))
        if fewest >= len(misplaced):
            return None
        config, misplaced = _with(config, *number), misfits
    return config if misplaced is not None and _computes_the_same(model, config) else None


def _with(config: Any, name: str, value: int) -> Any:
    changed = copy.deepcopy(config)
    setattr(changed, name, value)
    return changed


def _built(model: Any, config: Any) -> Any:
    """As ``from_pretrained`` builds it: the config has to come back from what is written of it."""
    return type(model)(type(config).from_dict(config.to_dict()))


def _misfits(model: Any, config: Any) -> dict[str, tuple[Any, Any]] | None:
    """The tensors that a new model has in other sizes, with both; None where there is no such model."""
    try:
        with torch.device("meta"):
            new = _built(model, config)
        differing = describe(new, model)["shapes"]
    except Exception:  # noqa: BLE001 - whatever a config says against the numbers that are tried
        return None
    tensors = {**dict(new.named_parameters(remove_duplicate=False)), **dict(new.named_buffers(remove_duplicate=False))}
    return {name: (tuple(tensors[name].shape), tuple(shape)) for name, shape in differing.items() if name in tensors}


def _numbers(config: Any, misfits: dict[str, tuple[Any, Any]]) -> Iterator[tuple[str, int]]:
    """Whole numbers of the config, made smaller as some axis is."""
    ratios = {(a, b) for old, now in misfits.values() for a, b in zip(old, now, strict=True) if a != b}
    tried = {
        (name, value * now // old)
        for name, value in config.to_dict().items()
        if type(value) is int and value > 0
        for old, now in ratios
        if value * now % old == 0
    }
    yield from sorted(tried)


@torch.no_grad()
def _computes_the_same(model: Any, config: Any) -> bool:
    """Whether a new model with these weights gives what this one gives."""
    with torch.random.fork_rng():
        new = _built(model, config).to(model.device, model.dtype)
    new.load_state_dict(model.state_dict())
    was = model.training
    try:
        inputs = {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
        one, other = model.eval()(**inputs)[0], new.eval()(**inputs)[0]
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return False  # nothing to hold it against
    finally:
        model.train(was)
    return _close(one, other)


def _close(one: Tensor, other: Tensor) -> bool:
    return bool(one.shape == other.shape and (one - other).abs().max() <= _ALIKE_WITHIN * one.abs().max())
