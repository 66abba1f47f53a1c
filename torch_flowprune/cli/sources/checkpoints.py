"""Weights from a file: this package's own with their masks, torch's pruned ones, and any that timm reads."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import torch_flowprune as fp
from torch_flowprune.exporting import PrunedFile
from torch_flowprune.inputs import is_mask

_LONGEST = 200
"""Characters of a reader's error: those of a state dict list every layer."""


def existing(option: str, path: Path) -> Path:
    """The path, where there is a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: there is no such file")
    return path


def from_checkpoint(timm: Any, name: str, path: Path, classes: Mapping[str, int]) -> nn.Module:
    """A timm model with the weights of a file, and the masks that are in it.

    Raises:
        ValueError: where the file is of another model.
    """
    existing("--checkpoint", path)
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **classes)
        if _load_masked(model, path):
            return model
        timm.models.load_checkpoint(model, str(path))
    except Exception as error:  # whatever a reader of files of any kind raises
        reason = textwrap.shorten(str(error), _LONGEST, placeholder=" ...").rstrip(".")
        raise ValueError(
            f"--checkpoint {path} does not load into {name}: {reason}; if it is of another number of classes, pass "
            "--num-classes N"
        ) from error
    return model


def _load_masked(model: nn.Module, path: Path) -> bool:
    """Whether the file knew of masks; then they are on the model."""
    if path.suffix == ".safetensors":
        file = PrunedFile.read(path)
        if file.architecture is None and not file.masks_apart:
            return False
        file.load_into(model)
        return True
    from timm.models import load_state_dict

    state = load_state_dict(str(path))
    if not any(is_mask(key, state) for key in state):
        return False
    fp.load_state_dict(model, state)
    return True
