"""What wanda, synflow, obd and fisher_sample read, of models that gloo ranks hold in parts, against one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_nets import Convolutions, Heads, Language, Recurrent, images, tokens
from sharded_flows import (
    TOKENS,
    build,
    check_equal,
    check_flow,
    check_same_state,
    kept_tokens,
    mesh,
    of_all,
    parallel,
    ranks,
    shard,
    state_of,
    token_loss,
    whole,
)
from torch import Tensor, nn
from torch.nn import functional

import torch_flowprune as fp

MOMENTS = ("x2", "x1", "x0")


def check_kinds(sharded: nn.Module, alone: nn.Module, own: Any, every: Any, *kinds: str, **words: Any) -> None:
    """Without a loss: moments are those of one process, and the model is as it was."""
    before = state_of(sharded)
    found, expected = fp.flow(sharded, own, needs=kinds, **words), fp.flow(alone, every, needs=kinds, **words)
    assert (found.samples, found.counted) == (expected.samples, expected.counted)
    for kind in kinds:
        check_equal(getattr(found, kind), getattr(expected, kind))
    check_same_state(sharded, before)


def check_pruned_alike(sharded: nn.Module, alone: nn.Module, own: Any, every: Any, method: str, **words: Any) -> None:
    fp.global_prune(alone, method, data=every, **words)
    fp.global_prune(sharded, method, data=own, **words)
    masks = fp.masks(sharded)
    for name, mask in fp.masks(alone).items():
        assert torch.equal(whole(masks[name]), mask), (method, name)


def moments_of_inputs(rank: int, path: str) -> None:
    """From forwards alone, and with a sweep; a rank with fewer batches counts none twice."""
    data = lambda rank: tokens(rank, batches=2 + rank)
    sharded, alone = shard(build(Language)), build(Language)
    check_flow(sharded, alone, data(rank), of_all(data), needs=("g", "x2"), **TOKENS)
    check_kinds(sharded, alone, data(rank), of_all(data), *MOMENTS)
    closure = lambda model, batch: token_loss(model(batch[0]), batch[1])
    check_kinds(sharded, alone, data(rank), of_all(data), "x2", closure=closure, reduction=kept_tokens)


def moments_of_all_kinds_of_layers(rank: int, path: str) -> None:
    for kind, data in ((Convolutions, images), (Recurrent, tokens)):
        check_kinds(shard(build(kind)), build(kind), data(rank), of_all(data), *MOMENTS)
    check_kinds(parallel(build(Language, 0.0, Heads), mesh()), build(Language, 0.0, Heads), *[tokens(0)] * 2, *MOMENTS)
    check_pruned_alike(
        shard(build(Convolutions)), build(Convolutions), images(rank), of_all(images), "wanda", sparsity=0.5
    )


def moments_where_activations_are_shards(rank: int, path: str) -> None:
    """A weight that each rank has, and of its inputs a part."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.up.weight, DTensor):
                x = distribute_tensor(x, self.up.weight.device_mesh, [Shard(0)])
            y = self.down(torch.relu(self.up(x)))
            return y.full_tensor() if isinstance(y, DTensor) else y

    sharded, alone = build(Spread), build(Spread)
    for layer in (sharded.up, sharded.down):
        for name, value in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(value.detach(), mesh(), [Replicate()])))
    x = torch.randn(2 * ranks() + 1, 6, generator=torch.Generator().manual_seed(1)).double()
    data = [(x, torch.arange(len(x)) % 3)]
    check_kinds(sharded, alone, data, data, *MOMENTS)


def squares_of_samples(rank: int, path: str) -> None:
    """Ranks with more batches, of more samples, some of which count for nothing."""
    data = lambda rank: tokens(rank, batches=1 + rank)
    sharded, alone = shard(build(Language)), build(Language)
    check_flow(sharded, alone, data(rank), of_all(data), needs=("g", "g2", "g2_sample", "Hg"), **TOKENS)


def squares_of_samples_of_other_models(rank: int, path: str) -> None:
    sharded, alone = shard(build(Convolutions)), build(Convolutions)
    check_flow(sharded, alone, images(rank), of_all(images), needs=("g2_sample",))
    sharded, alone = parallel(build(Language, 0.0, Heads), mesh()), build(Language, 0.0, Heads)
    check_flow(sharded, alone, tokens(0), tokens(0), needs=("g2_sample",), **TOKENS)
    check_pruned_alike(
        shard(build(Convolutions)), build(Convolutions), images(rank), of_all(images), "fisher_sample", sparsity=0.5
    )


def joined(data: Callable[[int], Any], count: int = 0) -> list[Any]:
    """What all ranks read at once is a batch."""
    steps = zip(*(data(rank) for rank in range(count or ranks())), strict=True)
    return [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in steps]


def check_diagonal(sharded: nn.Module, alone: nn.Module, own: Any, every: Any, **words: Any) -> None:
    """Of the signs that one process draws, by the seed of the first rank."""
    before = state_of(sharded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is noisy
        torch.manual_seed(3 + torch.distributed.get_rank())
        found = fp.flow(sharded, own, needs=("g", "diagH"), probes=3, **words)
        torch.manual_seed(3)
        expected = fp.flow(alone, every, needs=("g", "diagH"), probes=3, **words)
    for kind in ("g", "diagH", "diagH_error"):
        check_equal(getattr(found, kind), getattr(expected, kind))
    check_same_state(sharded, [*before[:3], torch.get_rng_state()])


def a_diagonal(rank: int, path: str) -> None:
    check_diagonal(shard(build(Convolutions)), build(Convolutions), images(rank), joined(images))


def a_diagonal_of_tensor_parallelism(rank: int, path: str) -> None:
    sharded, alone = parallel(build(Language, 0.0, Heads), mesh()), build(Language, 0.0, Heads)
    check_diagonal(sharded, alone, tokens(0), tokens(0), **TOKENS)


def synaptic_flow(rank: int, path: str) -> None:
    """On the first rank's example, which is the longer one."""
    cut = lambda rank: [(ids[:, : 5 - rank], target) for ids, target in tokens(rank)]
    check_kinds(shard(build(Recurrent)), build(Recurrent), cut(rank), cut(0), "gR")


def rounds_of_synaptic_flow(rank: int, path: str) -> None:
    """A model of convolutions in float32 computes these in float32."""
    for dtype in (torch.float64, torch.float32):
        sharded, alone = shard(build(Convolutions).to(dtype)), build(Convolutions).to(dtype)
        x = images(0)[0][0].to(dtype)
        check_kinds(sharded, alone, None, None, "gR", example_inputs=x)
        for model in (sharded, alone):
            fp.global_prune(model, "synflow", 0.8, rounds=3, example_inputs=x)
        masks = fp.masks(sharded)
        assert all(torch.equal(whole(masks[name]), mask) for name, mask in fp.masks(alone).items())


def synaptic_flow_of_other_models(rank: int, path: str) -> None:
    check_kinds(shard(build(Language)), build(Language), tokens(rank), tokens(0), "gR")
    check_kinds(parallel(build(Language, 0.0, Heads), mesh()), build(Language, 0.0, Heads), *[tokens(0)] * 2, "gR")


# -- under masks, and on four ranks ------------------------------------------


def under_masks(rank: int, path: str) -> None:
    """Beside the shards, and put on before sharding."""
    chosen = build(Convolutions)
    fp.global_prune(chosen, sparsity=0.5)
    for before_sharding in (False, True):
        model, alone = build(Convolutions), build(Convolutions)
        fp.apply_masks(alone, fp.masks(chosen))
        if before_sharding:
            fp.apply_masks(model, fp.masks(chosen))
        sharded = shard(model)
        if not before_sharding:
            fp.apply_masks(sharded, fp.masks(chosen))
        check_kinds(sharded, alone, images(rank), of_all(images), *MOMENTS, "g2_sample")
        check_kinds(sharded, alone, images(rank), images(0), "gR")
        check_diagonal(sharded, alone, images(rank), joined(images))


def on_replicas_and_both_ways(rank: int, path: str) -> None:
    replicas = mesh(2, ranks() // 2, names=("replica", "shard"))
    sharded, alone = shard(build(Convolutions), replicas), build(Convolutions)
    check_kinds(sharded, alone, images(rank), of_all(images), *MOMENTS, "g2_sample")
    check_kinds(sharded, alone, images(rank), images(0), "gR")
    check_diagonal(sharded, alone, images(rank), joined(images))
    over, reader = mesh(2, ranks() // 2, names=("data", "tensor")), rank // (ranks() // 2)
    sharded = shard(parallel(build(Language, 0.0, Heads), over["tensor"]), over["data"])
    alone = build(Language, 0.0, Heads)
    check_kinds(sharded, alone, tokens(reader), of_all(tokens, 2), *MOMENTS)
    check_flow(sharded, alone, tokens(reader), of_all(tokens, 2), needs=("g2_sample",), **TOKENS)
    check_kinds(sharded, alone, tokens(reader), tokens(0), "gR")


def sweeps_of_losses_of_which_nothing_is_told(rank: int, path: str) -> None:
    """One rank has more batches: what a loss is a mean over is not tried on a model that all of them run."""
    data = lambda rank: images(rank)[: 1 + rank]
    loss = lambda output, target: functional.cross_entropy(output, target)
    check_flow(shard(build(Convolutions)), build(Convolutions), data(rank), of_all(data), loss=loss)


def statistics_of_all_ranks(rank: int, path: str) -> None:
    """Batch norms' are the weighted means over the batches of all ranks, under data parallelism as well."""
    data = lambda rank: images(rank)[: 1 + rank]
    alone = fp.recalibrate(build(Convolutions), of_all(data))
    both = shard(build(Convolutions)), nn.parallel.DistributedDataParallel(build(Convolutions))
    for model in both:
        fp.recalibrate(model, data(rank))
        found = dict(getattr(model, "module", model).named_buffers())
        for name, value in alone.named_buffers():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-15)


def what_takes_whole_layers_is_refused(rank: int, path: str) -> None:
    for model in (shard(build(Convolutions)), parallel(build(Language, 0.0, Heads), mesh())):
        fp.global_prune(model, sparsity=0.5)
        with pytest.raises(ValueError, match="reconstruct solves for the weights of whole layers"):
            fp.reconstruct(model, images(rank))
        with pytest.raises(ValueError, match="save_pruned writes whole tensors to one file"):
            fp.save_pruned(model, path)


ON_TWO = [
    moments_of_inputs,
    statistics_of_all_ranks,
    sweeps_of_losses_of_which_nothing_is_told,
    synaptic_flow,
    what_takes_whole_layers_is_refused,
]
MORE_ON_TWO = [
    a_diagonal,
    a_diagonal_of_tensor_parallelism,
    moments_of_all_kinds_of_layers,
    moments_where_activations_are_shards,
    rounds_of_synaptic_flow,
    squares_of_samples,
    squares_of_samples_of_other_models,
    synaptic_flow_of_other_models,
    under_masks,
]
ON_FOUR = [moments_of_all_kinds_of_layers, synaptic_flow, on_replicas_and_both_ways]
