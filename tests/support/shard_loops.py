"""What four gloo ranks do with a pruner in a training loop, saved on four ranks and gone on with on other numbers."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rank_group import group_of
from sharded_nets import FSDP, OPTIMIZERS, TWO_WAYS, X, Y, distance, in_blocks, net, whole
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh

import torch_flowprune as fp
from torch_flowprune.inputs import local

ROUNDS: dict[str, Any] = {"method": "loss_preservation", "sparsity": 0.8, "rounds": 3}


class Loop:
    """A model that trains, with its optimizer and its pruner; ``share`` of the data is read."""

    def __init__(self, model: nn.Module, share: slice = slice(None), **words: Any) -> None:
        self.model, self.share = model, share
        self.optimizer = OPTIMIZERS["SGD"](model.parameters())
        self.pruner = fp.Pruner(model, **{**ROUNDS, **words})

    def run(self, rounds: int, minibatches: int = 2) -> None:
        for _ in range(rounds):
            self.steps(minibatches)
            self.pruner.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(X[self.share]), Y[self.share]).backward()
            self.pruner.track()
            self.optimizer.step()


def check(loop: Loop, alone: Loop) -> None:
    masks = {name: whole(mask) for name, mask in fp.masks(loop.model).items()}
    assert all(torch.equal(masks[name], mask) for name, mask in fp.masks(alone.model).items())
    assert distance(loop.model, alone.model) < 1e-6


def rounds_in_a_loop_are_those_of_one_process(rank: int, path: str) -> None:
    """After each; of ``fully_shard`` alone, where it is saved."""
    loop, alone = Loop(TWO_WAYS.of(net()), TWO_WAYS.share(rank)), Loop(net())
    for _ in range(3):
        loop.run(1)
        alone.run(1)
        check(loop, alone)
    assert loop.pruner.done


def a_gradient_that_overflows_on_one_rank_is_left_out_on_all(rank: int, path: str) -> None:
    loop = Loop(FSDP.of(net()))
    nn.functional.cross_entropy(loop.model(X), Y).backward()
    if rank == 1:
        local(loop.model[0].weight.grad).fill_(torch.inf)
    loop.pruner.track()
    assert not loop.pruner.tracked


def saved_by_four_and_gone_on_with_by_others(rank: int, path: str) -> None:
    """In the middle of a round: what was tracked goes along."""
    loop, alone = Loop(FSDP.of(net()), FSDP.share(rank)), Loop(net())
    for one in (loop, alone):
        one.run(1)
        one.steps(1)
    states = dict(zip(("model", "optimizer"), get_state_dict(loop.model, loop.optimizer), strict=True))
    dcp.save({**states, "pruner": loop.pruner.state_dict()}, checkpoint_id=path)
    for one in (loop, alone):
        one.run(2)
    check(loop, alone)
    go_on(Loop(TWO_WAYS.of(net()), TWO_WAYS.share(rank)), path, alone)
    two = distributed.new_group([0, 1])
    if rank < 2:
        go_on(Loop(in_blocks(net(), DeviceMesh.from_group(two, "cpu")), slice(rank, None, 2)), path, alone, two)


def go_on(loop: Loop, path: str, alone: Loop, group: Any = None) -> None:
    wearing = [
        key.removeprefix("model.").removesuffix("_mask")
        for key in dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        if key.startswith("model.") and key.endswith("_mask")
    ]
    parameters = dict(loop.model.named_parameters())
    fp.apply_masks(loop.model, {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in wearing})
    states = dict(zip(("model", "optimizer"), get_state_dict(loop.model, loop.optimizer), strict=True))
    pruner = loop.pruner.state_dict()
    pruner["tracked"] = {name: torch.empty(parameters[name].numel()) for name in alone.pruner._layers}
    dcp.load({**states, "pruner": pruner}, checkpoint_id=path, process_group=group)
    set_state_dict(loop.model, loop.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    loop.pruner.load_state_dict(pruner)
    loop.run(2)
    check(loop, alone)


def killed(rank: int, path: str) -> None:
    """A rank dies while it scores: the other has an error, and its model is as it was."""

    def dies(theta: Tensor) -> Tensor:
        if rank == 1:
            os._exit(0)
        return theta.abs().sum(-1)

    with group_of(2, rank, path):
        model = in_blocks(net(), distributed.device_mesh.init_device_mesh("cpu", (2,)))
        before = {name: local(value).clone() for name, value in model.state_dict().items()}
        with pytest.raises((RuntimeError, ValueError)):
            fp.global_prune(model, dies, sparsity=0.5)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(local(value), before[name]) for name, value in model.state_dict().items())
        os._exit(0)  # nobody is left to meet


SCENARIOS = (
    rounds_in_a_loop_are_those_of_one_process,
    a_gradient_that_overflows_on_one_rank_is_left_out_on_all,
    saved_by_four_and_gone_on_with_by_others,
)
