"""No trace: what is looked at is left as it was."""

from torch_flowprune.inputs.guards.collector import no_collection
from torch_flowprune.inputs.guards.copies import copied_model, tensors_kept
from torch_flowprune.inputs.guards.state_guard import (
    Restore,
    check_mode,
    cpu_generator,
    forget_caches,
    on_host,
    randomness,
    same_randomness,
    settle,
    uncompiled,
    untouched,
)

__all__ = [
    "Restore",
    "check_mode",
    "copied_model",
    "cpu_generator",
    "forget_caches",
    "no_collection",
    "on_host",
    "randomness",
    "same_randomness",
    "settle",
    "tensors_kept",
    "uncompiled",
    "untouched",
]
