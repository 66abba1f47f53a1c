"""What a folder of safetensors shards holds, read off its index and headers, and checked before anything is computed.

A shard is eight bytes of length, a header in JSON, and the tensors one after the other, row by row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_WEIGHTS = (_SUFFIX, *_PICKLED, ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a shard, where it lies.

    Attributes:
        name: the parameter's.
        path: the shard.
        begin: the place of its first byte in the shard.
        end: that after its last.
        shape: its sizes.
        kind: its dtype, as safetensors calls it: ``"BF16"``.
    """

    name: str
    path: Path
    begin: int
    end: int
    shape: tuple[int, ...]
    kind: str

    @property
    def numel(self) -> int:
        """How many elements."""
        return prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype, a floating one."""
        return FLOATS[self.kind]

    def read(self, file: BinaryIO, start: int, stop: int) -> bytearray:
        """The bytes of the elements from ``start`` to ``stop``."""
        size = self.dtype.itemsize
        buffer = bytearray((stop - start) * size)
        file.seek(self.begin + start * size)
        if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]  # binary files have it
            raise ValueError(f"{self.path} ended within {self.name!r}: it was changed while it was read")
        return buffer

    def values(self, held: bytearray) -> Tensor:
        """The elements that these bytes hold, flat, in the same memory."""
        return torch.frombuffer(held, dtype=self.dtype)


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint as it lies on the disk.

    Attributes:
        path: the folder.
        tensors: all that it holds, by name, in the order of the index.
        index: the name of the index, or None where one file is all.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    index: str | None

    @classmethod
    def open(cls, folder: Path, what: str = "source") -> CheckpointFolder:
        """Read the index and every header.

        Raises:
            FileNotFoundError, NotADirectoryError: where there is no such folder, or a shard is missing.
            ValueError: for a folder of another kind, and for a damaged index or shard.
        """
        _check_folder(folder, what)
        index = _index_of(folder, what)
        if index is None:
            (file,) = folder.glob(f"*{_SUFFIX}")
            return cls(folder, {one.name: one for one in _header(file)}, None)
        shard_of = _weight_map(folder / index)
        held = {one.name: one for shard in dict.fromkeys(shard_of.values()) for one in _header(folder / shard)}
        for name, shard in shard_of.items():
            if name not in held or held[name].path.name != shard:
                raise ValueError(
                    f"{folder / index} says that {name!r} is in {shard}, and it is not: the index is damaged"
                )
        if more := [name for name in held if name not in shard_of]:
            raise ValueError(f"{held[more[0]].path} holds {more[0]!r}, of which {folder / index} says nothing")
        return cls(folder, {name: held[name] for name in shard_of}, index)

    @cached_property
    def shards(self) -> dict[Path, list[StoredTensor]]:
        """The tensors of each shard, as they follow each other there."""
        by_file: dict[Path, list[StoredTensor]] = {}
        for one in sorted(self.tensors.values(), key=lambda one: one.begin):
            by_file.setdefault(one.path, []).append(one)
        return dict(sorted(by_file.items()))

    def others(self) -> Iterator[Path]:
        """Every other file: index, configuration, tokenizer, but no hidden one, and no weights in a second form."""
        return (path for path in self._beside() if path.suffix not in _OTHER_WEIGHTS)

    def second_forms(self) -> list[Path]:
        """Files of weights that are no part of this checkpoint."""
        return [path for path in self._beside() if path.suffix in _OTHER_WEIGHTS]

    def _beside(self) -> Iterator[Path]:
        for path in sorted(self.path.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(self.path).parts)
            if path.is_file() and not hidden and path not in self.shards:
                yield path


def _check_folder(folder: Path, what: str) -> None:
    if folder.is_file():
        raise NotADirectoryError(
            f"{what} {folder} is a file: expected a folder of {_SUFFIX} files, as a model is downloaded or saved; put "
            "a single file into a folder of its own"
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{what} {folder}: there is no such folder; expected one of {_SUFFIX} files (from the Hugging Face hub: hf "
            "download NAME --local-dir DIR)"
        )


def _index_of(folder: Path, what: str) -> str | None:
    """The name of the one index; None where one file without an index is all."""
    indexes = sorted(path.name for path in folder.glob(f"*{_INDEX}"))
    if len(indexes) == 1:
        return indexes[0]
    if indexes:
        raise ValueError(
            f"{what} {folder} holds {len(indexes)} checkpoints, {', '.join(indexes)}: give each its own folder"
        )
    files = sorted(path.name for path in folder.glob(f"*{_SUFFIX}"))
    if len(files) > 1:
        raise ValueError(
            f"{what} {folder} holds {len(files)} {_SUFFIX} files and no *{_INDEX} that says which belong together: add "
            "the index, or give each file its own folder"
        )
    if not files:
        raise ValueError(_no_shards(folder, what))
    return None


def _no_shards(folder: Path, what: str) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    inner = sorted({path.parent.name for path in folder.glob(f"*/*{_SUFFIX}")})
    if pickled:
        return (
            f"{what} {folder} holds {pickled[0]}, a pickle, which can only be loaded whole: save the model as "
            f"safetensors first (save_pretrained, or safetensors.torch.save_file); expected {_SUFFIX} files"
        )
    where = f"; there are some in {', '.join(inner)}: give one of these folders" if inner else ""
    return f"{what} {folder}: expected {_SUFFIX} files, found none{where}"


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(file, str) and Path(file).name == file for file in files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of a checkpoint, or damaged: {error!r}") from error
    if not plain or not files:
        raise ValueError(f"{index}: weight_map should map names of tensors to names of files beside it")
    if missing := sorted({file for file in files.values() if not (index.parent / file).is_file()}):
        raise FileNotFoundError(
            f"{index} names {len(missing)} shards that are not there: {', '.join(missing[:5])}; download the rest"
        )
    return files  # type: ignore[no-any-return]


def _header(path: Path) -> Iterator[StoredTensor]:
    """The tensors of a shard."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= size - 8 else b""
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_located(path, name, one, 8 + length) for name, one in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error!r}") from error
    end = 8 + length
    for one in sorted(tensors, key=lambda one: one.begin):
        if one.begin != end or (one.kind in FLOATS and one.numel * one.dtype.itemsize != one.end - one.begin):
            raise ValueError(f"{path} is damaged: the bytes of {one.name!r} do not fit its shape and its place")
        end = one.end
    if end != size:
        raise ValueError(f"{path} has {size:,} bytes and should have {end:,}: it was cut short; download it again")
    return iter(tensors)


def _located(path: Path, name: str, one: dict[str, Any], base: int) -> StoredTensor:
    begin, end = one["data_offsets"]
    return StoredTensor(name, path, base + begin, base + end, tuple(one["shape"]), one["dtype"])
