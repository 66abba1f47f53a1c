"""Coupling against brute force: what `couple` finds on tiny nets, and that removing it is exact."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
from collections import UserDict

import pytest
import torch
from channel_cases import CASES, Attention, coupled
from torch import nn
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.channels.coupling import arguments_of, couple, coupling_of, reading_of
from torch_flowprune.channels.group_masks import channel_masks, living_channels, rows
from torch_flowprune.channels.groups import Coupling, Frozen
from torch_flowprune.channels.rules.table import RULES
from torch_flowprune.channels.shrinking.removal import shrink
from torch_flowprune.channels.shrinking.surgery import ShrinkError
from torch_flowprune.channels.slices import Group, Slice
from torch_flowprune.channels.tracing.exported_program import program_of
from torch_flowprune.channels.tracing.label_propagation import required_by
from torch_flowprune.channels.tracing.labelled_graph import read
from torch_flowprune.channels.tracing.nodes import operator_name


@pytest.mark.parametrize("name", CASES)
def test_groups_of_each_kind(name: str) -> None:
    _, _, coupling = coupled(CASES[name])
    assert {g.name: g.size for g in coupling.groups} == CASES[name].groups


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_position_is_in_a_group_or_frozen_with_a_reason(name: str) -> None:
    model, _, coupling = coupled(CASES[name])
    listed: dict[tuple[str, int], int] = {}
    for g in coupling.groups:
        for s in g.slices:
            listed[s.parameter, s.axis] = listed.get((s.parameter, s.axis), 0) + s.index.numel()
    for f in coupling.frozen:
        assert f.reason
        listed[f.parameter, f.axis] = listed.get((f.parameter, f.axis), 0) + f.positions
    for parameter, p in model.named_parameters():
        for axis, size in enumerate(p.shape):
            kernel = p.ndim > 2 and axis > 1
            assert size == 1 or kernel or listed[parameter, axis] == size


def test_an_operator_without_a_rule_is_listed_and_freezes() -> None:
    _, _, coupling = coupled(CASES["unknown operator"])
    assert coupling.unknown == {"special_i1": 1}
    assert any("without a rule (special_i1)" in f.reason for f in coupling.frozen)


def test_windows_counted_from_the_end() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x).unfold(-2, 4, 2)).mT)

    reading = reading_of(Patches().eval(), torch.randn(2, 10, 3))
    (unfolded,) = [value for node, value in reading.values.items() if operator_name(node) == "unfold"]
    assert unfolded.shape == (2, 4, 8, 4)
    assert [(group.name, group.size) for group in coupling_of(reading).groups] == [("a.weight", 8)]


def test_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 1))
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    random = torch.random.get_rng_state()
    couple(model, torch.ones(2, 3, 4, 4))
    assert torch.equal(random, torch.random.get_rng_state())
    assert flags == [m.training for m in model.modules()]
    assert attributes == [set(vars(m)) for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3, 1, 1))


def test_training_only_parameters_are_read_from_the_training_graph() -> None:
    """A head that runs in training alone still reads channels: they must not go without its columns."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.a(x))
            return self.b(h) + self.aux(h) if self.training else self.b(h)

    group = couple(Auxiliary(), torch.randn(2, 4))["a.weight"]
    assert {(s.parameter, s.role) for s in group.slices} >= {("aux.weight", "consumer"), ("b.weight", "consumer")}


def test_rows_are_the_slices_side_by_side() -> None:
    model, _, coupling = coupled(CASES["conv bn relu"])
    tensors = dict(model.named_parameters())
    group = coupling["0.weight"]
    assert torch.equal(rows(tensors, group), model[0].weight.reshape(6, -1))
    everything = rows(tensors, group, ("producer", "affine", "consumer"))
    assert everything.shape == (6, 27 + 1 + 1 + 1 + 2)


def test_rows_of_a_flattened_channel_hold_all_its_columns() -> None:
    model, _, coupling = coupled(CASES["flatten"])
    columns = rows(dict(model.named_parameters()), coupling["0.weight"], ("consumer",))
    assert torch.equal(columns, model[3].weight.reshape(3, 4, 16).permute(1, 2, 0).reshape(4, -1))


def test_masks_cover_a_unit_and_nothing_else() -> None:
    model, _, coupling = coupled(CASES["residual"])
    keep = {"b.weight": torch.tensor([True, False, True, True])}
    given = channel_masks(coupling, keep, dict(model.named_parameters()))
    assert set(given) == {"b.weight", "b.bias", "skip.weight", "skip.bias", "out.weight"}
    assert not given["b.weight"][1].any() and given["b.weight"][[0, 2, 3]].all()
    assert not given["out.weight"][:, 1].any()
    assert living_channels(coupling, given)["b.weight"].tolist() == [True, False, True, True]
    assert living_channels(coupling, given)["a.weight"].all()


def test_a_unit_is_alive_while_its_bias_is() -> None:
    model, _, coupling = coupled(CASES["linear"])
    given = channel_masks(coupling, {"0.weight": torch.tensor([False] * 4 + [True])}, dict(model.named_parameters()))
    del given["0.bias"]
    assert living_channels(coupling, given)["0.weight"].all()


def test_columns_that_read_zeros_need_no_mask_and_others_do() -> None:
    for name, reads_zero in (
        ("linear", True),
        ("sigmoid", False),
        ("conv relu bn", True),
        ("bn without affine", False),
    ):
        _, _, coupling = coupled(CASES[name])
        consumers = [s for g in coupling.groups for s in g.slices if s.role == "consumer"]
        assert [s.reads_zero for s in consumers] == [reads_zero], name


def test_fused_attention_couples_q_k_v_and_the_projection() -> None:
    coupling = couple(Attention(8, 4, 3, fused=True), torch.randn(2, 5, 8))
    slices = {(s.parameter, s.axis): s.index for s in coupling["qkv.weight"].slices}
    assert slices["qkv.weight", 0][1].tolist() == [3, 4, 5, 15, 16, 17, 27, 28, 29]
    assert slices["proj.weight", 1][1].tolist() == [3, 4, 5]


def test_printed_drawn_and_stored() -> None:
    _, _, coupling = coupled(CASES["residual"])
    assert "b.weight: 4 units" in str(coupling) and "not removable:" in str(coupling)
    assert coupling.to_dot().startswith("digraph") and '"b.weight\\n4 units"' in coupling.to_dot()
    again = Coupling.from_dict(json.loads(json.dumps(coupling.to_dict())))
    assert str(again) == str(coupling) and again.to_dict() == coupling.to_dict()


def test_written_by_hand() -> None:
    group = Group(
        "a.weight",
        (Slice("a.weight", 0, torch.arange(3), "producer"), Slice("b.weight", 1, torch.arange(3), "consumer")),
    )
    coupling = Coupling((group,), (Frozen("b.weight", 0, 2, "producer", "the output"),))
    assert coupling["a.weight"].size == 3
    assert coupling.share() == 3 / 5
    with pytest.raises(KeyError, match="no group 'c'"):
        coupling["c"]
    with pytest.raises(ValueError, match="one of producer, affine, consumer, direction, buffer, not .maker."):
        Slice("a.weight", 0, torch.arange(3), "maker")


# -- written by hand ------------------------------------------


class Bessel(nn.Module):
    """A Bessel function of each channel, an operator without a rule: one who knows it knows that zeros stay zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.special.i1(torch.relu(self.a(x))))


def by_hand(**changes: object) -> Coupling:
    slices = {
        "rows": Slice("a.weight", 0, torch.arange(4), "producer"),
        "bias": Slice("a.bias", 0, torch.arange(4), "affine"),
        "columns": Slice("b.weight", 1, torch.arange(4), "consumer"),
    }
    return Coupling((Group("hidden", tuple(s for s in {**slices, **changes}.values() if s is not None)),))  # type: ignore[misc]


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [[2], [0], [3], [1]]])
def test_a_coupling_by_hand_scores_masks_and_shrinks_what_no_rule_knows(index: list) -> None:
    torch.manual_seed(0)
    model, x = Bessel().double().eval(), torch.randn(5, 3, dtype=torch.float64)
    assert couple(model, x).groups == ()
    order = torch.tensor(index)
    coupling = by_hand(
        rows=Slice("a.weight", 0, order, "producer"),
        bias=Slice("a.bias", 0, order, "affine"),
        columns=Slice("b.weight", 1, order, "consumer"),
    )
    parameters = dict(model.named_parameters())
    scores = rows(parameters, coupling["hidden"]).norm(dim=-1)
    assert torch.equal(scores, model.a.weight.norm(dim=1)[order.flatten()])
    given = channel_masks(coupling, {"hidden": scores > scores.median()}, parameters)
    small = shrink(model, x, masks=given, coupling=coupling)
    with torch.no_grad():
        for name, mask in given.items():
            parameters[name].mul_(mask)
    assert type(small) is Bessel
    assert (small.a.out_features, small.b.in_features) == (2, 2)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_coupling_by_hand_that_leaves_out_a_slice_is_found_out() -> None:
    model, x = Bessel(), torch.randn(5, 3)
    parameters = dict(model.named_parameters())
    coupling = by_hand(columns=None)
    given = channel_masks(coupling, {"hidden": torch.tensor([True, False, True, True])}, parameters)
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    with pytest.raises(ShrinkError):
        shrink(model, x, masks=given, coupling=coupling)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: by_hand(columns=Slice("b.weights", 1, range(4), "consumer")), (r"'b\.weights', and the model has no "
                                                                               r"such parameter \(nearest: '")),
        (lambda: by_hand(extra=Slice("table", 0, range(4), "buffer")), ("has a slice of 'table', and the model has no "
                                                                       "such buffer")),
        (lambda: by_hand(columns=Slice("b.weight", 2, range(4), "consumer")), (r"along axis 2 of 'b\.weight', whose "
                                                                              r"shape is \(2, 4\)")),
        (lambda: by_hand(columns=Slice("b.weight", 1, [0, 1, 2, 4], "consumer")), (r"position 4 on axis 1 of "
                                                                                  r"'b\.weight', which has 4")),
        (lambda: by_hand(columns=Slice("b.weight", 1, range(3), "consumer")), (r"has 4 units in 'a\.weight' and 3 in "
                                                                              r"'b\.weight': expected a row")),
        (lambda: by_hand(columns=Slice("b.weight", 1, [0, 1, 2, 2], "consumer")), (r"position 2 of axis 1 of "
                                                                                  r"'b\.weight' is twice in group "
                                                                                  r"'hidden'")),
        (lambda: by_hand(columns=Slice("b.weight", 1, [-1, 1, 2, 3], "consumer")), (r"from 0 on; got shape \(4,\) "
                                                                                   r"with -1 in it")),
        (lambda: by_hand(columns=Slice("b.weight", 1, [], "consumer")), r"from 0 on; got shape \(0,\)"),
        (lambda: by_hand(columns=Slice("b.weight", 1, 3, "consumer")), r"\(units,\) or \(units, positions\)"),
        (lambda: Group("hidden", ()), "group 'hidden' has no slices"),
        (lambda: Coupling((*by_hand().groups, *by_hand().groups)), "several groups or branches are called 'hidden'"),
        (
            lambda: Coupling((*by_hand().groups, Group("other", (Slice("b.weight", 1, [3], "producer"),)))),
            r"position 3 of axis 1 of 'b\.weight' is in groups 'hidden' and 'other': a position belongs to one unit",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_coupling_by_hand_is_said(wrong: object, text: str) -> None:
    model = Bessel()
    with pytest.raises(ValueError, match=text):
        shrink(model, torch.randn(5, 3), coupling=wrong())  # type: ignore[operator]


def test_masks_take_one_flag_a_unit() -> None:
    parameters = dict(Bessel().named_parameters())
    with pytest.raises(
        ValueError, match=r"keep\['hidden'\] has shape \(3,\): expected one flag for each of the group's 4 units"
    ):
        channel_masks(by_hand(), {"hidden": torch.ones(3, dtype=torch.bool)}, parameters)
    with pytest.raises(ValueError, match=r"the model has no such parameter"):
        channel_masks(
            by_hand(columns=Slice("c.weight", 1, range(4), "consumer")),
            {"hidden": torch.ones(4, dtype=torch.bool)},
            parameters,
        )


# -- as users call it ------------------------------------------


def test_a_pruned_model_couples_as_the_dense_one_does() -> None:
    model, x, coupling = coupled(CASES["residual"])
    for prune_it in (torch_pruned, flowpruned):
        pruned = prune_it(copy.deepcopy(model), x)
        before = pruned.state_dict()
        assert sorted(str(couple(pruned, x)).splitlines()) == sorted(
            str(coupling).splitlines()
        )  # torch moves what it prunes
        assert all(torch.equal(value, before[name]) for name, value in pruned.state_dict().items())
        assert any(name.endswith("_mask") for name in pruned.state_dict())


def torch_pruned(model: nn.Module, _: torch.Tensor) -> nn.Module:
    prune.ln_structured(model.a, "weight", amount=2, n=2, dim=0)
    return model


def flowpruned(model: nn.Module, x: torch.Tensor) -> nn.Module:
    fp.global_prune(model, sparsity=0.4, granularity="channel", example_inputs=x, min_keep=1)
    return model


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, *, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden = torch.relu(self.a(ids)) * (1 if mask is None else self.b(mask))
        return self.c(hidden if scale is None else hidden * scale)


IDS, MASK, SCALE = torch.randn(3, 4), torch.randn(3, 4), torch.rand(1)


@pytest.mark.parametrize(
    ("inputs", "kwargs"),
    [
        (IDS, None),
        ((IDS, MASK), None),
        ({"ids": IDS, "mask": MASK}, None),
        (UserDict(ids=IDS, mask=MASK, scale=SCALE), None),  # what Hugging Face's tokenizers return
        ((IDS, MASK), {"scale": SCALE}),
        ({"ids": IDS}, {"mask": MASK}),
    ],
)
def test_examples_are_what_the_model_is_called_with(inputs: object, kwargs: dict | None) -> None:
    torch.manual_seed(0)
    model = TwoInputs()
    args, named = arguments_of(model, inputs, kwargs)
    size = couple(model, inputs, kwargs)["a.weight"].size
    example = {**dict(zip(("ids", "mask"), args, strict=False)), **named}
    fp.global_prune(model, sparsity=0.5, granularity="channel", example_inputs=example)
    small = shrink(model, inputs, kwargs=kwargs)
    assert (size, small.a.out_features) == (6, 3)
    torch.testing.assert_close(small(*args, **named), model(*args, **named))


def test_no_example_is_an_error() -> None:
    for call in (couple, shrink):
        with pytest.raises(
            TypeError,
            match="example_inputs should be what the model is called with: a tensor, a tuple of arguments or a dict",
        ):
            call(TwoInputs(), None)


@pytest.mark.parametrize("fails", [False, True])
def test_exporting_leaves_torchs_settings_as_they_were(fails: bool) -> None:
    config = getattr(torch.fx, "config", None)
    if not hasattr(config, "do_not_emit_stack_traces"):
        pytest.skip("a setting of newer versions of torch")
    seen: list[bool] = []

    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(config.do_not_emit_stack_traces)
            if fails:
                raise RuntimeError("here")
            return super().forward(x)

    with pytest.raises(RuntimeError, match="here") if fails else contextlib.nullcontext():
        program_of(nn.Sequential(Looks(3, 4), nn.Linear(4, 2)), (torch.randn(2, 3),), {}, training=False)
    assert seen[0]
    assert not config.do_not_emit_stack_traces


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_of_an_operator_that_has_the_arguments_it_needs(name: str) -> None:
    spaces = [torch.ops.aten]
    with contextlib.suppress(ImportError):
        importlib.import_module("torchvision")  # which registers its operators
        spaces.append(torch.ops.torchvision)
    packets = [getattr(space, n) for space in spaces for n in (name, f"{name}_") if hasattr(space, n)]
    if not packets and len(spaces) == 1:
        pytest.skip("torchvision's")
    given = [{"x", *(a.name for a in getattr(p, o)._schema.arguments)} for p in packets for o in p.overloads()]
    assert any(required_by(RULES[name]) <= names for names in given)


def test_an_overload_without_a_rules_arguments_freezes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    reading = read(model, (torch.randn(2, 3),), {}, {**RULES, "relu": lambda walk, x, exponent: x})
    assert reading.unknown == {"relu": 1}
    assert coupling_of(reading).groups == ()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(2, *shape)) for shape in ((8, 16), (16, 8)))
        self.register_buffer("ends", torch.tensor([2, 6], dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(torch.relu(torch._grouped_mm(x, self.up, self.ends)), self.down, self.ends)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="an operator of newer versions of torch")
def test_matrices_of_experts_lose_their_inner_width() -> None:
    """Torch multiplies rows by groups in float32 and below, so the proof is in float32; of 16 bytes, and no others."""

    torch.manual_seed(0)
    model, x = Experts(), torch.randn(6, 8)
    coupling = couple(model, x)
    assert {group.name: group.size for group in coupling.groups} == {"up": 16}
    keep = {"up": torch.arange(16) < 8}
    small = shrink(model, x, masks=channel_masks(coupling, keep, dict(model.named_parameters())))
    assert (small.up.shape, small.down.shape) == ((2, 8, 8), (2, 8, 8))
    assert [group.multiple for group in coupling.groups] == [4]
    again = Coupling.from_dict(json.loads(json.dumps(coupling.to_dict())))
    assert [group.multiple for group in again.groups] == [4]
    for words in (
        {"sparsity": 0.35},
        {"sparsity": 0.35, "allocation": "layer"},
        {"sparsity": 0.35, "cost": "parameters"},
    ):
        pruned = copy.deepcopy(model)
        report = fp.global_prune(pruned, granularity="channel", coupling=coupling, include="*", **words)
        (layer,) = report.layers
        assert layer.why.endswith("a multiple of 4") and layer.pruned in (4, 8)
        assert torch.allclose(shrink(pruned, x)(x), pruned(x), atol=1e-5)
    words = {"granularity": "channel", "coupling": coupling, "include": "*", "round_to": 6}
    report = fp.global_prune(copy.deepcopy(model), sparsity=0.3, **words)
    assert report.layers[0].units - report.layers[0].pruned == 12
    half = fp.couple(copy.deepcopy(model).bfloat16(), x.bfloat16())
    assert [group.multiple for group in half.groups] == [8]


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="an operator of newer versions of torch")
def test_multiples_that_operators_take_hold_after_a_shrink_too() -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(6, 8)
    words = {"granularity": "channel", "example_inputs": x, "include": "*"}
    pruner = fp.Pruner(model, "magnitude", 0.7, rounds=2, schedule="linear", **words)
    pruner.step()
    small = shrink(model, x, pruner=pruner)
    assert small.up.shape[-1] == 12
    pruner.step()
    assert shrink(small, x).up.shape[-1] == 4


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="an operator of newer versions of torch")
def test_a_channel_that_is_read_twice_fills_twice_its_place() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.down = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 16, 8))
            self.register_buffer("ends", torch.tensor([2, 6], dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            return torch._grouped_mm(torch.cat([hidden, torch.relu(hidden)], -1), self.down, self.ends)

    torch.manual_seed(0)
    model, x = Doubled(), torch.randn(6, 8)
    coupling = couple(model, x)
    assert [(group.name, group.size, group.multiple) for group in coupling.groups] == [("first.weight", 8, 2)]
    fp.global_prune(model, sparsity=0.3, granularity="channel", coupling=coupling, include="*")
    assert shrink(model, x).first.out_features == 6
