"""What two gloo ranks do with sharded models: the recipes of docs/guide/sharded_models.md, and what is refused."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, distributed, nn

import torch_flowprune as fp

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
Y = torch.arange(8) % 4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def mesh() -> object:
    return distributed.device_mesh.init_device_mesh("cpu", (2,))


def sharded(model: nn.Sequential) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh())
    return model


def tensor_parallel(model: nn.Sequential) -> nn.Sequential:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def pruned() -> nn.Sequential:
    model = net()
    fp.global_prune(model, sparsity=0.5)
    return model


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fp.keep_zeros(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def pruned_sharded_trained(rank: int, path: str) -> None:
    """Prune, shard, train: as one process does."""
    model = pruned()
    alone = copy.deepcopy(model)
    sharded(model)
    train(model, X[rank::2], Y[rank::2])
    train(alone, X, Y)
    found = model.state_dict()
    for name, value in alone.state_dict().items():
        assert torch.allclose(whole(found[name]).float(), value.float(), atol=1e-6), name


def saved_and_loaded_by_dcp(rank: int, path: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = sharded(pruned())
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=path)
    other = net()
    fp.global_prune(other, "random", sparsity=0.5, generator=torch.Generator().manual_seed(1))
    sharded(other)
    state = get_model_state_dict(other)
    dcp.load({"model": state}, checkpoint_id=path)
    set_model_state_dict(other, state)
    for name, value in model.state_dict().items():
        assert torch.equal(whole(value), whole(other.state_dict()[name])), name


def the_full_state_goes_on(rank: int, path: str) -> None:
    """A further round and ``remove``, on one rank, off the full state dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(sharded(pruned()), options=options)
    if rank == 0:
        model = net()
        fp.load_state_dict(model, state)
        fp.global_prune(model, sparsity=0.75)
        fp.remove(model)
        assert sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2])) == 72


def tensor_parallel_after_remove(rank: int, path: str) -> None:
    model = fp.remove(pruned())
    expected = model(X)
    assert torch.allclose(tensor_parallel(model)(X), expected, atol=1e-6)


def sharded_then_masked(rank: int, path: str) -> None:
    """Masks that one process chose, put on the shards of all: the steps are those of one process."""
    alone = pruned()
    model = sharded(net())
    fp.apply_masks(model, fp.masks(alone))
    train(model, X[rank::2], Y[rank::2])
    train(alone, X, Y)
    for name, mask in fp.masks(alone).items():
        block = int(name.partition(".")[0])
        assert torch.allclose(whole(model[block].weight), alone[block].weight, atol=1e-6), name
        assert torch.equal(whole(fp.masks(model)[name]), mask)
    fp.remove(model)
    assert list(model.state_dict()) == list(net().state_dict())


SCENARIOS = (
    pruned_sharded_trained,
    saved_and_loaded_by_dcp,
    the_full_state_goes_on,
    tensor_parallel_after_remove,
    sharded_then_masked,
)
