"""What four gloo ranks do with the channels of a sharded model, whose coupling was read before it was sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from shard_choices import check_masks, seeded
from sharded_nets import FSDP, OPTIMIZERS, REPLICAS, TENSORS, TWO_WAYS, X, Y, net, train, whole
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torch_flowprune as fp
from torch_flowprune.inputs import local


class Residual(nn.Module):
    """Channels of several layers that live and die together, norms with statistics, a flattened axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.outer, self.head = nn.Conv2d(10, 6, 3, padding=1), nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner_norm(self.inner(x))))
        return self.head(torch.relu(x).flatten(1))


IMAGES = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (4,))
    for part in (model.stem, model.inner, model.outer):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def coupled(make: Callable[[], nn.Module], example: Tensor) -> fp.Coupling:
    """Of the model without values."""
    with torch.device("meta"):
        return fp.couple(make(), example)


NETS = {
    "net": (net, X, {"net": FSDP.of, "two ways": TWO_WAYS.of, "tensors": TENSORS.of, "replicas": REPLICAS.of}),
    "residual": (residual, IMAGES, {"fully_shard": sharded}),
}
ASKED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("net", "net", {"sparsity": 0.4}),
    ("net", "two ways", {"sparsity": 0.4, "method": "l1", "normalize": None, "scored_by": "group"}),
    ("net", "tensors", {"sparsity": 0.5, "allocation": "layer"}),
    ("net", "replicas", {"sparsity": 0.3, "method": "random", "generator": seeded}),
    ("residual", "fully_shard", {"sparsity": 0.5}),
    ("residual", "fully_shard", {"sparsity": 0.5, "cost": "flops", "method": "random", "generator": seeded}),
    ("residual", "fully_shard", {"amount": 4, "scored_by": "norm", "round_to": 2}),
)


def channels_are_those_of_one_process(rank: int, path: str) -> None:
    check_channels([ASKED[0], ASKED[1], ASKED[5]])


def channels_asked_for_otherwise_are_those_of_one_process(rank: int, path: str) -> None:
    check_channels(ASKED)


def check_channels(asked: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    for kind, way, words in asked:
        make, example, ways = NETS[kind]
        alone, model = make(), ways[way](make())
        own, again = (
            {word: value() if word == "generator" else value for word, value in words.items()} for _ in range(2)
        )
        expected = fp.global_prune(alone, granularity="channel", coupling=fp.couple(make(), example), **own)
        found = fp.global_prune(model, granularity="channel", coupling=coupled(make, example), **again)
        check_masks(model, alone)
        assert found == expected, (kind, way, words, found, expected)


def further_rounds_scores_and_reports_of_channels(rank: int, path: str) -> None:
    alone, model, coupling = residual(), sharded(residual()), coupled(residual, IMAGES)
    words: dict[str, Any] = {"granularity": "channel", "coupling": coupling}
    for one in (alone, model):
        fp.global_prune(one, sparsity=0.25, **words)
    scores, expected = fp.scores(model, **words), fp.scores(alone, **words)
    assert scores == expected
    for one in (alone, model):
        fp.global_prune(one, scores=scores, sparsity=0.5, **words)
    check_masks(model, alone)
    assert fp.report(model, **words) == fp.report(alone, **words)


def channels_by_a_sweep(rank: int, path: str) -> None:
    own, every = (IMAGES[rank::4].double(), Y[rank::4]), (IMAGES.double(), Y)
    alone, model, coupling = residual().double(), sharded(residual().double()), coupled(residual, IMAGES)
    for method in ("taylor", "gradient_norm_preservation"):
        for one, data in ((alone, every), (model, own)):
            fp.global_prune(
                one, method, {"taylor": 0.3}.get(method, 0.5), granularity="channel", coupling=coupling, data=data
            )
        check_masks(model, alone)


def rounds_of_a_pruner_read_the_gradients_of_training(rank: int, path: str) -> None:
    alone, model, coupling = residual(), sharded(residual()), coupled(residual, IMAGES)
    for one, x, y in ((alone, IMAGES, Y), (model, IMAGES[rank::4], Y[rank::4])):
        optimizer = OPTIMIZERS["SGD"](one.parameters())
        pruner = fp.Pruner(one, "loss_preservation", sparsity=0.5, rounds=2, granularity="channel", coupling=coupling)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(one(x), y).backward()
            pruner.track()
            optimizer.step()
            pruner.step()
    check_masks(model, alone)


def a_comparison_of_channels_is_that_of_one_process(rank: int, path: str) -> None:
    own, every = [(IMAGES[rank::4].double(), Y[rank::4])], [(IMAGES.double(), Y)]
    alone, model = residual().double(), sharded(residual().double())
    words: dict[str, Any] = {"granularity": "channel", "coupling": coupled(residual, IMAGES)}
    expected = fp.compare(alone, ["magnitude", "taylor"], 0.5, every, **words)
    found = fp.compare(model, ["magnitude", "taylor"], 0.5, own, **words)
    for one, other in zip(found.outcomes, expected.outcomes, strict=True):
        assert (one.loss, one.predicted, one.emptied) == pytest.approx((other.loss, other.predicted, other.emptied))
    assert found.correlation["taylor"] == pytest.approx(expected.correlation["taylor"])
    assert not fp.masks(model)


def shrunk_on_one_rank_sharded_again_and_saved(rank: int, path: str) -> None:
    """What it computes is what the masked model did; DCP saves it, and loads it into one that was built dense."""
    model, coupling = sharded(residual()), coupled(residual, IMAGES)
    fp.global_prune(model, sparsity=0.5, granularity="channel", coupling=coupling)
    train(model, OPTIMIZERS["SGD"](model.parameters()), IMAGES[rank::4], Y[rank::4], 2)
    with torch.no_grad():
        expected = model(IMAGES)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        dense = fp.load_state_dict(residual(), state)
        fp.save_pruned(fp.shrink(dense, IMAGES), f"{path}.small")
    distributed.barrier()
    small = sharded(fp.load_pruned(residual(), f"{path}.small"))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert torch.allclose(small(IMAGES), expected, atol=1e-5)
    train(small, OPTIMIZERS["SGD"](small.parameters()), IMAGES[rank::4], Y[rank::4], 1)
    dcp.save({"model": get_model_state_dict(small)}, checkpoint_id=path)
    dense = fp.load_pruned(residual(), f"{path}.small")
    found = {"model": dense.state_dict()}
    dcp.load(found, checkpoint_id=path)
    dense.load_state_dict(found["model"])
    for name, value in small.state_dict().items():
        assert torch.equal(whole(value), dense.state_dict()[name]), name


def what_channels_cannot_be_had_is_refused(rank: int, path: str) -> None:
    model, coupling = sharded(residual()), coupled(residual, IMAGES)
    before = {name: local(value).clone() for name, value in model.state_dict().items()}
    words: dict[str, Any] = {"granularity": "channel", "sparsity": 0.5}
    for call, text in (
        (lambda: fp.global_prune(model, example_inputs=IMAGES, **words), r"coupling=fp\.couple\(dense"),
        (
            lambda: fp.global_prune(model, coupling=coupling, uniform=True, example_inputs=IMAGES, **words),
            "uniform=True tries smaller models of the class",
        ),
        (lambda: fp.couple(model, IMAGES), "meta device"),
        (lambda: fp.shrink(model, IMAGES), "full state dict"),
        (lambda: fp.export_ready(model), "torch cannot copy one under fully_shard"),
        (lambda: fp.scores(model, granularity="block"), "granularity='block' on a sharded model needs coupling="),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert all(torch.equal(local(value), before[name]) for name, value in model.state_dict().items())


def budgets_in_other_things_than_units_are_met_alike(rank: int, path: str) -> None:
    """Latency is measured on each rank, and the first one's counts."""
    coupling = coupled(residual, IMAGES)

    def by_sizes(slower: int) -> fp.LatencyTable:
        """A second for each element that is computed."""
        return fp.LatencyTable(timer=lambda runs, _: [slower * sum(x.numel() for x in _tensors(run())) for run in runs])

    for asked in (lambda _: {"flops": 100_000}, lambda _: {"memory": 20_000}, lambda slower: {by_sizes(slower): 3e7}):
        alone, model = residual(), sharded(residual())
        expected = fp.global_prune(alone, granularity="channel", coupling=coupling, at_most=asked(1))
        found = fp.global_prune(model, granularity="channel", coupling=coupling, at_most=asked(1 + rank))
        check_masks(model, alone)
        assert found.spent == expected.spent


def _tensors(made: Any) -> list[Tensor]:
    return [one for one in (made if isinstance(made, (tuple, list)) else [made]) if isinstance(one, Tensor)]


class Deep(nn.Module):
    """Four branches with norms, whose biases make that zeros in front of them are none behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 12), nn.Linear(12, 4)
        self.blocks = nn.ModuleList([self._branch(10 + 2 * i) for i in range(4)])

    @staticmethod
    def _branch(width: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(12), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def deep() -> nn.Module:
    torch.manual_seed(0)
    return Deep().double()


def blocks_are_those_of_one_process(rank: int, path: str) -> None:
    check_blocks(rank, "magnitude", sparsity=0.25)


def blocks_by_a_sweep_are_those_of_one_process(rank: int, path: str) -> None:
    check_blocks(rank, "taylor", at_most={"flops": 18_000})


def check_blocks(rank: int, method: str, **asked: Any) -> None:
    """Also in a second call, in the scores and in the report."""
    mesh, x = init_device_mesh("cpu", (4,)), X.double()
    words: dict[str, Any] = {"granularity": "block", "coupling": coupled(deep, x)}
    alone, model = deep(), deep()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = fp.global_prune(model, method, data=(x[rank::4], Y[rank::4]), **asked, **words)
    expected = fp.global_prune(alone, method, data=(x, Y), **asked, **words)
    assert found.layers == expected.layers
    check_masks(model, alone)
    assert fp.scores(model, **words) == fp.scores(alone, **words)
    for one in (model, alone):
        fp.global_prune(one, sparsity=0.75, **words)
    check_masks(model, alone)
    assert fp.masks(alone)
    assert fp.report(model, **words) == fp.report(alone, **words)


SCENARIOS = (
    blocks_are_those_of_one_process,
    channels_are_those_of_one_process,
    further_rounds_scores_and_reports_of_channels,
    channels_by_a_sweep,
    rounds_of_a_pruner_read_the_gradients_of_training,
    a_comparison_of_channels_is_that_of_one_process,
    shrunk_on_one_rank_sharded_again_and_saved,
    what_channels_cannot_be_had_is_refused,
)
SLOW = (
    blocks_by_a_sweep_are_those_of_one_process,
    channels_asked_for_otherwise_are_those_of_one_process,
    budgets_in_other_things_than_units_are_met_alike,
)
