"""The net of the channel tests, and its data."""

import torch
from torch import nn

DATA = (torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(6) % 4)
X = DATA[0]


class Residual(nn.Module):
    """A stem, a residual block whose sum couples stem and second convolution, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_bn = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.outer, self.outer_bn = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.outer_bn(self.outer(torch.sigmoid(self.inner_bn(self.inner(x))))))
        return self.head(x.mean((2, 3)))


def build():
    torch.manual_seed(3)
    return shaken(Residual().double()).eval()


def shaken(model):
    """Norms off their defaults: zeros and ones hide faults."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -1, 1),
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
            ):
                nn.init.uniform_(tensor, low, high)
    return model
