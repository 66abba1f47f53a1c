"""A fast recipe: one cycle of the learning rate, label smoothing, crop and flip; resumed where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.accuracy.images import Images, augmented


@dataclass(frozen=True)
class Recipe:
    """How a net is trained, its learning rate rising for so many epochs first, and how it is tuned after pruning."""

    epochs: int
    rising: float
    rate: float
    tuning_rate: float
    adam: bool = False
    bfloat16: bool = False
    decay: float = 5e-4
    batch: int = 128
    tuning_batch: int = 64
    smoothing: float = 0.1

    def optimizer(self, net: nn.Module, rate: float) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.AdamW(net.parameters(), rate, weight_decay=self.decay)
        return torch.optim.SGD(net.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=self.decay)


RECIPES = {
    "resnet20": Recipe(epochs=3, rising=1.25, rate=0.3, tuning_rate=0.02, bfloat16=True),
    "mobilenet": Recipe(epochs=3, rising=0.75, rate=0.2, tuning_rate=0.02),
    "vit": Recipe(epochs=3, rising=0.75, rate=1.5e-3, tuning_rate=3e-4, adam=True, bfloat16=True, decay=0.05),
}


def wait_while(path: Path | None) -> None:
    """Someone else is measuring seconds while this file exists."""
    while path is not None and path.exists():
        time.sleep(5)


def step(net: nn.Module, batch: tuple[Tensor, Tensor], recipe: Recipe, optimizer: torch.optim.Optimizer) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
        loss = functional.cross_entropy(net(batch[0]), batch[1], label_smoothing=recipe.smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train(
    net: nn.Module, images: Images, recipe: Recipe, kept: Path, seed: int = 0, pause: Callable[[], None] = lambda: None
) -> nn.Module:
    """One cycle over all epochs, from the last checkpoint on; without the last batch of an epoch, which is smaller."""
    steps = len(images) // recipe.batch
    optimizer = recipe.optimizer(net, recipe.rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=recipe.epochs * steps, pct_start=recipe.rising / recipe.epochs
    )
    state = torch.load(kept) if kept.exists() else {"epoch": 0}
    if state["epoch"]:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        cycle.last_epoch = state["epoch"] * steps
    for epoch in range(state["epoch"], recipe.epochs):
        started, losses = time.perf_counter(), []
        chance = torch.Generator().manual_seed(1000 * seed + epoch)
        for index in torch.randperm(len(images), generator=chance)[: steps * recipe.batch].view(steps, -1):
            pause()
            pixels = augmented(images.pixels[index], chance)
            losses.append(step(net.train(), (pixels, images.labels[index]), recipe, optimizer))
            cycle.step()
        now = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "cycle": cycle.state_dict()}
        torch.save({"epoch": epoch + 1, **now}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
        seconds = time.perf_counter() - started
        print(f"{kept.stem} epoch {epoch + 1}: loss {sum(losses) / steps:.3f}, {seconds:.0f} s", flush=True)
    return net.eval()


def tune(
    net: nn.Module, images: Images, recipe: Recipe, steps: int, seed: int, pause: Callable[[], None] = lambda: None
) -> None:
    """A few steps at a small rate that falls to nothing; the same images in the same order for one seed."""
    chance = torch.Generator().manual_seed(seed)
    optimizer = recipe.optimizer(net, recipe.tuning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for index in torch.randint(len(images), (steps, recipe.tuning_batch), generator=chance):
        pause()
        step(net.train(), (augmented(images.pixels[index], chance), images.labels[index]), recipe, optimizer)
        falling.step()
    net.eval()


@torch.no_grad()
def evaluate(net: nn.Module, images: Images, recipe: Recipe) -> tuple[float, float]:
    """The mean loss, without smoothing, and the accuracy."""
    loss, right = 0.0, 0
    for pixels, labels in images.batches(500):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
            logits = net.eval()(pixels).float()
        loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
    return loss / len(images), right / len(images)
