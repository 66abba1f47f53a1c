"""The paper's networks for images of 32 x 32 pixels: VGG-13, MobileNet-V1 and the ResNets, with a width multiplier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

Pair = tuple[nn.Module, str]

_VGG13 = (64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
"""Channels of the convolutions; 0 is a pooling."""
_MOBILENET = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""Channels and stride of the separable convolutions behind the first, 32 channels wide."""


class Classifier(nn.Module):
    """Features, their mean over the image, one linear layer."""

    def __init__(self, features: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean((2, 3)))


class Block(nn.Module):
    """Two convolutions and what goes round them.

    Nothing, or a 1 x 1 projection with batch norm where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def vgg13(classes: int = 10, width: float = 1.0) -> Classifier:
    """Convolution, ReLU, batch norm, in this order."""
    layers: list[nn.Module] = []
    inputs = 3
    for channels in _VGG13:
        if channels:
            outputs = _scaled(channels, width)
            layers += [_conv(inputs, outputs, 3), nn.ReLU(), nn.BatchNorm2d(outputs)]
            inputs = outputs
        else:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # images below 32 x 32 reach one pixel early, and stay there
    return Classifier(nn.Sequential(*layers), inputs, classes)


def mobilenet(classes: int = 10, width: float = 1.0) -> Classifier:
    """MobileNet-V1: depthwise and pointwise convolutions by turns."""
    inputs = _scaled(32, width)
    layers: list[nn.Module] = [_conv(3, inputs, 3), nn.BatchNorm2d(inputs), nn.ReLU()]
    for channels, stride in _MOBILENET:
        outputs = _scaled(channels, width)
        layers += [_conv(inputs, inputs, 3, stride, groups=inputs), nn.BatchNorm2d(inputs), nn.ReLU()]
        layers += [_conv(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return Classifier(nn.Sequential(*layers), inputs, classes)


def resnet(blocks: tuple[int, ...], channels: tuple[int, ...], classes: int = 10, width: float = 1.0) -> Classifier:
    """Stages of basic blocks; every stage but the first halves the image."""
    inputs = _scaled(channels[0], width)
    layers: list[nn.Module] = [_conv(3, inputs, 3), nn.BatchNorm2d(inputs), nn.ReLU()]
    for stage, (count, wanted) in enumerate(zip(blocks, channels, strict=True)):
        outputs = _scaled(wanted, width)
        for i in range(count):
            layers.append(Block(inputs, outputs, 2 if stage and not i else 1))
            inputs = outputs
    return Classifier(nn.Sequential(*layers), inputs, classes)


MODELS: dict[str, Callable[..., Classifier]] = {
    "vgg13": vgg13,
    "mobilenet": mobilenet,
    "resnet56": partial(resnet, (9, 9, 9), (16, 32, 64)),
    "resnet20": partial(resnet, (3, 3, 3), (16, 32, 64)),
    "resnet18": partial(resnet, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": partial(resnet, (3, 4, 6, 3), (64, 128, 256, 512)),
}


def build(name: str, classes: int = 10, width: float = 1.0) -> Classifier:
    """A model by name, every layer ``width`` times as wide as the paper's."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    return MODELS[name](classes=classes, width=width)


def prunable(model: nn.Module) -> list[Pair]:
    """The convolutions whose filters may go.

    Depthwise ones follow the layer before, and a ResNet's first is protected, as in the paper's code.
    """
    found: list[Pair] = [
        (module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups == 1
    ]
    return found[1:] if any(isinstance(module, Block) for module in model.modules()) else found


def followers(model: nn.Module) -> dict[str, list[str]]:
    """By a convolution's weight, the parameters that die with its filters.

    Batch norm, and a depthwise convolution behind it with its own. A mask on these, too, makes a masked filter mean
    what a removed one does: nothing comes out of its channel, no batch norm's bias either.
    """
    found: dict[str, list[str]] = {}
    leader = ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            leader = f"{name}.weight"
            found[leader] = []
        elif isinstance(module, nn.Conv2d):
            found[leader].append(f"{name}.weight")
        elif isinstance(module, nn.BatchNorm2d):
            found[leader] += [f"{name}.weight", f"{name}.bias"]
    return found


@torch.no_grad()
def settle(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give batch norm the statistics of these images, and leave the model in train mode.

    Running averages lag behind weights that move fast: after one epoch of twenty steps they gave a loss in the fifties,
    and in MobileNet, 27 of them behind each other and filters masked in between, one of 1e24, of which H·g overflows.
    """
    norms = [(module, module.momentum) for module in model.train().modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, _ in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    for images in batches:
        model(images)
    for norm, momentum in norms:
        norm.momentum = momentum


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))
