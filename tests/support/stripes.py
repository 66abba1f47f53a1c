"""The task of the stories: which way stripes run, under noise. Small, and not learnt by a linear model."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

CLASSES, SIZE = 4, 16


def images(count, seed):
    """Stripes of four directions, each with a phase of its own, and which direction it is."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=source)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    ways = torch.stack([rows, columns, rows + columns, rows - columns])[labels]
    phase = torch.rand(count, 1, 1, generator=source) * 6.28
    stripes = torch.sin(ways * 1.2 + phase)[:, None].expand(-1, 3, -1, -1)
    return stripes + 0.7 * torch.randn(count, 3, SIZE, SIZE, generator=source), labels


def loader_of(inputs, labels, size=64, seed=0):
    return DataLoader(TensorDataset(inputs, labels), size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def network(width=16):
    """Three convolutions with batch norm, and a linear layer."""

    def block(inputs, outputs, stride):
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(3, width, 1), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES))


def train(model, optimizer, loader, after_backward=lambda: None):
    model.train()
    for inputs, labels in loader:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        after_backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model, inputs, labels):
    return (model.eval()(inputs).argmax(1) == labels).float().mean().item()
