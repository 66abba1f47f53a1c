"""Targets in parameters and FLOPs: what is foretold is what the shrunk model has, and no unit goes that need not."""

import copy
import json

import pytest
import torch
from channel_cases import CASES, coupled
from residual_net import DATA, Residual, X, build
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torch_flowprune as fp
from torch_flowprune.channels.counting.counting import costs_of
from torch_flowprune.channels.coupling import coupling_of, reading_of
from torch_flowprune.channels.group_masks import channel_masks
from torch_flowprune.channels.shrinking.removal import shrink
from torch_flowprune.cli.commands import main
from torch_flowprune.masking import put_masks


def parameters(model, _=None):
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model, x):
    """By torch's own counter, from a real run.

    Attention in products of matrices, as not every version counts the kernels that fuse it.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(model).eval()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


MEASURED = {"parameters": parameters, "flops": flops}


def costs(model, x):
    reading = reading_of(model, x)
    coupling = coupling_of(reading)
    every = {group.name: torch.ones(group.size, dtype=torch.bool) for group in coupling.groups}
    every |= {branch.name: torch.ones(1, dtype=torch.bool) for branch in coupling.branches}
    return coupling, costs_of(reading, coupling, model, every)


@pytest.mark.parametrize("name", CASES)
def test_what_is_foretold_is_what_the_smaller_model_has(name):
    model, x, _ = coupled(CASES[name])
    coupling, known = costs(model, x)
    assert (known.dense.parameters, known.dense.flops) == (parameters(model), flops(model, x))
    keep = {group.name: torch.arange(group.size) % 3 != 1 for group in coupling.groups}
    small = shrink(model, x, masks=channel_masks(coupling, keep, dict(model.named_parameters())))
    found = known.of(keep)
    assert (found.parameters, found.flops) == (parameters(small), flops(small, x))
    assert (found.parameters < known.dense.parameters) is bool(coupling.groups)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_mambaout", "resnet18"])
def test_of_models_people_have(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=7).eval(), torch.randn(2, 3, 64, 64)
    if "vit" in name:
        model.set_input_size((64, 64))
    coupling, known = costs(model, x)
    assert (known.dense.parameters, known.dense.flops) == (parameters(model), flops(model, x))
    keep = {group.name: torch.arange(group.size) >= group.size // 2 for group in coupling.groups}
    small = shrink(model, x, masks=channel_masks(coupling, keep, dict(model.named_parameters())))
    assert known.of(keep) == fp.Size(parameters(small), flops(small, x))


@pytest.mark.parametrize(
    ("equation", "shapes"), [("bij,bjk->bik", ((2, 3, 4), (2, 4, 5))), ("...j,kj->...k", ((2, 3, 4), (5, 4)))]
)
def test_operations_of_an_einsum(equation, shapes):
    class Einsum(nn.Module):
        def forward(self, a, b):
            return torch.einsum(equation, a, b)

    inputs = tuple(map(torch.randn, shapes))
    reading = reading_of(Einsum(), inputs)
    assert costs_of(reading, coupling_of(reading), Einsum(), {}).dense.flops == 2 * 2 * 3 * 4 * 5


# -- as few units as it takes ------------------------------------------


def fewest_by_hand(method, share, cost, **options):
    """One unit more at a time, shrunk and counted, until the target is met."""
    allowed = (1 - share) * MEASURED[cost](build(), X)
    for k in range(14):
        model = build()
        fp.global_prune(model, method, amount=k, granularity="channel", data=DATA, min_keep=options.get("min_keep", 1))
        if MEASURED[cost](fp.shrink(model, X), X) <= allowed:
            return k, fp.masks(model)
    return None


@pytest.mark.parametrize("cost", ["parameters", "flops"])
@pytest.mark.parametrize(
    ("method", "share", "options"),
    [
        ("magnitude", 0.5, {}),
        ("taylor", 0.25, {}),
        ("loss_preservation", 0.9, {}),
        ("random", 0.0, {}),
        ("magnitude", 0.5, {"min_keep": 4}),
    ],
)
def test_the_fewest_units_in_the_order_of_their_scores(cost, method, share, options):
    if method == "random":
        options = options | {"generator": torch.Generator().manual_seed(0)}
    model = build()
    dense = {name: measured(model, X) for name, measured in MEASURED.items()}
    report = fp.global_prune(model, method, sparsity=share, granularity="channel", data=DATA, cost=cost, **options)
    small = fp.shrink(model, X)
    assert MEASURED[cost](small, X) <= (1 - share) * dense[cost]
    k, by_hand = fewest_by_hand(method, share, cost, **options)
    assert report.pruned == k
    assert fp.masks(model).keys() == by_hand.keys()
    assert all(torch.equal(mask, by_hand[name]) for name, mask in fp.masks(model).items())
    assert (report.dense, report.left) == (fp.Size(**dense), fp.Size(parameters(small), flops(small, X)))
    if "min_keep" in options:
        assert min(small.stem.out_channels, small.inner.out_channels) >= 4


def test_rounds_end_at_the_target_and_rise_to_it(monkeypatch):
    left = []

    def applied(model, targets, given):
        put_masks(model, targets, given)
        left.append(parameters(fp.shrink(model, X)))

    monkeypatch.setattr("torch_flowprune.pruning.single_round.put_masks", applied)
    model = build()
    dense = parameters(model)
    report = fp.global_prune(
        model, "taylor", 0.6, granularity="channel", data=DATA, cost="parameters", rounds=3, schedule="linear"
    )
    assert [count <= (1 - share) * dense for count, share in zip(left, (0.2, 0.4, 0.6), strict=True)] == [True] * 3
    assert left[0] > 0.6 * dense
    assert report.left.parameters == left[-1]


def test_amounts_are_of_what_is_left():
    model = build()
    dense = parameters(model)
    first = fp.global_prune(
        model, amount=0.3, granularity="channel", example_inputs=X, cost="parameters"
    ).left.parameters
    assert 0.5 * dense < first <= 0.7 * dense
    second = fp.global_prune(
        model, amount=100, granularity="channel", example_inputs=X, cost="parameters"
    ).left.parameters
    assert first - 250 < second <= first - 100


def test_an_amount_that_is_met_exactly_takes_no_unit_more():
    three = fp.global_prune(build(), amount=3, granularity="channel", example_inputs=X)
    freed = three.dense.parameters - three.left.parameters
    options = {"granularity": "channel", "example_inputs": X, "cost": "parameters"}
    assert [fp.global_prune(build(), amount=freed + more, **options).pruned for more in (-1, 0, 1)] == [3, 3, 4]


def test_the_same_target_again_is_met_already_and_a_lower_one_is_an_error():
    model = build()
    options = {"granularity": "channel", "example_inputs": X, "cost": "flops"}
    before = fp.global_prune(model, sparsity=0.5, **options)
    again = fp.global_prune(model, sparsity=0.5, **options)
    assert again.newly_pruned == 0
    assert again.left == before.left
    with pytest.raises(
        ValueError,
        match=r"already at sparsity 0\.5\d+ of its flops, and what is pruned stays pruned: sparsity=0.1 is lower",
    ):
        fp.global_prune(model, sparsity=0.1, **options)


def test_channels_that_went_before_count_whether_or_not_they_are_chosen_now():
    model = build()
    fp.global_prune(model, amount=4, granularity="channel", example_inputs=X, include="inner")
    report = fp.global_prune(
        model, sparsity=0.6, granularity="channel", example_inputs=X, exclude="inner", cost="parameters"
    )
    small = fp.shrink(model, X)
    assert small.inner.out_channels == 2
    assert report.left.parameters == parameters(small) <= 0.4 * parameters(build())
    assert report.dense.parameters == parameters(build())


def test_fixed_scores_a_comparison_and_a_pruner_take_a_cost_too():
    scored = fp.scores(build(), "taylor", DATA, granularity="channel")
    ours, theirs, round_by_round = build(), build(), build()
    fp.global_prune(ours, scores=scored, sparsity=0.5, example_inputs=X, cost="flops")
    report = fp.global_prune(theirs, "taylor", 0.5, granularity="channel", data=DATA, cost="flops")
    assert all(torch.equal(mask, fp.masks(theirs)[name]) for name, mask in fp.masks(ours).items())
    (outcome,) = fp.compare(build(), ["taylor"], [0.5], DATA, granularity="channel", cost="flops").outcomes
    assert outcome.sparsity == report.sparsity
    pruner = fp.Pruner(
        round_by_round, "taylor", sparsity=0.5, rounds=2, granularity="channel", cost="flops", example_inputs=X
    )
    for goal in pruner.goals:
        pruner.track(DATA)
        assert pruner.step().left.flops <= (1 - goal) * report.dense.flops
    resumed = fp.Pruner(
        round_by_round,
        sparsity=0.75,
        rounds=2,
        schedule="linear",
        granularity="channel",
        cost="flops",
        example_inputs=X,
    )
    assert 0.6 < resumed.goals[0] < 0.7


# -- what cannot be ------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"sparsity": 0.99},
            (
                r"at most 9\d\.\d% of the model's 1,\d+ parameters can be removed, and 99\.1% should: it can be "
                r"reduced to \d+ parameters, and 11 parameters were asked for"
            ),
        ),
        (
            {"sparsity": 0.9, "min_keep": 3},
            (
                r"Most of what stays is in stem\.weight \(81\), inner\.weight \(81\), outer\.weight \(81\); "
                r"print\(fp\.couple"
            ),
        ),
        (
            {"sparsity": 0.5, "allocation": {"stem*": 0.5}},
            "cost='parameters' decides how much is pruned from each layer, .* allocation=.*: give one of the two",
        ),
        (
            {"sparsity": 0.5, "granularity": "filter"},
            "it removes whole channels and blocks only: pass granularity='channel' or 'block', or leave",
        ),
        (
            {"sparsity": 0.5, "cost": "macs"},
            "cost should be one of units, parameters, flops, memory, latency, or a LatencyTable",
        ),
        ({"sparsity": 1.5}, r"sparsity=1\.5 should be from 0\.0 to 1\.0"),
        ({}, "give sparsity= .* or amount="),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_touched(options, text):
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        fp.global_prune(
            model, "magnitude", **{"granularity": "channel", "example_inputs": X, "cost": "parameters", **options}
        )
    assert model.state_dict().keys() == before.keys()
    assert type(model.stem) is nn.Conv2d


def test_a_model_without_operations_has_no_share_of_them():
    model = nn.Sequential(nn.Embedding(7, 6), nn.ReLU(), Summed())
    options = {
        "granularity": "channel",
        "example_inputs": torch.randint(7, (3, 4)),
        "parameters": [(model[0], "weight")],
    }
    with pytest.raises(
        ValueError, match="the model has no flops that are counted: convolutions, matrix products and attention are"
    ):
        fp.global_prune(model, sparsity=0.5, cost="flops", **options)
    assert fp.global_prune(model, sparsity=0.5, cost="parameters", **options).pruned == 3


class Summed(nn.Module):
    def forward(self, x):
        return x.sum(-1)


def test_all_that_can_go_goes_where_just_that_is_asked_for():
    model = Residual().eval()
    smallest = 27 + 2 + (9 + 1) + 2 + (9 + 1) + 2 + 1 * 4 + 4  # of 1174
    report = fp.global_prune(model, sparsity=0.948, granularity="channel", example_inputs=X.float(), cost="parameters")
    assert parameters(fp.shrink(model, X.float())) == smallest == report.left.parameters
    with pytest.raises(ValueError, match="can be removed, and"):  # allows 60.46 of them
        fp.global_prune(
            Residual().eval(), sparsity=0.9485, granularity="channel", example_inputs=X.float(), cost="parameters"
        )


# -- what is said of it ------------------------------------------


def test_the_report_says_what_shrink_leaves():
    report = fp.global_prune(build(), sparsity=0.5, granularity="channel", example_inputs=X, min_keep=1)
    dense, left = report.dense, report.left
    share = f"{left.parameters / dense.parameters:.2%}"
    assert f"shrink leaves {left.parameters:,} of {dense.parameters:,} ({share}) parameters, {left.flops:,} of" in str(
        report
    )
    assert json.loads(json.dumps(report.to_dict()))["left"] == {"parameters": left.parameters, "flops": left.flops}
    report = fp.global_prune(build(), sparsity=0.5)
    assert report.dense is report.left is None
    assert "shrink" not in str(report)


@pytest.mark.filterwarnings("ignore:less than a tenth:torch_flowprune.LayerCollapseWarning")
def test_the_command_line_takes_a_cost(capsys, tmp_path):
    pytest.importorskip("timm")
    out = tmp_path / "report.json"
    command = [
        "prune",
        "test_resnet",
        "--random-init",
        "--num-classes",
        "5",
        "--granularity",
        "channel",
        "--cost",
        "flops",
        "--sparsity",
        "0.5",
    ]
    assert main([*command, "--report", str(out)]) == 0
    found = json.loads(out.read_text())
    assert 0.4 * found["dense"]["flops"] < found["left"]["flops"] <= 0.5 * found["dense"]["flops"]
    assert "shrink leaves" in capsys.readouterr().out


class Recurrent(nn.Module):
    def __init__(self, layer, outputs):
        super().__init__()
        self.embed, self.layer = nn.Linear(5, 8), layer
        self.head = nn.Sequential(nn.Linear(outputs, 7), nn.ReLU(), nn.Linear(7, 4))

    def forward(self, x):
        found = self.layer(self.embed(x))
        return self.head(found[0] if isinstance(found, tuple) else found)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported", "ignore:TF32 acceleration")
@pytest.mark.parametrize(
    ("layer", "outputs"),
    [
        (nn.LSTM(8, 6, 2, bidirectional=True), 12),
        (nn.LSTM(8, 6, proj_size=3, batch_first=True), 3),
        (nn.GRU(8, 6, 2), 6),
        (nn.RNN(8, 6, nonlinearity="relu"), 6),
        (nn.LSTMCell(8, 6), 6),
        (nn.GRUCell(8, 6), 6),
        (nn.RNNCell(8, 6), 6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_recurrent_layers_are_counted(layer, outputs):
    """By hand: every matrix once a position; and by torch's counter, without the kernels that it does not see into."""
    x = torch.randn(3, 2, 5) if isinstance(layer, nn.RNNBase) else torch.randn(4, 5)
    model = Recurrent(layer, outputs).eval()
    report = fp.global_prune(model, "magnitude", 0.0, granularity="channel", example_inputs=x)
    by_hand = sum(2 * (x.numel() // 5) * p.numel() for p in model.parameters() if p.dim() == 2)
    assert report.dense.flops == by_hand
    with torch.backends.mkldnn.flags(enabled=False):
        assert report.dense.flops == flops(model, x)
