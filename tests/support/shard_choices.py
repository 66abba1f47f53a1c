"""What four gloo ranks choose on a sharded model, against one process that has all of it: the same, bit for bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from sharded_nets import FSDP, REPLICAS, SPREADS, TENSORS, TWO_WAYS, Spread, X, Y, net, whole
from torch import Tensor, distributed, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import torch_flowprune as fp
from torch_flowprune.inputs import Ranks, Target, local
from torch_flowprune.masking import apply
from torch_flowprune.scoring.candidates import ShardUnits
from torch_flowprune.scoring.granularity import Blocks, GroupedOutputs, Slices, Weights


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(mask) for name, mask in fp.masks(model).items()}


def same(spread: Spread, make: Callable[[], nn.Module] = net, **words: Any) -> None:
    """Masks and report are those of one process."""
    alone, model = make(), spread.of(make())
    expected = fp.global_prune(alone, **again(words))
    found = fp.global_prune(model, **again(words))
    masks = masks_of(model)
    assert masks.keys() == fp.masks(alone).keys(), (spread.name, words)
    for name, mask in fp.masks(alone).items():
        assert torch.equal(masks[name], mask), (spread.name, words, name)
    assert found == expected, (spread.name, words, found, expected)


def again(words: dict[str, Any]) -> dict[str, Any]:
    """Generators anew, as a call moves them on."""
    return {word: value() if word == "generator" else value for word, value in words.items()}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def tied() -> nn.Module:
    """Weights of few values, so that the order of the model decides."""
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 4).round() / 4)
    return model


def transposed() -> nn.Module:
    """Filters lie along the second axis, which ``fully_shard`` does not cut; in groups they lie along both."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.ConvTranspose1d(6, 5, 2),
        nn.ReLU(),
        nn.ConvTranspose1d(5, 4, 2),
        nn.ReLU(),
        nn.ConvTranspose1d(4, 6, 2, groups=2),
    )


def half() -> nn.Module:
    return net().bfloat16()


def of_user(theta: Tensor) -> Tensor:
    """Looks at a whole layer."""
    return (theta - theta.mean()).abs().sum(-1) / theta.std()


WEIGHTS = (
    {"method": "magnitude", "sparsity": 0.5},
    {"method": "magnitude", "sparsity": 0.9, "min_keep": 3},
    {"method": "random", "sparsity": 0.5, "generator": seeded},
    {"method": of_user, "sparsity": 0.5},
    {"sparsity": 0.5, "scope": "layer"},
    {"sparsity": 0.7, "allocation": "erk"},
    {"sparsity": 0.7, "allocation": "lamp"},
    {"sparsity": 0.5, "normalize": "mean"},
    {"sparsity": 0.8, "max_sparsity": {"4": 0.3}},
    {"allocation": {"0": 0.25, "2": 0.75}},
    {"amount": 17, "rounds": 2},
)
FILTERS = (
    {"granularity": "filter", "sparsity": 0.5},
    {"granularity": "filter", "method": "l1", "sparsity": 0.3, "normalize": None},
    {"granularity": "filter", "sparsity": 0.4, "allocation": "layer"},
)
BLOCKS = ({"granularity": "1:2"}, {"granularity": "2:4"}, {"granularity": "2:5"})


def weights_are_chosen_as_one_process_does(rank: int, path: str) -> None:
    for words in WEIGHTS:
        same(FSDP, **words)
    for spread, some in ((REPLICAS, (0, 2)), (TWO_WAYS, (0, 3)), (TENSORS, (1, 2))):
        for i in some:
            same(spread, **WEIGHTS[i])


def filters_are_those_of_one_process_also_where_a_cut_goes_through(rank: int, path: str) -> None:
    for words in FILTERS:
        same(FSDP, **words)
    for spread in (TWO_WAYS, TENSORS):
        same(spread, **FILTERS[0])
    same(FSDP, transposed, **FILTERS[0])


def blocks_are_those_of_one_process_also_where_a_cut_goes_through(rank: int, path: str) -> None:
    for spread in (FSDP, TENSORS):
        for words in BLOCKS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                same(spread, **words)


def ties_and_half_precision(rank: int, path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp.TiedScoresWarning)
        for make in (tied, half):
            for spread in (FSDP, TWO_WAYS):
                same(spread, make, sparsity=0.5)
            same(FSDP, make, sparsity=0.5, scope="layer")


def scores_at_hand_may_be_whole_or_shards(rank: int, path: str) -> None:
    alone = net()
    scores = fp.scores(alone, "magnitude")
    for spread in (FSDP, TWO_WAYS):
        same(spread, scores=scores, sparsity=0.4)
    model = FSDP.of(net())
    shards = {f"{block}.weight": model[block].weight.detach().abs() for block in (0, 2, 4)}
    fp.global_prune(model, scores=shards, sparsity=0.4)
    fp.global_prune(alone, scores=scores, sparsity=0.4)
    check_masks(model, alone)


def random_goes_by_the_first_ranks_generator(rank: int, path: str) -> None:
    alone, model = net(), FSDP.of(net())
    fp.global_prune(alone, "random", sparsity=0.5, generator=torch.Generator().manual_seed(0))
    own = torch.Generator().manual_seed(rank)
    fp.global_prune(model, "random", sparsity=0.5, generator=own)
    check_masks(model, alone)
    torch.manual_seed(rank)  # the global one, too
    fp.global_prune(model, "random", sparsity=0.75)
    torch.manual_seed(0)
    fp.global_prune(alone, "random", sparsity=0.75)
    check_masks(model, alone)


def rounds_nest_and_reports_are_of_all(rank: int, path: str) -> None:
    alone, model = net(), TWO_WAYS.of(net())
    for sparsity in (0.3, 0.6):
        assert fp.global_prune(model, sparsity=sparsity) == fp.global_prune(alone, sparsity=sparsity)
        check_masks(model, alone)
    assert fp.report(model) == fp.report(alone)
    assert fp.report(model, granularity="filter") == fp.report(alone, granularity="filter")
    with pytest.raises(ValueError, match="already at sparsity 0.6"):
        fp.global_prune(model, sparsity=0.5)


def check_masks(model: nn.Module, alone: nn.Module) -> None:
    masks = masks_of(model)
    assert masks.keys() == fp.masks(alone).keys()
    assert all(torch.equal(masks[name], mask) for name, mask in fp.masks(alone).items())


def an_error_on_one_rank_leaves_all_as_they_were(rank: int, path: str) -> None:
    """In the measure, in scores at hand, in the masks; and a weight that is not finite on one of them."""
    model = FSDP.of(net())
    before = {name: local(value).clone() for name, value in model.state_dict().items()}

    def fails_on_one(theta: Tensor) -> Tensor:
        if rank == 2:
            raise MemoryError
        return theta.abs().sum(-1)

    scores = dict(fp.scores(net(), "magnitude"))
    scores["2.weight"] = scores["2.weight"] * (torch.nan if rank == 1 else 1)
    calls: list[Callable[[], object]] = [
        lambda: fp.global_prune(model, fails_on_one, sparsity=0.5),
        lambda: fp.global_prune(model, scores=scores, sparsity=0.5),
        lambda: broken_on_one(rank, model),
    ]
    for call, (own, error) in zip(calls, [(2, MemoryError), (1, ValueError), (3, MemoryError)], strict=True):
        with pytest.raises(error if rank == own else RuntimeError, match=None if rank == own else "1 of the ranks"):
            call()
        now = {name: local(value) for name, value in model.state_dict().items()}
        assert list(now) == list(before)
        assert all(torch.equal(now[name], value) for name, value in before.items())
    with torch.no_grad():
        if rank == 3:
            local(model[0].weight)[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"the magnitude scores of 0\.weight are not all finite"):
        fp.global_prune(model, sparsity=0.5)
    assert not fp.masks(model)


def broken_on_one(rank: int, model: nn.Module) -> None:
    hold = apply.hold_in_shard

    def breaks(module: nn.Module, name: str, mask: Tensor) -> None:
        if rank == 3 and module is model[2]:
            raise MemoryError
        hold(module, name, mask)

    apply.hold_in_shard = breaks
    try:
        fp.global_prune(model, sparsity=0.5)
    finally:
        apply.hold_in_shard = hold


def what_cannot_be_had_is_refused_before_anything_is_touched(rank: int, path: str) -> None:
    data = [(X, Y)]
    refused: list[tuple[Callable[[nn.Module], object], str]] = [
        (lambda model: fp.global_prune(model, granularity="channel", sparsity=0.5, example_inputs=X), "sharded model"),
        (lambda model: fp.importance_scores(model), "fp.scores and fp.global_prune"),
        (lambda model: fp.scores(model, "fisher_sample", data, max_memory="1GB"), "max_memory= is for models"),
        (lambda model: fp.global_prune(model, sparsity=0.5, allocation="row"), "allocation='row'"),
        (lambda model: fp.regrow(model, 0.5, data=data), "no masks"),
    ]
    for spread in (FSDP, TENSORS):
        model = spread.of(net())
        before = {name: local(value).clone() for name, value in model.state_dict().items()}
        for call, text in refused:
            if "row" in text and spread is FSDP:
                continue
            with pytest.raises(ValueError, match=text):
                call(model)
        assert all(torch.equal(local(value), before[name]) for name, value in model.state_dict().items())
    same(FSDP, sparsity=0.5, allocation="row")


def units_of_random_shapes_are_where_the_whole_has_them(rank: int, path: str) -> None:
    """Rows out, flags back, and one value a unit put together, under any placements."""
    draw = random.Random(0)
    flat = distributed.device_mesh.init_device_mesh("cpu", (4,))
    grid = distributed.device_mesh.init_device_mesh("cpu", (2, 2))
    for _ in range(24):
        shape = [draw.choice([2, 4, 6, 10]), draw.choice([2, 4, 8, 12]), *draw.choice([[], [3]])]
        mesh = draw.choice([flat, grid])
        kinds = [Shard(axis) for axis in range(len(shape))] + [Replicate()]
        full = torch.arange(float(torch.Size(shape).numel())).view(shape)
        value = distribute_tensor(full, mesh, [draw.choice(kinds) for _ in range(mesh.ndim)])
        units = draw.choice(
            [Weights(), Slices(0), Slices(1), Slices(-1), Blocks(1, 2), Blocks(2, 4, 0), GroupedOutputs(2)]
        )
        check_units(value, full, units)


def check_units(value: Tensor, full: Tensor, units: Any) -> None:
    target = Target("w", ((nn.Linear(1, 1), "weight"),), nn.Parameter(value), None)
    one, expected, case = (
        ShardUnits(target, units, Ranks.holding([value])),
        units.rows(full),
        (full.shape, value, units),
    )
    assert len(one) == len(expected), case
    assert torch.equal(one.rows({"w": value}), expected[one.shard.numbers(torch.arange(len(one.shard)))]), case
    flags, masks = expected[:, 0] % 3 > 0, dict[str, Tensor]()
    one.clear_removed(masks, one.shard.part(flags))
    assert torch.equal(whole(masks["w"]), units.mask(flags, full.shape)), case
    assert torch.equal(one.shard.gathered(one.shard.part(flags)), flags), case


WEIGHTS_BY_A_SWEEP, PRODUCTS, FILTERS_BY_A_SWEEP = (
    {"method": "loss_preservation", "sparsity": 0.5},
    {"method": "gradient_norm_increase", "sparsity": 0.5},
    {"method": "gradient_norm_preservation", "sparsity": 0.5, "granularity": "filter"},
)
BY_A_SWEEP = (WEIGHTS_BY_A_SWEEP, PRODUCTS, FILTERS_BY_A_SWEEP)


def measures_of_gradients_by_a_sweep_choose_as_one_process_does(rank: int, path: str) -> None:
    """Each way to lay a model once, by what is summed over its ranks."""
    check_sweeps({FSDP: BY_A_SWEEP, REPLICAS: [PRODUCTS], TWO_WAYS: [FILTERS_BY_A_SWEEP], TENSORS: [PRODUCTS]}, rank)


def each_of_them_however_a_model_is_laid(rank: int, path: str) -> None:
    check_sweeps(dict.fromkeys(SPREADS, BY_A_SWEEP), rank)


def check_sweeps(asked: Mapping[Spread, Sequence[dict[str, Any]]], rank: int) -> None:
    """Each rank reads its own part of the data. Sums in another order round otherwise, and no choice turns on it."""
    for spread, words in [(spread, words) for spread, several in asked.items() for words in several]:
        share = spread.share(rank)
        alone, model = net().double(), spread.of(net().double())
        fp.global_prune(alone, data=(X.double(), Y), **words)
        fp.global_prune(model, data=(X[share].double(), Y[share]), **words)
        masks = masks_of(model)
        assert masks.keys() == fp.masks(alone).keys(), (spread.name, words)
        for name, mask in fp.masks(alone).items():
            assert torch.equal(masks[name], mask), (spread.name, words, name)


SCENARIOS = (
    measures_of_gradients_by_a_sweep_choose_as_one_process_does,
    units_of_random_shapes_are_where_the_whole_has_them,
    weights_are_chosen_as_one_process_does,
    filters_are_those_of_one_process_also_where_a_cut_goes_through,
    blocks_are_those_of_one_process_also_where_a_cut_goes_through,
    ties_and_half_precision,
    scores_at_hand_may_be_whole_or_shards,
    random_goes_by_the_first_ranks_generator,
    rounds_nest_and_reports_are_of_all,
    an_error_on_one_rank_leaves_all_as_they_were,
    what_cannot_be_had_is_refused_before_anything_is_touched,
)
SLOW = (each_of_them_however_a_model_is_laid,)
