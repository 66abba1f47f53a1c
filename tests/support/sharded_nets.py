"""Small models as ranks hold them: sharded evenly or not, along one mesh or two, by row or by column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(5))
Y = torch.arange(16) % 4
BLOCKS = (0, 2, 4)


def net() -> nn.Sequential:
    """10 rows over 4 ranks are 3, 3, 3, 1; and 5 over 4 leave one rank with none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 5), nn.LayerNorm(5), nn.Linear(5, 4))


@dataclass(frozen=True)
class Spread:
    """A way to lay a model on four ranks, and which of them read the same data."""

    name: str
    shape: tuple[int, ...]
    lay: Callable[[nn.Module, Any], nn.Module]
    readers: Callable[[int], tuple[int, int]] = lambda rank: (rank, 4)

    def of(self, model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", self.shape, mesh_dim_names=("outer", "inner")[: len(self.shape)])
        return self.lay(model, mesh)

    def share(self, rank: int) -> slice:
        """The part of the data that a rank reads."""
        first, step = self.readers(rank)
        return slice(first, None, step)


def in_blocks(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    for block in BLOCKS:
        fully_shard(model[block], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def in_tensors(model: nn.Module, mesh: Any) -> nn.Module:
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


FSDP = Spread("fully_shard", (4,), in_blocks)
REPLICAS = Spread("two replicas, each sharded", (2, 2), in_blocks)
TWO_WAYS = Spread(
    "tensor parallel, then fully_shard",
    (2, 2),
    lambda model, mesh: in_blocks(in_tensors(model, mesh["inner"]), mesh["outer"]),
    lambda rank: (rank // 2, 2),
)
TENSORS = Spread("tensor parallel", (2, 2), lambda model, mesh: in_tensors(model, mesh["inner"]), lambda rank: (0, 1))
SPREADS = (FSDP, REPLICAS, TWO_WAYS, TENSORS)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.05),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02, weight_decay=0.1, foreach=True),
}


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def effective(model: nn.Module) -> dict[str, Tensor]:
    """What the forward multiplies by, whole, by the names of the dense model."""
    state = {name: whole(value) for name, value in model.state_dict().items()}
    masks = {name.removesuffix("_mask"): value for name, value in state.items() if name.endswith("_mask")}
    found = {name.removesuffix("_orig"): value for name, value in state.items() if not name.endswith("_mask")}
    # the zeros of shards are in the values: nothing is masked here that is not
    plain = {name for name in state if name.endswith("_orig")}
    return {name: value * masks[name] if f"{name}_orig" in plain else value for name, value in found.items()}


def distance(model: nn.Module, other: nn.Module) -> float:
    found, expected = effective(model), effective(other)
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int, clip: float | None = None
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
