"""What four gloo ranks do with masks on shards, against one process that has the whole model."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharded_nets import (
    BLOCKS,
    FSDP,
    OPTIMIZERS,
    REPLICAS,
    SPREADS,
    TENSORS,
    TWO_WAYS,
    Spread,
    X,
    Y,
    distance,
    in_blocks,
    net,
    train,
    whole,
)
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.inputs import box_of, local
from torch_flowprune.masking import apply


def pruned(sparsity: float = 0.5, seed: int | None = None) -> nn.Sequential:
    model = net()
    if seed is None:
        fp.global_prune(model, sparsity=sparsity)
    else:
        fp.global_prune(model, "random", sparsity=sparsity, generator=torch.Generator().manual_seed(seed))
    return model


def zeros(model: nn.Module) -> list[int]:
    return [int((whole(model[block].weight) == 0).sum()) for block in BLOCKS]


def removed(model: nn.Module) -> list[int]:
    return [int((~mask).sum()) for mask in fp.masks(model).values()]


def check_training(spread: Spread, optimizer: str, rank: int, clip: float | None = None) -> None:
    """Steps before the masks, under them, under more of them, and what is left when they are made permanent."""
    model, alone = spread.of(net()), net()
    make, share = OPTIMIZERS[optimizer], spread.share(rank)
    steps, steps_alone = make(model.parameters()), make(alone.parameters())
    train(model, steps, X[share], Y[share], 1, clip)
    train(alone, steps_alone, X, Y, 1, clip)
    for sparsity in (0.5, 0.8):
        fp.global_prune(alone, sparsity=sparsity)
        fp.apply_masks(model, fp.masks(alone))
        assert zeros(model) == removed(alone)
        train(model, steps, X[share], Y[share], 2, clip)
        train(alone, steps_alone, X, Y, 2, clip)
        assert distance(model, alone) < 1e-6, (spread.name, optimizer, sparsity)
        assert zeros(model) == removed(alone)
    fp.remove(alone)
    fp.remove(model)
    assert distance(model, alone) < 1e-6
    assert list(model.state_dict()) == list(net().state_dict())
    train(model, steps, X[share], Y[share], 1, clip)  # and no longer are the zeros held
    assert zeros(model) < removed(pruned(0.8))


def training_is_that_of_one_process(rank: int, path: str) -> None:
    check_training(FSDP, "SGD", rank)
    check_training(FSDP, "Adam", rank, clip=0.1)
    check_training(REPLICAS, "AdamW", rank)
    check_training(TWO_WAYS, "SGD", rank)


def in_half_precision_zeros_stay_and_the_rest_moves_as_without_masks_on_them(rank: int, path: str) -> None:
    """The oracle clears gradients and values by hand."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (4,))
    masks = fp.masks(pruned())
    model, by_hand = (in_blocks(net(), mesh, mp_policy=policy) for _ in range(2))
    fp.apply_masks(model, masks)
    parts = {name: local(mask) for name, mask in fp.masks(model).items()}
    one, other = (OPTIMIZERS["SGD"](each.parameters()) for each in (model, by_hand))
    train(model, one, X[rank::4], Y[rank::4], 3)

    def clear(what: str) -> None:
        for name, parameter in by_hand.named_parameters():
            if name in parts:
                value = parameter if what == "values" else parameter.grad
                local(value)[~parts[name]] = 0

    clear("values")
    for _ in range(3):
        other.zero_grad()
        nn.functional.cross_entropy(by_hand(X[rank::4]), Y[rank::4]).backward()
        clear("gradients")
        other.step()
        clear("values")
    for (name, own), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(local(own), local(expected)), name


def torchs_own_functions_see_the_masks(rank: int, path: str) -> None:
    model = FSDP.of(net())
    order = [name for name, _ in model.named_parameters()]
    fp.apply_masks(model, fp.masks(pruned()))
    assert prune.is_pruned(model)
    assert [name for name, _ in model.named_parameters()] == order
    mask = model.state_dict()["0.weight_mask"]
    assert isinstance(mask, DTensor)
    assert (mask.dtype, mask.placements) == (torch.bool, model[0].weight.placements)
    with pytest.raises(ValueError, match=r"'weight' is a shard.*fp\.global_prune or fp\.apply_masks"):
        prune.l1_unstructured(model[0], "weight", 0.5)
    assert zeros(model) == removed(pruned())
    for block in BLOCKS:
        prune.remove(model[block], "weight")
    assert not prune.is_pruned(model)
    assert not fp.masks(model)
    assert zeros(model) == removed(pruned())


def masks_go_out_and_in(rank: int, path: str) -> None:
    """As shards, put together and packed, or whole; of two, what both keep."""
    expected, other = fp.masks(pruned()), fp.masks(pruned(seed=1))
    for spread in SPREADS:
        model, second = spread.of(net()), spread.of(net())
        fp.apply_masks(model, expected)
        fp.apply_masks(second, fp.masks(model))
        third = spread.of(net())
        fp.apply_masks(third, fp.masks(model, packed=True))
        for each in (model, second, third):
            found = {name: whole(mask) for name, mask in fp.masks(each).items()}
            assert all(torch.equal(found[name], mask) for name, mask in expected.items()), spread.name
        fp.apply_masks(model, other)
        found = {name: whole(mask) for name, mask in fp.masks(model).items()}
        assert all(torch.equal(mask, expected[name] & other[name]) for name, mask in found.items())
        fp.apply_masks(model, other, replace=True)  # what comes back are zeros
        assert torch.equal(whole(fp.masks(model)["0.weight"]), other["0.weight"])
        assert int((whole(model[0].weight) == 0).sum()) == int((~(expected["0.weight"] & other["0.weight"])).sum())


def an_error_brings_the_values_back(rank: int, path: str) -> None:
    model = FSDP.of(net())
    fp.apply_masks(model, {"0.weight": fp.masks(pruned(0.25))["0.weight"]})
    before = {name: local(value).clone() for name, value in model.state_dict().items()}
    calls = []

    def breaks(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        hold(*arguments)

    hold, apply.hold_in_shard = apply.hold_in_shard, breaks
    try:
        with pytest.raises(MemoryError):
            fp.apply_masks(model, fp.masks(pruned(0.8)))
    finally:
        apply.hold_in_shard = hold
    now = {name: local(value) for name, value in model.state_dict().items()}
    assert list(now) == list(before)
    assert all(torch.equal(now[name], value) for name, value in before.items())


def saved_by_four_loaded_by_four_in_another_way_and_by_two(rank: int, path: str) -> None:
    model = FSDP.of(net())
    fp.apply_masks(model, fp.masks(pruned()))
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    train(model, optimizer, X[rank::4], Y[rank::4], 2)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=path)
    for spread in (REPLICAS, TWO_WAYS):
        other = spread.of(net())
        fp.apply_masks(other, fp.masks(pruned(seed=3)))
        steps = OPTIMIZERS["AdamW"](other.parameters())
        train(other, steps, X[spread.share(rank)], Y[spread.share(rank)], 1)
        found = dict(zip(("model", "optimizer"), get_state_dict(other, steps), strict=True))
        dcp.load(found, checkpoint_id=path)
        set_state_dict(other, steps, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
        assert distance(other, model) == 0
        train(other, steps, X[spread.share(rank)], Y[spread.share(rank)], 2)
        assert zeros(other) == removed(pruned())  # the hooks hold the masks that were loaded
    load_on_two(rank, path, model)


def load_on_two(rank: int, path: str, saved: nn.Module) -> None:
    """A mesh of the first two ranks; the others wait."""
    expected = {name: whole(value) for name, value in saved.state_dict().items()}
    two = distributed.new_group([0, 1])
    if rank < 2:
        model = in_blocks(net(), DeviceMesh.from_group(two, "cpu"))
        wearing = [
            key.removeprefix("model.").removesuffix("_mask")
            for key in dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            if key.startswith("model.") and key.endswith("_mask")
        ]
        parameters = dict(model.named_parameters())
        fp.apply_masks(model, {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in wearing})
        state = get_model_state_dict(model)
        dcp.load({"model": state}, checkpoint_id=path, process_group=two)
        set_model_state_dict(model, state)
        now = {name: whole(value) for name, value in model.state_dict().items()}
        assert now.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in now.items())


def states_are_loaded_whole_or_in_parts(rank: int, path: str) -> None:
    """A dense state leaves the masks, and its values under them are zeros; a pruned one brings its own."""
    dense, alone = net(), pruned()
    for spread in (FSDP, TWO_WAYS):
        model = spread.of(net())
        fp.apply_masks(model, fp.masks(alone))
        fp.load_state_dict(model, dense.state_dict())
        assert distance(model, alone) == 0
        fp.load_state_dict(model, fp.state_dict(pruned(seed=1)))
        assert distance(model, pruned(seed=1)) == 0
        fp.load_state_dict(model, dense.state_dict(), lift_masks=True)
        assert distance(model, dense) == 0
        assert not fp.masks(model)


def a_state_put_together_makes_one_process_pruned(rank: int, path: str) -> None:
    model = FSDP.of(net())
    fp.apply_masks(model, fp.masks(pruned()))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        alone = fp.load_state_dict(net(), state)
        assert distance(alone, pruned()) == 0
        assert removed(alone) == removed(pruned())
    again = FSDP.of(net())
    fp.load_state_dict(again, fp.state_dict(model))
    assert distance(again, model) == 0
    assert removed_whole(again) == removed(pruned())
    assert list(fp.state_dict(model, dense=True)) == list(net().state_dict())


def removed_whole(model: nn.Module) -> list[int]:
    return [int((~whole(mask)).sum()) for mask in fp.masks(model).values()]


def keep_zeros_clears_momentum_and_holds_what_was_removed(rank: int, path: str) -> None:
    model = FSDP.of(net())
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    train(model, optimizer, X[rank::4], Y[rank::4], 2)
    fp.keep_zeros(model, optimizer)
    fp.apply_masks(model, fp.masks(pruned()))
    train(model, optimizer, X[rank::4], Y[rank::4], 1)
    momentum = whole(optimizer.state[model[0].weight]["momentum_buffer"])
    assert not momentum[~fp.masks(pruned())["0.weight"]].any()
    fp.remove(model)
    train(model, optimizer, X[rank::4], Y[rank::4], 2)
    assert zeros(model) == removed(pruned())


def a_forward_that_leaves_the_root_whole_is_no_matter(rank: int, path: str) -> None:
    """The last call was an evaluation: what the modules hold then are no shards."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (4,))
    model = fully_shard(net(), mesh=mesh, reshard_after_forward=False)
    with torch.no_grad():
        model(X)
    fp.apply_masks(model, fp.masks(pruned()))
    with torch.no_grad():
        assert torch.allclose(model(X), pruned()(X), atol=1e-6)
    assert removed_whole(model) == removed(pruned())


def copies_and_casts_keep_their_zeros(rank: int, path: str) -> None:
    """Of a tensor-parallel model, which can be copied, and has parameters that are whole beside shards."""
    model = TENSORS.of(net())
    fp.apply_masks(model, fp.masks(pruned()))
    other = copy.deepcopy(model).double()
    optimizer = OPTIMIZERS["SGD"](other.parameters())
    train(other, optimizer, X.double(), Y, 2)
    assert removed_whole(other) == removed(pruned())
    for name, mask in fp.masks(pruned()).items():
        value = whole(other.get_submodule(name.removesuffix(".weight")).weight)
        assert not value[~mask].any(), name


def what_was_frozen_keeps_its_zeros_once_it_is_not(rank: int, path: str) -> None:
    model = FSDP.of(net())
    model[0].weight.requires_grad_(False)
    fp.apply_masks(model, fp.masks(pruned()))
    model[0].weight.requires_grad_(True)
    train(model, OPTIMIZERS["SGD"](model.parameters()), X[rank::4], Y[rank::4], 2)
    assert zeros(model) == removed(pruned())
    gone = ~local(fp.masks(model)["0.weight"])
    assert not local(model[0].weight.grad)[gone].any()


def boxes_tile_the_whole(rank: int, path: str) -> None:
    """Random shapes and placements: the box of the part is where its values stand in the whole."""
    draw = random.Random(0)
    flat = distributed.device_mesh.init_device_mesh("cpu", (4,))
    grid = distributed.device_mesh.init_device_mesh("cpu", (2, 2))
    for _ in range(60):
        shape = [draw.choice([1, 2, 3, 5, 8, 13]) for _ in range(draw.choice([1, 2, 3]))]
        mesh = draw.choice([flat, grid])
        kinds = [Shard(axis) for axis in range(len(shape))] + [Replicate()]
        full = torch.arange(float(torch.Size(shape).numel())).view(shape)
        value = distribute_tensor(full, mesh, [draw.choice(kinds) for _ in range(mesh.ndim)])
        assert torch.equal(box_of(value).of(full), local(value)), (shape, value.placements)


SCENARIOS = (
    training_is_that_of_one_process,
    in_half_precision_zeros_stay_and_the_rest_moves_as_without_masks_on_them,
    torchs_own_functions_see_the_masks,
    masks_go_out_and_in,
    an_error_brings_the_values_back,
    saved_by_four_loaded_by_four_in_another_way_and_by_two,
    states_are_loaded_whole_or_in_parts,
    a_state_put_together_makes_one_process_pruned,
    keep_zeros_clears_momentum_and_holds_what_was_removed,
    a_forward_that_leaves_the_root_whole_is_no_matter,
    copies_and_casts_keep_their_zeros,
    what_was_frozen_keeps_its_zeros_once_it_is_not,
    boxes_tile_the_whole,
)
