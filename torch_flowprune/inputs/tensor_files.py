"""Tensors in a safetensors file, and with them what they are: JSON in the metadata, which no damage passes unseen."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

_ABOUT, _DIGEST = "torch_flowprune", "torch_flowprune_sha256"


def write_tensors(path: str | PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file, every tensor by itself, wherever they are and whatever memory they share.

    The same tensors and words give the same bytes.

    Raises:
        ImportError: without safetensors.
    """
    text = json.dumps(about)
    _safetensors().torch.save_file(
        {name: _by_itself(tensor) for name, tensor in tensors.items()},
        path,
        {"format": "pt", _ABOUT: text, _DIGEST: _digest(text)},
    )
    _sort_metadata(Path(path))


def read_tensors(path: str | PathLike[str], what: str, writer: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, on the host, and what was written of them.

    Args:
        path: the file.
        what: what it should hold, for the error.
        writer: the call that writes such files, for the error.

    Raises:
        ValueError: for a file of another kind, or a damaged one.
    """
    library = _safetensors()
    try:
        with library.safe_open(path, "pt") as file:
            text, digest = _words(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (KeyError, library.SafetensorError) as error:
        raise ValueError(f"{path} holds no {what}: expected a file written by {writer}") from error
    if digest not in ("", _digest(text)):
        raise ValueError(f"{path} is damaged: what it says of its {what} is not what {writer} wrote")
    if not isinstance(about := _parsed(text), dict):
        raise ValueError(f"{path} holds no {what}: expected a file written by {writer}")
    return tensors, about


def check_folder(path: str | PathLike[str]) -> None:
    """An error where a path cannot be written to.

    Raises:
        TypeError: for what is no path.
        FileNotFoundError: where its folder is not there.
    """
    folder = Path(as_path(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {folder}; make it first")


def as_path(path: Any) -> str:
    """What names a file.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"path should be the path of a file, got {type(path).__name__}")
    return os.fspath(path)


def has_words(path: str | PathLike[str]) -> bool:
    """Whether a file says of its tensors what :func:`write_tensors` writes.

    Raises:
        ValueError: where it is no safetensors file.
    """
    with _opened(path) as file:
        return _ABOUT in (file.metadata() or {})


def plain_tensors(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of any safetensors file, on the host.

    Raises:
        ValueError: where it is none.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


@contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[Any]:
    library = _safetensors()
    if not Path(as_path(path)).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with library.safe_open(path, "pt") as file:
            yield file
    except library.SafetensorError as error:
        raise ValueError(
            f"{path} is damaged, or no safetensors file ({error}); for a file of torch.save use torch.load "
            "and fp.load_state_dict"
        ) from error


def _sort_metadata(path: Path) -> None:
    """Entries of metadata stand in an order drawn at random: put it right, in the place that they take."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(size))


def _words(metadata: Mapping[str, str]) -> tuple[str, str]:
    return metadata[_ABOUT], metadata.get(_DIGEST, "")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _by_itself(tensor: Tensor) -> Tensor:
    """On the host, in memory of its own."""
    alone = tensor.detach().cpu().contiguous()
    return alone if alone.untyped_storage().nbytes() == alone.nbytes else alone.clone()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors is needed to read and write files: pip install safetensors (or torch-flowprune[io])"
        ) from error
    return safetensors
