"""Images as tensors, decoded once: scikit-learn's digits, torchvision's CIFAR, or any folder with train/ and test/."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset
from tqdm import tqdm

import torch_flowprune as fp

Batch = tuple[Tensor, Tensor]
CACHE = Path("build/paper/cache")
_SPLIT_SEED = 0
"""Of the validation split and the subset: all runs choose by, and are compared on, the same images."""


@dataclass(frozen=True)
class Split:
    """Images (uint8, sample x 3 x height x width) and their classes."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | Sequence[int]) -> Split:
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: str | torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def batches(self, size: int) -> list[Batch]:
        """In order and as they are, the mapping of [0, 255] to [-1, 1] aside."""
        return [(normal(self.images[i : i + size]), self.labels[i : i + size]) for i in range(0, len(self), size)]


@dataclass(frozen=True)
class Data:
    """Three splits: one to train on, one to choose by, one to look at once."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    flip: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.images.shape[1:])

    def digest(self) -> str:
        """What names these images and their split: a run on others is another run."""
        found = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            found.update(split.images.cpu().contiguous().numpy().tobytes() + split.labels.cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    def to(self, device: str | torch.device) -> Data:
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    def epoch(self, size: int, seed: int) -> Iterator[Batch]:
        """The training images once, shuffled, cropped and (where their meaning stays) flipped, all as the seed says."""
        source = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=source)
        device = self.train.images.device
        for chosen in order.split(size):
            batch = self.train.take(chosen.to(device))
            yield augmented(normal(batch.images), source, self.flip), batch.labels

    def scoring(self, samples: int, size: int, seed: int) -> list[Batch]:
        """A fixed class-balanced sample of the training images, as they are: the same g and H whenever it is read.

        The paper's code scored on shuffled, augmented batches, and needed one image of each class more than it used.
        """
        fewest = int(self.train.labels.bincount(minlength=self.classes).min())
        per_class = min(max(1, samples // self.classes), fewest)
        source = torch.Generator().manual_seed(seed)
        labels = self.train.labels.cpu()
        chosen = fp.class_balanced(TensorDataset(labels), per_class, targets=labels.tolist(), generator=source).indices
        mixed = torch.tensor(chosen)[torch.randperm(len(chosen), generator=source)]
        return self.train.take(mixed.to(self.train.images.device)).batches(size)


def load(
    name: str,
    *,
    root: str | Path = "data",
    download: bool = False,
    size: int | None = None,
    validation: float = 0.1,
    subset: int | None = None,
    progress: bool = True,
) -> Data:
    """``digits``; torchvision's ``cifar10`` or ``cifar100``, under ``root``; or a folder with train/ and test/.

    Args:
        size: height and width that images are brought to; 16 for digits (which have 8), else 32.
        validation: the share of the training images held out for choosing, of every class alike.
        subset: so many training images (before the split) and as many test images at most, of every class alike.
        progress: whether decoding a folder for the first time shows a bar.
    """
    if name == "digits":
        train, test, classes = _digits(size or 16)
    elif name in ("cifar10", "cifar100"):
        train, test, classes = _cifar(name, Path(root), download)
    else:
        train, test, classes = _folder(Path(name), size or 32, progress)
    if subset is not None:
        train, test = _balanced(train, min(subset, len(train)))[0], _balanced(test, min(subset, len(test)))[0]
    held_out, rest = _balanced(train, max(classes, round(validation * len(train))))
    known = name if name in ("digits", "cifar10", "cifar100") else Path(name).name
    return Data(known, rest, held_out, test, classes, flip=name != "digits")


def normal(images: Tensor) -> Tensor:
    """Mean and deviation 0.5, as in the paper's code."""
    return images.float().div_(127.5).sub_(1)


def augmented(images: Tensor, source: torch.Generator, flip: bool) -> Tensor:
    """A random crop of each image, padded by an eighth of its size with zeros, and a mirror image half of the time."""
    count, _, height, width = images.shape
    pad = height // 8
    padded = functional.pad(images, (pad,) * 4)
    down, right = torch.randint(2 * pad + 1, (2, count), generator=source)
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, generator=source) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
    return padded.permute(0, 2, 3, 1)[tuple(part.to(images.device) for part in index)].permute(0, 3, 1, 2).contiguous()


def _balanced(split: Split, count: int) -> tuple[Split, Split]:
    """About ``count`` images, of every class its share, and the rest."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    labels = split.labels[order]
    chosen = torch.zeros(len(split), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        chosen[members[: max(1, round(count * len(members) / len(split)))]] = True
    return split.take(order[chosen]), split.take(order[~chosen])


def _digits(size: int) -> tuple[Split, Split, int]:
    """1,797 handwritten digits; every fifth is for testing."""
    found = importlib.import_module("sklearn.datasets").load_digits()
    images = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    images = functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp(0, 255).round()
    everything = Split(images.to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(found.target).long())
    testing = torch.arange(len(everything)) % 5 == 4
    return everything.take(~testing), everything.take(testing), 10


def _cifar(name: str, root: Path, download: bool) -> tuple[Split, Split, int]:
    kind = getattr(importlib.import_module("torchvision.datasets"), name.upper())
    try:
        parts = [kind(root, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(f"no {name} under {root}: add --download, or say where it is with --root") from error
    splits = [
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    ]
    return splits[0], splits[1], len(parts[0].classes)


def _folder(path: Path, size: int, progress: bool) -> tuple[Split, Split, int]:
    if missing := [part for part in ("train", "test") if not (path / part).is_dir()]:
        lacks = " and no ".join(f"{part}/" for part in missing)
        raise ValueError(
            f"{path} has no {lacks}: expected train/ and test/ with one folder a class in each; or digits, cifar10, "
            "cifar100"
        )
    folders = [importlib.import_module("torchvision.datasets").ImageFolder(path / part) for part in ("train", "test")]
    if folders[0].classes != folders[1].classes:
        raise ValueError(
            f"train/ and test/ of {path} have other classes: "
            f"{sorted(set(folders[0].classes) ^ set(folders[1].classes))[:5]}"
        )
    return _decoded(folders[0], size, progress), _decoded(folders[1], size, progress), len(folders[0].classes)


def _decoded(folder: Any, size: int, progress: bool) -> Split:
    """Every image of a folder as a tensor; kept in a file, since decoding takes longer than an epoch of a small net."""
    listed = hashlib.sha256(
        repr((size, folder.root, [(path, Path(path).stat().st_mtime_ns) for path, _ in folder.samples])).encode()
    ).hexdigest()
    kept = CACHE / f"{listed[:20]}.pt"
    if kept.exists():
        return Split(**torch.load(kept, weights_only=True))
    as_tensor = importlib.import_module("torchvision.transforms.functional").pil_to_tensor
    images = torch.empty(len(folder), 3, size, size, dtype=torch.uint8)
    for i, (image, _) in enumerate(tqdm(folder, desc="decoding", unit="image", leave=False, disable=not progress)):
        images[i] = as_tensor(image if image.size == (size, size) else image.resize((size, size)))
    split = Split(images, torch.tensor(folder.targets))
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"images": split.images, "labels": split.labels}, kept)
    return split
