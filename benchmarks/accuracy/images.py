"""CIFAR-10 as tensors: decoded once, normalised, cropped and flipped without leaving torch."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Images:
    """Normalised images, channels last, and their classes."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: Tensor | slice) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def drawn(self, count: int, seed: int) -> Images:
        """So many of them, in a random order; all of them as they are, where so many there are not."""
        if count >= len(self):
            return self
        return self.part(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count])

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.pixels.split(size), self.labels.split(size), strict=True))


def load(folder: Path, cache: Path, split: str) -> Images:
    """One split of ``folder/cifar10_jpeg.npz``; its pixels are kept in ``cache``, for decoding takes a while."""
    kept = cache / f"{split}.pt"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(_decoded(folder / "cifar10_jpeg.npz", split), part := cache / f"{split}.{torch.seed()}")
        part.replace(kept)
    pixels, labels = torch.load(kept)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    floats = ((pixels.permute(0, 3, 1, 2).float() / 255).sub_(mean)).div_(deviation)
    return Images(floats.contiguous(memory_format=torch.channels_last), labels.long())


def _decoded(path: Path, split: str) -> tuple[Tensor, Tensor]:
    archive = np.load(path)
    files, offset = archive[f"{split}_jpeg"].tobytes(), archive[f"{split}_offset"]
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(files[start:stop])).convert("RGB")) for start, stop in pairwise(offset)]
    )
    return torch.from_numpy(pixels), torch.from_numpy(archive[f"{split}_label"])


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image flipped or not, and cropped from itself with a grey border of four."""
    count, _, height, width = pixels.shape
    flip = torch.rand(count, generator=generator) < 0.5
    padded = functional.pad(torch.where(flip.view(-1, 1, 1, 1), pixels.flip(-1), pixels), (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count, 1, 1), generator=generator)
    rows, columns = top + torch.arange(height).view(1, -1, 1), left + torch.arange(width).view(1, 1, -1)
    picked = padded[torch.arange(count).view(-1, 1, 1), :, rows, columns]  # (count, height, width, channel)
    return picked.permute(0, 3, 1, 2)
