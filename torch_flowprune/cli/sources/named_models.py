"""A model by its name, with its weights, on its device."""

from __future__ import annotations

import argparse
import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torch_flowprune.cli.sources.checkpoints import from_checkpoint

_DOWNLOAD = " (from the hub: hf download {} --local-dir DIR)"


def load_model(chosen: argparse.Namespace) -> nn.Module:
    """The timm model by its name, with pretrained weights, those of a checkpoint, or none; in eval mode."""
    timm = _timm()
    _check_name(timm, chosen.name)
    device = _device(chosen.device)
    torch.manual_seed(chosen.seed)
    classes = {} if chosen.num_classes is None else {"num_classes": chosen.num_classes}
    if chosen.random_init:
        model = _initialised(timm, chosen.name, classes)
    elif chosen.checkpoint:
        model = from_checkpoint(timm, chosen.name, chosen.checkpoint, classes)
    else:
        model = _pretrained(timm, chosen.name, classes)
    return model.eval().to(device)  # type: ignore[no-any-return]


def example_input(model: nn.Module, samples: int = 1) -> torch.Tensor:
    """An input of the shape that the model was made for."""
    from timm.data import resolve_data_config

    size = resolve_data_config({}, model=model)["input_size"]
    return torch.ones(samples, *size, device=next(model.parameters()).device)


def _device(name: str | None) -> torch.device:
    """The device of this name, as far as it is there.

    Raises:
        ValueError: where it is not.
    """
    here = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        here.append("mps")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: each backend has its own
        raise ValueError(
            f"--device {name}: there is no such device here; expected {', '.join(['cpu', *here])}"
        ) from error
    return device


def _check_name(timm: Any, name: str) -> None:
    if ":" in name:  # hf-hub:owner/name and local-dir:path, which timm resolves
        return
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}. " if near else f"{_for_another_library(name)}. "
        raise ValueError(
            f"timm has no model {name!r}; {hint}`python -c 'import timm; print(timm.list_models())'` lists timm's"
        )
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        raise ValueError(f"timm has no weights called {name!r}: expected one of {', '.join(known)}") from error


def _initialised(timm: Any, name: str, classes: dict[str, int]) -> Any:
    """A model as timm initialises it; of a hub or a folder only the config is read."""
    try:
        with _quiet_hub():
            return timm.create_model(name, pretrained=False, **classes)
    except Exception as error:
        if ":" not in name:
            raise
        raise OSError(_not_loaded(name, error)) from error


def _pretrained(timm: Any, name: str, classes: dict[str, int]) -> Any:
    try:
        with _quiet_hub():
            return timm.create_model(name, pretrained=True, **classes)
    except Exception as error:
        if ":" in name:
            raise OSError(_not_loaded(name, error)) from error
        raise OSError(
            f"the pretrained weights of {name} could not be loaded: {_reason(error)}; pass --random-init (no weights, "
            "to try a command) or --checkpoint FILE (weights you have), or try again where the hub can be reached"
        ) from error


def _not_loaded(name: str, error: Exception) -> str:
    """Of the hub or a folder, which hold models of any library."""
    kind, _, plain = name.partition(":")
    way_out = _for_another_library(plain, is_folder=kind == "local-dir")
    return f"{plain} could not be loaded as a model of timm: {_reason(error)}; {way_out}"


def _for_another_library(name: str, *, is_folder: bool = False) -> str:
    """The way out for models that timm does not have."""
    return (
        "for a model of another library, such as transformers, use torch-flowprune prune-checkpoint "
        f"{name if is_folder else 'DIR'}, which prunes its files{'' if is_folder else _DOWNLOAD.format(name)}, or "
        "fp.global_prune in Python"
    )


def _reason(error: Exception) -> str:
    """The first line, of errors that may have none, or one word."""
    if isinstance(error, KeyError) and error.args == ("architecture",):
        return "its config.json names no architecture of timm"
    line = str(error).splitlines()[0].rstrip(".") if str(error) else ""
    return line if " " in line else f"{type(error).__name__}: {line}"


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without a line for every retry: what could not be loaded is said once, at the end."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "timm", "httpx", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("models come from timm: pip install 'torch-flowprune[demo]'") from error
    return timm
