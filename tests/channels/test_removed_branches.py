"""A branch that is masked, and one that is gone, is a branch that adds zero: by gates, one by one and together."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torch_flowprune as fp
from tests.support.residual_cases import (
    CASES,
    Basic,
    Case,
    Inverted,
    LayerScale,
    Parallel,
    PostNorm,
    Transformer,
    WrittenOut,
    _of_images,
    _of_tokens,
    images,
    tokens,
    without,
)
from torch_flowprune.channels import StandIn
from torch_flowprune.channels.shrinking.proof.equivalence import relative_error


def masked_without(model: nn.Module, coupling: fp.Coupling, names: list[str]) -> nn.Module:
    """Pruned by hand: a score for each branch, those named lowest."""
    pruned = copy.deepcopy(model)
    scores = {one.name: torch.tensor([0.0 if one.name in names else 1.0]) for one in coupling.branches}
    fp.global_prune(pruned, sparsity=len(names) / len(scores), granularity="block", coupling=coupling, scores=scores)
    return pruned


def some_of(count: int) -> list[tuple[int, ...]]:
    """Each alone, and all."""
    return [*((i,) for i in range(count)), tuple(range(count))]


@pytest.mark.parametrize("name", CASES)
def test_branches_are_read_off_the_graph(name: str) -> None:
    case = CASES[name]
    assert tuple(one.name for one in fp.couple(case.model(), case.example()).branches) == case.names


@pytest.mark.parametrize("name", CASES)
def test_a_branch_that_is_masked_or_gone_adds_zero(name: str) -> None:
    case = CASES[name]
    model, x = case.model(), case.example()
    coupling = fp.couple(model, x)
    for gone in some_of(len(case.names)):
        expected = without(model, gone)(x)
        assert relative_error(model(x), expected) > 1e-6  # it is a branch that tells
        pruned = masked_without(model, coupling, [case.names[i] for i in gone])
        assert relative_error(expected, pruned(x)) <= 1e-10
        small = fp.shrink(pruned, x)
        assert relative_error(expected, small(x)) <= 1e-10
        masked = {one for i in gone for one in coupling.branches[i].masked}
        assert not any(bool(p.any()) for n, p in small.named_parameters() if n in masked)


@pytest.mark.parametrize("name", CASES)
def test_the_costs_are_those_of_what_is_left(name: str) -> None:
    case = CASES[name]
    model, x = case.model(), case.example()
    coupling = fp.couple(model, x)
    assert coupling.costs is not None
    for gone in some_of(len(case.names))[-2:]:
        pruned = masked_without(model, coupling, [case.names[i] for i in gone])
        report = fp.report(pruned, granularity="block", coupling=coupling)
        assert report.left is not None and report.pruned == len(gone)
        small = fp.shrink(pruned, x)
        stay = sum(p.numel() for n, p in small.named_parameters() if n.endswith("gamma_orig"))  # the block reads it
        assert report.left.parameters == sum(p.numel() for p in small.parameters()) - stay
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            small(x)
        assert report.left.flops == counter.get_total_flops()


def test_beside_masks_a_branch_that_begins_at_zero_is_kept_too() -> None:
    """Zeros that nobody masked are where a branch begins to learn, also in a model that has masks elsewhere."""
    model, x = CASES["transformer"].model(), tokens()
    with torch.no_grad():
        for p in model.blocks[1].mlp.parameters():
            p.zero_()
    small = fp.shrink(masked_without(model, fp.couple(model, x), ["blocks.0.attn"]), x)
    assert isinstance(small.blocks[0].attn, StandIn)
    assert isinstance(small.blocks[1].mlp, nn.Sequential)


def test_what_a_branch_divides_by_is_not_masked_and_counts_as_gone_with_it() -> None:
    model, x = CASES["divided"].model(), tokens()
    coupling = fp.couple(model, x)
    assert all("fc2.weight" not in name for one in coupling.branches for name in one.masked)
    scores = {one.name: torch.tensor([float(i)]) for i, one in enumerate(coupling.branches)}
    report = fp.global_prune(model, sparsity=0.5, granularity="block", coupling=coupling, scores=scores)
    first, second = report.layers
    assert first.weights_pruned == first.weights == sum(p.numel() for p in model.blocks[0].parameters())
    assert second.weights_pruned == 0


def test_a_block_that_hands_on_what_it_is_given_is_an_identity() -> None:
    model, x = CASES["residual"].model(), images()
    small = fp.shrink(masked_without(model, fp.couple(model, x), ["blocks.0", "blocks.2"]), x)
    assert [type(block) for block in small.blocks] == [nn.Identity, Basic, nn.Identity]
    assert list(small.state_dict()) == [
        key for key in model.state_dict() if not key.startswith(("blocks.0", "blocks.2"))
    ]


def test_what_stands_for_half_a_block_gives_what_its_code_unpacks() -> None:
    model, x = CASES["transformer"].model(), tokens()
    small = fp.shrink(masked_without(model, fp.couple(model, x), ["blocks.0.attn"]), x)
    assert isinstance(small.blocks[0].norm1, nn.Identity) and isinstance(small.blocks[0].attn, StandIn)
    value, rest = small.blocks[0].attn(x, mask=None)
    assert rest is None and not bool(value.any()) and value.shape == x.shape
    assert fp.replaced_modules(small) == {"blocks.0.attn": ["zeros, since a branch is gone"]}


@pytest.mark.parametrize("name", CASES)
def test_it_is_saved_and_rebuilt(name: str, tmp_path) -> None:
    case = CASES[name]
    model, x = case.model(), case.example()
    names = list(case.names[::2])
    small = fp.shrink(masked_without(model, fp.couple(model, x), names), x)
    again = fp.rebuild(case.model(), json.loads(json.dumps(fp.describe(model, small))))
    fp.load_state_dict(again, fp.state_dict(small))
    fp.save_pruned(small, tmp_path / "small.safetensors")
    loaded = fp.load_pruned(case.model(), tmp_path / "small.safetensors")
    for one in (again, loaded, copy.deepcopy(small)):
        assert torch.equal(one.eval()(x), small(x))
        assert list(one.state_dict()) == list(small.state_dict())


def test_a_damaged_description_is_named() -> None:
    case = CASES["transformer"]
    model, x = case.model(), case.example()
    small = fp.shrink(masked_without(model, fp.couple(model, x), ["blocks.0.attn"]), x)
    description = fp.describe(model, small)
    for bad in ({"blocks.0.attn": {"reads": 0}}, {"blocks.9": description["stand_ins"]["blocks.0.attn"]}):
        with pytest.raises(ValueError, match="what stands in a module's place|the model has none there"):
            fp.rebuild(case.model(), {**description, "stand_ins": bad})


def test_it_trains_on_with_its_optimizer_and_in_place() -> None:
    case = CASES["transformer"]
    model, x = case.model(), case.example()
    pruned = masked_without(model, fp.couple(model, x), ["blocks.0.attn", "blocks.1.attn", "blocks.1.mlp"])
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=0.01, weight_decay=0.0)
    pruned(x).square().mean().backward()
    optimizer.step()
    small = fp.shrink(pruned, x, optimizer=optimizer, inplace=True)
    assert small is pruned and isinstance(small.blocks[0].attn, StandIn)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in small.parameters()}
    before = small(x).detach().clone()
    optimizer.zero_grad()
    small(x).square().mean().backward()
    optimizer.step()
    assert relative_error(before, small(x)) > 0


def test_channels_go_after_branches() -> None:
    case = CASES["mixed"]
    model, x = case.model(), case.example()
    pruned = masked_without(model, fp.couple(model, x), ["blocks.1.mlp", "blocks.3.attn"])
    fp.global_prune(pruned, "magnitude", amount=0.3, granularity="channel", example_inputs=x)
    small = fp.shrink(pruned, x)
    assert relative_error(pruned(x), small(x)) <= 1e-10
    assert small.blocks[0].fc1.out_features < model.blocks[0].fc1.out_features
    assert isinstance(small.blocks[1].mlp, StandIn)


class NoBranch(nn.Module):
    """Sums that are no x + f(x) of layers that can go."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "two layers":
            return self.head(torch.relu(self.a(x) + self.b(x)))
        if self.kind == "another input":
            return self.head(torch.relu(self.a(x[:, :1]) + x[:, 1:2]))
        if self.kind == "read elsewhere":
            y = self.a(x)
            return self.head(x + y) * y
        if self.kind == "shared with the head":
            return self.head(x + self.b(self.head(x)))[..., :3] + self.b(x)[..., :3]
        return self.head(x + torch.sigmoid(self.a(x)))


@pytest.mark.parametrize(
    "kind", ["two layers", "another input", "read elsewhere", "shared with the head", "never zero"]
)
def test_other_sums_are_no_branches(kind: str) -> None:
    model, x = NoBranch(kind), torch.randn(2, 5, 6)
    assert fp.couple(model, x).branches == ()
    with pytest.raises(ValueError, match="no residual branch that can be removed"):
        fp.global_prune(model, sparsity=0.5, granularity="block", example_inputs=x)


def test_a_model_whose_branches_begin_at_zero_keeps_them() -> None:
    model, x = CASES["residual"].model(), images()
    with torch.no_grad():
        for block in model.blocks:
            block.bn2.weight.zero_()
            block.bn2.bias.zero_()
    assert all(isinstance(block, Basic) for block in fp.shrink(model, x).blocks)


KINDS = (Transformer, PostNorm, Parallel, LayerScale, WrittenOut)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_residual_nets(data: st.DataObject) -> None:
    on_images = data.draw(st.booleans())
    kinds = data.draw(st.lists(st.sampled_from((Basic, Inverted) if on_images else KINDS), min_size=1, max_size=4))
    case = Case(lambda: (_of_images if on_images else _of_tokens)(*kinds), images if on_images else tokens, ())
    model, x = case.model(), case.example()
    coupling = fp.couple(model, x)
    count = len(model.gates)
    assert len(coupling.branches) == count
    order = {name: i for i, name in enumerate(one.name for one in coupling.branches)}
    gone = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
    pruned = masked_without(model, coupling, [name for name, i in order.items() if i in gone])
    expected = without(model, gone)(x)
    small = fp.shrink(pruned, x)
    assert relative_error(expected, pruned(x)) <= 1e-10
    assert relative_error(expected, small(x)) <= 1e-10
