"""The smallest model of every timm module and every torchvision classification model, with no weight at its default."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn


def listed(path: Path) -> list[str]:
    """The names, smallest model first; computed once and kept in a file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([*smallest_of_each_module(), *torchvision_classifiers()], indent=1) + "\n")
    return list(json.loads(path.read_text()))


def smallest_of_each_module() -> list[str]:
    import timm

    chosen = {}
    for module in timm.list_modules():
        sizes = dict(sized(timm.create_model, timm.list_models(module=module)))
        if sizes:
            name = min(sizes, key=sizes.__getitem__)
            chosen[f"timm/{name}"] = sizes[name]
    return sorted(chosen, key=chosen.__getitem__)


def torchvision_classifiers() -> list[str]:
    from torchvision import models

    sizes = dict(sized(models.get_model, models.list_models(module=models)))
    return [f"torchvision/{name}" for name in sorted(sizes, key=sizes.__getitem__)]


def sized(make: Callable[[str], nn.Module], names: list[str]) -> Iterator[tuple[str, int]]:
    """Each name with its number of parameters, without allocating them where that can be."""
    for name in names:
        try:
            with torch.device("meta"):
                model = make(name)
        except Exception as e:  # it computes with real tensors while it is built
            print(f"{name} is built for real, as on the meta device: {type(e).__name__}: {e}", file=sys.stderr)
            model = make(name)
        yield name, sum(p.numel() for p in model.parameters())


def built(name: str) -> tuple[nn.Module, Tensor]:
    """`library/model` in eval mode, and two inputs of the size it was made for."""
    library, _, model = name.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        net = timm.create_model(model)
        size = net.default_cfg["input_size"]
    else:
        from torchvision import models

        net = models.get_model(model)
        size = (3, *[299 if "inception" in model else 224] * 2)
    return randomised(net).eval(), torch.randn(2, *size)


def randomised(model: nn.Module) -> nn.Module:
    """No default survives: zeros and ones hide faults."""
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() == max(p.shape, default=1) or not p.any():
                p.mul_(torch.rand_like(p) + 0.5).add_(0.1 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(0.1 * torch.randn_like(b))
            elif name.endswith("running_var"):
                b.mul_(torch.rand_like(b) + 0.5)
    return model
