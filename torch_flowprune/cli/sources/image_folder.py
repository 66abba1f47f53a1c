"""A folder of images as a loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset


class ImageOptions(NamedTuple):
    """How many images are read, and how."""

    samples: int
    batch_size: int
    workers: int
    seed: int


def image_loader(option: str, folder: Path, model: nn.Module, reading: ImageOptions) -> DataLoader[Any]:
    """Images of a folder, drawn by the seed, as the model was evaluated on: timm's transforms."""
    from timm.data import create_transform, resolve_data_config
    from torchvision.datasets import ImageFolder

    config = resolve_data_config({}, model=model)
    transform = create_transform(**config, is_training=False)
    try:
        images = ImageFolder(
            folder, transform, target_transform=_labels(option, folder, model), loader=_ImageReader(option)
        )
    except FileNotFoundError as error:  # a folder without a single image
        raise ValueError(
            f"{option} {folder}: expected images in every folder, and found none: {str(error).splitlines()[0]}"
        ) from error
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(reading.seed))[: reading.samples]
    return DataLoader(Subset(images, drawn.tolist()), reading.batch_size, num_workers=reading.workers)


class _ImageReader:
    """torchvision's reader of images, whose errors name the file; workers are sent it, so it is a class."""

    def __init__(self, option: str) -> None:
        self.option = option

    def __call__(self, path: str) -> Any:
        from torchvision.datasets.folder import default_loader

        try:
            return default_loader(path)
        except Exception as error:
            raise ValueError(
                f"the image {path} of {self.option} cannot be read ({type(error).__name__}): repair it, or remove it"
            ) from error


def _labels(option: str, folder: Path, model: Any) -> Any:
    """From the number of a folder to the model's class.

    ImageNet's own numbers where the folders are named by its synsets.
    """
    from timm.data import ImageNetInfo

    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise ValueError(
            f"{option} {folder}: expected one folder of images per class, found no folder: put the images of each "
            f"class into a folder of its own, {folder / 'NAME_OF_CLASS'}"
        )
    if len(names) == model.num_classes:
        return None
    known = {label: index for index, label in enumerate(ImageNetInfo().label_names())}
    if model.num_classes == len(known) and all(name in known for name in names):
        return [known[name] for name in names].__getitem__
    raise ValueError(
        f"{option} {folder}: expected a folder for each of the model's {model.num_classes} classes, found {len(names)} "
        f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); pass --num-classes {len(names)}, and "
        "--checkpoint FILE with a head for these classes"
    )
