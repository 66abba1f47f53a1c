"""Whether the call that runs an operator stands where a smaller model can be told the dense size of a dimension."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

_OF_LAYERS = ("layer_norm", "rms_norm", "group_norm", "scaled_dot_product_attention")
SPANNING = frozenset((*_OF_LAYERS, "mean", "var", "std", "var_mean", "std_mean"))
"""Operators that divide by a number of positions of their first operand."""

FOLDER_OF_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
FOLDER_OF_OURS = f"{Path(__file__).parents[2]}{os.sep}"
_OF_NORMS = {kind.forward.__code__ for kind in (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.MultiheadAttention)}
_FUNCTIONAL = f"{FOLDER_OF_TORCH}nn{os.sep}functional.py"


def is_tellable(module: nn.Module) -> bool:
    """Of the call that is being run: of torch's own norms and attention, or in a function of the module's own code.

    What a smaller model computes in already told code goes by its present sizes.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code in _OF_NORMS or code.co_filename.endswith("dense_spans.py"):
            return True
        if code.co_filename == _FUNCTIONAL and code.co_name not in SPANNING:
            if code.co_name != "multi_head_attention_forward":
                return False
        elif not code.co_filename.startswith((FOLDER_OF_TORCH, FOLDER_OF_OURS)):
            return _is_method(module, code) or _is_code_of(frame.f_globals.get(code.co_name), code)
        frame = frame.f_back
    return False


def _is_method(module: nn.Module, code: CodeType) -> bool:
    return any(_is_code_of(vars(kind).get(code.co_name), code) for kind in type(module).__mro__)


def _is_code_of(value: Any, code: CodeType) -> bool:
    inner = inspect.unwrap(value) if isinstance(value, FunctionType) else None
    return isinstance(inner, FunctionType) and inner.__code__ is code
