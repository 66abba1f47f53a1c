"""Branches as units: exactly so many go, as measures score them, to targets of any kind, in rounds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from tests.support.residual_cases import CASES, tokens


def mixed() -> nn.Module:
    return CASES["mixed"].model()


def gone(report: fp.Report) -> set[str]:
    return {layer.name for layer in report.layers if layer.pruned}


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 1.0])
def test_exactly_so_many_go_and_the_lowest(sparsity: float) -> None:
    model, x = mixed(), tokens()
    scores = fp.scores(model, "l1", granularity="block", example_inputs=x)
    count = round(sparsity * len(scores))
    report = fp.global_prune(model, "l1", sparsity, granularity="block", example_inputs=x)
    assert (report.pruned, report.units) == (count, len(scores))
    assert gone(report) == set(sorted(scores, key=lambda name: scores[name].item())[:count])


def test_a_measure_reads_the_weights_of_the_branch() -> None:
    model, x = mixed(), tokens()
    scores = fp.scores(model, "magnitude", granularity="block", example_inputs=x)
    block = model.blocks[1]
    weights = [block.attn.qkv.weight, block.attn.proj.weight]
    assert scores["blocks.1.attn"].item() == pytest.approx(sum(w.square().sum() for w in weights).sqrt().item())


def test_rounds_nest_and_nothing_collapses(recwarn: pytest.WarningsRecorder) -> None:
    model, x = mixed(), tokens()
    coupling = fp.couple(model, x)
    seen = [gone(fp.global_prune(model, sparsity=s, granularity="block", coupling=coupling)) for s in (0.3, 0.6, 1.0)]
    assert seen[0] < seen[1] < seen[2]
    assert not [one for one in recwarn if issubclass(one.category, fp.LayerCollapseWarning)]


def test_kinds_of_branches_give_up_equally_much() -> None:
    """Attention and a perceptron are two linear layers each: what they run tells them apart."""
    model, x = CASES["transformer"].model(), tokens()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(1e-3), block.attn.proj.weight.mul_(1e-3)
    raw, alike = (
        gone(
            fp.global_prune(copy.deepcopy(model), sparsity=0.5, granularity="block", example_inputs=x, allocation=word)
        )
        for word in ("global", "isomorphic")
    )
    assert raw == {"blocks.0.attn", "blocks.1.attn"}
    assert sorted(name.rpartition(".")[2] for name in alike) == ["attn", "mlp"]


def test_words_that_pick_and_hold() -> None:
    x = tokens()
    report = fp.global_prune(mixed(), sparsity=1.0, granularity="block", example_inputs=x, exclude="blocks.1.*")
    assert {layer.name for layer in report.layers} == {"blocks.0", "blocks.2", "blocks.3.attn", "blocks.3.fc1+fc2"}
    kept = {"blocks.0": 1, "*.mlp": 1}
    report = fp.global_prune(mixed(), sparsity=0.6, granularity="block", example_inputs=x, min_keep=kept)
    assert report.pruned == 4 and not {"blocks.0", "blocks.1.mlp"} & gone(report)
    report = fp.global_prune(
        mixed(), sparsity=0.5, granularity="block", example_inputs=x, allocation={"blocks.2": 1.0, "blocks.0": 0.0}
    )
    assert report.pruned == 3 and "blocks.2" in gone(report) and "blocks.0" not in gone(report)


@pytest.mark.parametrize("cost", ["parameters", "flops", "memory"])
def test_targets_in_what_the_model_costs(cost: str) -> None:
    model, x = mixed(), tokens()
    report = fp.global_prune(model, sparsity=0.3, cost=cost, granularity="block", example_inputs=x)
    (spent,) = report.spent
    assert spent.left <= spent.asked < spent.dense
    small = fp.shrink(model, x)
    if cost == "parameters":
        stay = sum(p.numel() for n, p in small.named_parameters() if n.endswith("gamma_orig"))
        assert spent.left == sum(p.numel() for p in small.parameters()) - stay


def test_a_pruner_takes_branches_out_between_its_rounds() -> None:
    model, x = CASES["transformer"].model(), tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = fp.Pruner(model, "magnitude", 1.0, rounds=4, schedule="linear", granularity="block", example_inputs=x)
    for round_ in range(1, 5):
        report = pruner.step()
        assert (report.pruned, report.units) == (round_, 4)
        model = fp.shrink(model, x, pruner=pruner, optimizer=optimizer)
        assert report.left is not None and report.left.parameters == sum(p.numel() for p in model.parameters())
        saved = copy.deepcopy(pruner.state_dict())
    assert pruner.done and saved["round"] == 4
    assert [type(block) for block in model.blocks] == [nn.Identity, nn.Identity]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"min_keep": 1}, "min_keep=1 would hold every block"),
        ({"max_sparsity": 0.5}, "max_sparsity=0.5 would hold every block"),
        ({"allocation": "layer"}, "allocation='layer' compares the units of a layer"),
        ({"normalize": "mean"}, "normalize='mean' compares the units of a layer"),
        ({"round_to": 8}, "round_to=8 is for"),
        ({"scored_by": "norm"}, "scored_by='norm' is for granularity='channel'"),
        ({"include": "head"}, "no branch has all of its weights among the parameters to prune"),
    ],
)
def test_words_without_a_meaning_are_refused(words: dict[str, object], text: str) -> None:
    model, x = mixed(), tokens()
    with pytest.raises(ValueError, match=text):
        fp.global_prune(model, sparsity=0.5, granularity="block", example_inputs=x, **words)
    assert not any(name.endswith("_mask") for name, _ in model.named_buffers())


def test_a_coupling_by_hand_has_branches() -> None:
    model, x = CASES["scaled"].model(), tokens()
    own = fp.channels.Branch(
        "mine",
        ("blocks.0.fc1.weight", "blocks.0.fc2.weight", "blocks.0.fc2.bias"),
        ("blocks.0.fc2.weight", "blocks.0.fc2.bias"),
    )
    report = fp.global_prune(model, sparsity=1.0, granularity="block", coupling=fp.Coupling((), branches=(own,)))
    assert gone(report) == {"mine"}
    assert isinstance(fp.shrink(model, x).blocks[0].fc1, nn.Identity)
    with pytest.raises(ValueError, match="should mask one of its parameters at least"):
        fp.channels.Branch("mine", ("blocks.0.fc1.weight",), ())
    with pytest.raises(ValueError, match="is in several branches"):
        fp.Coupling((), branches=(own, fp.channels.Branch("other", own.parameters, own.masked)))
    with pytest.raises(ValueError, match="and the model has no such parameter"):
        fp.Coupling((), branches=(own,)).check_fits({})
