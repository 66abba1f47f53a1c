"""What two gloo ranks do in the tests of rows 7.1 to 7.3: run in processes of their own."""

from __future__ import annotations

import torch
from hosts import mlp, pruned, train
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import torch_flowprune as fp


def attention() -> nn.Module:
    """The encoder layer whose ``out_proj`` torch's pruning cannot train under data parallelism."""
    return nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)


def inputs(rank: int) -> torch.Tensor:
    """Other data on each rank."""
    return torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(rank))


def agree(model: nn.Module) -> None:
    """Every parameter and mask is the same on both ranks."""
    for name, value in model.state_dict().items():
        there = [torch.empty_like(value, dtype=torch.float32) for _ in range(2)]
        distributed.all_gather(there, value.float())
        assert torch.equal(*there), name


def prune_then_wrap(rank: int, path: str) -> None:
    """Row 7.1; and the masks on the wire are bytes (7.3)."""
    model = pruned()
    wrapped = DistributedDataParallel(model)
    train(wrapped, inputs(rank))
    agree(model)
    assert sum(buffer.nbytes for buffer in model.buffers()) == 64 + 32


def wrap_then_prune(rank: int, path: str) -> None:
    """Row 7.1."""
    model = mlp()
    wrapped = DistributedDataParallel(model)
    train(wrapped, inputs(rank))
    pruned(wrapped)
    train(wrapped, inputs(rank))
    agree(model)
    assert not model[0].weight[~model[0].weight_mask].any()


def random_with_a_seed_a_rank(rank: int, path: str) -> None:
    """Row 7.2: given the wrapper, all ranks take the first one's masks."""
    model = mlp()
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(rank)
    fp.global_prune(wrapped, "random", sparsity=0.5)
    agree(model)
    train(wrapped, inputs(rank))
    agree(model)


def scores_over_all_data(rank: int, path: str) -> None:
    """The gradient is over the data of both ranks."""
    model = mlp()
    wrapped = DistributedDataParallel(model)
    data = (inputs(rank)[:, 0], torch.tensor([0, 1, 2, 3]))
    fp.global_prune(wrapped, "loss_preservation", sparsity=0.5, data=[data])
    agree(model)


def a_comparison_over_all_data(rank: int, path: str) -> None:
    """Loss and outcomes are those of one process with the data of both; random scores are the first rank's."""
    wrapped, labels = DistributedDataParallel(mlp()), torch.tensor([0, 1, 2, 3])
    batch = (inputs(rank)[:, 0], labels)
    found = fp.compare(wrapped, ["taylor", "random"], 0.5, [batch], generator=torch.Generator().manual_seed(rank))
    both = [(inputs(one)[:, 0], labels) for one in range(2)]
    alone = fp.compare(wrapped.module, ["taylor"], 0.5, both)
    assert found.samples == alone.samples == 8
    assert abs(found.loss - alone.loss) < 1e-6
    assert abs(found.outcomes[0].loss - alone.outcomes[0].loss) < 1e-6
    there = [None, None]
    distributed.all_gather_object(there, [outcome.loss for outcome in found.outcomes])
    assert there[0] == there[1]


def attention_trains(rank: int, path: str) -> None:
    """Row 2.1 under data parallelism."""
    model = pruned(attention(), include="*weight")
    wrapped = DistributedDataParallel(model)
    train(wrapped, inputs(rank), steps=3)
    agree(model)


SCENARIOS = (
    prune_then_wrap,
    wrap_then_prune,
    random_with_a_seed_a_rank,
    scores_over_all_data,
    a_comparison_over_all_data,
    attention_trains,
)
