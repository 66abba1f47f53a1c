"""Three nets for CIFAR-10, one of each family whose layers differ most: residual, depthwise, attention."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def resnet20(width: int = 16) -> nn.Module:
    """He et al. 2016: three stages of three blocks; 0.27 M parameters at width 16."""
    shapes = [
        (1 if stage == 0 and block == 0 else 2 ** (stage - (block == 0)), 2**stage, 2 if stage and not block else 1)
        for stage in range(3)
        for block in range(3)
    ]
    return nn.Sequential(
        _conv(3, width, 3),
        nn.ReLU(),
        *(ResidualBlock(width * inputs, width * outputs, stride) for inputs, outputs, stride in shapes),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def mobilenet(width: float = 0.5) -> nn.Module:
    """Howard et al. 2017 with the strides usual for small images: 2 in four places, none in the stem."""
    outputs = [round(width * full) for full in (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)]
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    inputs = [round(width * 32), *outputs]
    blocks = [
        layer
        for before, after, stride in zip(inputs, outputs, strides, strict=False)
        for layer in (_conv(before, before, 3, stride, before), nn.ReLU(), _conv(before, after, 1), nn.ReLU())
    ]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs[-1], 10))
    return nn.Sequential(_conv(3, inputs[0], 3), nn.ReLU(), *blocks, *head)


def vit(width: int = 128, depth: int = 6) -> nn.Module:
    """timm's vision transformer on patches of 4 x 4: 64 tokens, averaged before the head.

    For so few tokens plain products are twice as fast as the fused attention of a CPU.
    """
    net = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=width, depth=depth, num_heads=4, mlp_ratio=2, num_classes=10,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    for block in net.blocks:
        block.attn.fused_attn = False
    return net


NETS = {"resnet20": resnet20, "mobilenet": mobilenet, "vit": vit}


def classifier(net: nn.Module) -> str:
    """The weight of the last linear layer: its rows are classes, and stay."""
    return [f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
