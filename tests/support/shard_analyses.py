"""What four gloo ranks score, compare, predict and grow on a sharded model, against one process that has all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_choices import check_masks, masks_of, seeded
from sharded_nets import BLOCKS, FSDP, OPTIMIZERS, REPLICAS, SPREADS, TENSORS, TWO_WAYS, Spread, X, Y, net, train, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import torch_flowprune as fp
from torch_flowprune.inputs import local


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: local(value).clone() for name, value in model.state_dict().items()}


def check_as_it_was(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(local(now[name]), value) for name, value in before.items())


def data_of(spread: Spread, rank: int) -> Any:
    """The rank's part, in as many batches as there are readers of others, and all of it."""
    share = spread.share(rank)
    return [(X[share].double(), Y[share])], [(X.double(), Y)]


def two_batches_of(spread: Spread, rank: int) -> Any:
    """The rank's part of two batches, and all of them."""
    share, parts = spread.share(rank), (slice(0, 8), slice(8, 16))
    own = [(X[part][share].double(), Y[part][share]) for part in parts]
    return own, [(X[part].double(), Y[part]) for part in parts]


# -- scores ------------------------------------------

SCORED = (
    {"method": "magnitude"},
    {"method": "random", "generator": seeded},
    {"method": "magnitude", "granularity": "filter"},
    {"method": "magnitude", "granularity": "1:2"},
)


def scores_are_those_of_one_process_and_lie_as_the_parameters_do(rank: int, path: str) -> None:
    for spread in SPREADS:
        alone, model = net(), spread.of(net())
        before = values_of(model)
        for words in SCORED:
            own = {word: value() if word == "generator" else value for word, value in words.items()}
            again = {word: value() if word == "generator" else value for word, value in words.items()}
            expected, found = fp.scores(alone, **own), fp.scores(model, **again)
            assert (list(found), found.method, found.granularity) == (
                list(expected),
                expected.method,
                expected.granularity,
            )
            for name, score in expected.items():
                parameter = model.get_parameter(name)
                if isinstance(parameter, DTensor) and words.get("granularity") != "filter":
                    assert found[name].placements == parameter.placements
                    assert found[name].shape == parameter.shape
                assert torch.equal(whole(found[name]).flatten(), score), (spread.name, words, name)
        check_as_it_was(model, before)


def scores_of_transposed_blocks_lie_as_the_parameters_do(rank: int, path: str) -> None:
    """Their units' order is not that of the weights."""

    def transposed() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ConvTranspose1d(4, 6, 2), nn.ReLU(), nn.ConvTranspose1d(6, 4, 3))

    alone, model = transposed(), fully_shard(transposed(), mesh=init_device_mesh("cpu", (4,)))
    scores = fp.scores(model, granularity="1:2")
    for name, score in scores.items():
        assert torch.equal(whole(score), alone.get_parameter(name).detach().abs()), name
    fp.global_prune(model, scores=scores, granularity="1:2")
    fp.global_prune(alone, granularity="1:2")
    check_masks(model, alone)


def several_measures_come_from_one_sweep(rank: int, path: str) -> None:
    for spread in (FSDP, TWO_WAYS):
        own, every = data_of(spread, rank)
        methods = ["loss_preservation", "gradient_norm_increase", "magnitude"]
        expected = fp.scores(net().double(), methods, every)
        found = fp.scores(spread.of(net().double()), methods, own)
        assert list(found) == list(expected)
        for name, scores in expected.items():
            for layer, score in scores.items():
                assert torch.allclose(whole(found[name][layer]).flatten(), score, rtol=1e-9, atol=1e-15), (name, layer)


def scores_are_pruned_by_and_saved(rank: int, path: str) -> None:
    """On the ranks that have them, on others, and on one process; the file is that of one process."""
    for granularity in ("weight", "filter", "1:2"):
        words: dict[str, Any] = {} if granularity == "1:2" else {"sparsity": 0.4}
        alone, model = net(), FSDP.of(net())
        expected, scores = fp.scores(alone, granularity=granularity), fp.scores(model, granularity=granularity)
        fp.global_prune(alone, scores=expected, **words)
        fp.global_prune(model, scores=scores, **words)
        check_masks(model, alone)
        file = f"{path}.{granularity.replace(':', '')}"
        scores.save(file)
        loaded = fp.Scores.load(file)
        for other in (TWO_WAYS.of(net()), net()):
            fp.global_prune(other, scores=loaded, **words)
            check_masks(other, alone)
        dense = net()
        fp.global_prune(dense, scores=scores, **words)
        check_masks(dense, alone)
        if granularity != "1:2":
            assert loaded == expected
        if rank == 0 and granularity == "weight":
            expected.save(f"{file}.alone")
            assert Path(file).read_bytes() == Path(f"{file}.alone").read_bytes()


def scores_print_on_one_rank_alone(rank: int, path: str) -> None:
    scores = fp.scores(FSDP.of(net()))
    assert scores == fp.scores(FSDP.of(net()))
    if rank == 0:
        text = str(scores)
        assert text.startswith("magnitude scores of 150 units (weight), of which a table of those on this rank")
        assert text.splitlines()[2].split()[:2] == ["0.weight", "24"], text


# -- what a prune would do ------------------------------------------


def a_comparison_is_that_of_one_process(rank: int, path: str) -> None:
    """Losses to rounding, choices and correlations alike; of models with masks, too."""
    for spread, words in ((FSDP, {}), (TWO_WAYS, {"granularity": "filter"})):
        own, every = data_of(spread, rank)
        alone, model = net().double(), spread.of(net().double())
        if spread is FSDP:
            for one in (alone, model):
                fp.global_prune(one, sparsity=0.2)
        before = values_of(model)
        methods = ["magnitude", "taylor", "random"]
        expected = fp.compare(alone, methods, [0.3, 0.6], every, generator=seeded(), **words)
        found = fp.compare(model, methods, [0.3, 0.6], own, generator=seeded(), **words)
        check_as_it_was(model, before)
        assert found.samples == expected.samples
        assert found.loss == pytest.approx(expected.loss)
        for one, other in zip(found.outcomes, expected.outcomes, strict=True):
            assert (one.method, one.sparsity, one.emptied) == (other.method, other.sparsity, other.emptied)
            assert (one.loss, one.predicted) == pytest.approx((other.loss, other.predicted)), spread.name
        for name, row in expected.correlation.items():
            assert found.correlation[name] == pytest.approx(row)


def a_forward_after_a_comparison_has_all_weights(rank: int, path: str) -> None:
    """What the last forward inside left gathered was masked. And ranks may have more batches than others."""
    mesh = init_device_mesh("cpu", (4,))
    model, alone = fully_shard(net(), mesh=mesh, reshard_after_forward=False), net()
    batches = [(X[rank::4], Y[rank::4])] * (1 + rank)
    with torch.no_grad():
        model(X)
    every = [(X[each::4], Y[each::4]) for each in range(4) for _ in range(1 + each)]
    found = fp.compare(model, "magnitude", 0.9, batches, metric=lambda model, _: model(X).square().sum())
    expected = fp.compare(alone, "magnitude", 0.9, every, metric=lambda model, _: model(X).square().sum())
    assert (found.samples, found.loss) == (expected.samples, pytest.approx(expected.loss))
    for one, other in zip(found.outcomes, expected.outcomes, strict=True):
        assert (one.loss, one.metric) == pytest.approx((other.loss, other.metric), rel=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(X), alone(X), atol=1e-6)


def sensitivities_are_those_of_one_process(rank: int, path: str) -> None:
    spread = TENSORS
    own, every = data_of(spread, rank)
    alone, model = net().double(), spread.of(net().double())
    before = values_of(model)
    expected = fp.sensitivity(alone, "taylor", every, sparsities=[0.5])
    found = fp.sensitivity(model, "taylor", own, sparsities=[0.5])
    check_as_it_was(model, before)
    assert (found.units, found.samples) == (expected.units, expected.samples)
    for name, losses in expected.losses.items():
        assert found.losses[name] == pytest.approx(losses), name


def predictions_are_those_of_one_process(rank: int, path: str) -> None:
    """A batch is what all ranks read at once."""
    chosen = net()
    fp.global_prune(chosen, sparsity=0.3)
    masks = fp.masks(chosen)
    for spread in (REPLICAS, TWO_WAYS):
        own, every = two_batches_of(spread, rank)
        alone, model = net().double(), spread.of(net().double())
        before = values_of(model)
        expected, found = fp.predict(alone, masks, every), fp.predict(model, masks, own)
        check_as_it_was(model, before)
        assert found.samples == expected.samples
        for field, value in vars(expected).items():
            assert getattr(found, field) == pytest.approx(value, rel=1e-9), (spread.name, field)


def diagnoses_are_those_of_one_process(rank: int, path: str) -> None:
    chosen = net()
    fp.global_prune(chosen, sparsity=0.3)
    for spread, words in ((FSDP, {}), (TWO_WAYS, {"granularity": "filter", "masks": fp.masks(chosen)})):
        own, every = two_batches_of(spread, rank)
        alone, model = net().double(), spread.of(net().double())
        before = values_of(model)
        expected, found = fp.diagnose(alone, every, **words), fp.diagnose(model, own, **words)
        check_as_it_was(model, before)
        assert (found.samples, found.loss) == (expected.samples, pytest.approx(expected.loss))
        for one, other in zip((*found.layers, found.total), (*expected.layers, expected.total), strict=True):
            for field, value in vars(other).items():
                assert getattr(one, field) == (value if field == "name" else pytest.approx(value, rel=1e-9)), field
        if expected.prediction is not None:
            assert found.prediction is not None
            assert vars(found.prediction) == pytest.approx(vars(expected.prediction), rel=1e-9)


def a_rank_with_one_sample_halves_nothing_on_all(rank: int, path: str) -> None:
    own = (X[:1], Y[:1]) if rank == 0 else (X, Y)
    assert fp.diagnose(FSDP.of(net()), [own]).total.stability is None


# -- growth ------------------------------------------


def weights_grow_as_on_one_process(rank: int, path: str) -> None:
    """By the gradient under the masks, and at random; momentum is 0 where they have grown."""
    for spread, by in ((FSDP, "random"), (TWO_WAYS, "gradient")):
        own, every = data_of(spread, rank)
        alone, model = net().double(), spread.of(net().double())
        optimizers = [OPTIMIZERS["SGD"](one.parameters()) for one in (alone, model)]
        for one, optimizer, data in zip((alone, model), optimizers, (every, own), strict=True):
            train(one, optimizer, *data[0], 1)
            fp.global_prune(one, sparsity=0.6)
            train(one, optimizer, *data[0], 2)
        expected = fp.regrow(alone, 0.5, by, every, optimizer=optimizers[0], generator=seeded())
        found = fp.regrow(model, 0.5, by, own, optimizer=optimizers[1], generator=seeded())
        assert found == expected
        check_masks(model, alone)
        for block in BLOCKS:
            pairs = ((model[block].weight, optimizers[1]), (alone[block].weight_orig, optimizers[0]))
            (value, momentum), (_, other) = [
                (whole(one), whole(steps.state[one]["momentum_buffer"])) for one, steps in pairs
            ]
            kept = alone[block].weight_mask
            assert torch.allclose(momentum * kept, other * kept, atol=1e-12)
            assert torch.allclose(value, alone[block].weight, atol=1e-12)


# -- masks agreed on ------------------------------------------


def masks_go_on_on_all_ranks_or_on_none(rank: int, path: str) -> None:
    chosen = net()
    fp.global_prune(chosen, sparsity=0.5)
    masks = fp.masks(chosen)
    wrong = {name: mask[:-1] if name == "2.weight" else mask for name, mask in masks.items()}
    fewer = {"0.weight": masks["0.weight"]}
    for spread in (FSDP, TWO_WAYS):
        model = spread.of(net())
        before = values_of(model)
        with pytest.raises(ValueError if rank == 2 else RuntimeError, match="shape" if rank == 2 else "1 of the ranks"):
            fp.apply_masks(model, wrong if rank == 2 else masks)
        with pytest.raises(ValueError if rank else RuntimeError, match="the first rank of other" if rank else "3 of"):
            fp.apply_masks(model, masks if rank else fewer)
        check_as_it_was(model, before)
        assert not fp.masks(model)
        fp.apply_masks(model, masks)
        assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(model).items())


SCENARIOS = (
    scores_are_those_of_one_process_and_lie_as_the_parameters_do,
    scores_of_transposed_blocks_lie_as_the_parameters_do,
    several_measures_come_from_one_sweep,
    scores_are_pruned_by_and_saved,
    scores_print_on_one_rank_alone,
    a_comparison_is_that_of_one_process,
    a_forward_after_a_comparison_has_all_weights,
    sensitivities_are_those_of_one_process,
    predictions_are_those_of_one_process,
    diagnoses_are_those_of_one_process,
    a_rank_with_one_sample_halves_nothing_on_all,
    weights_grow_as_on_one_process,
    masks_go_on_on_all_ranks_or_on_none,
)
