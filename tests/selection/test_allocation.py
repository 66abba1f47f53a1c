"""How sparsity is shared out: every allocation counts exactly, keeps its bounds and nests; rules by their formulas."""

from itertools import pairwise, product

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_net import X, build
from torch import nn

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of
from torch_flowprune.selection.rules.comparable_scores import NORMALIZERS, comparable
from torch_flowprune.selection.rules.layer_shares import LayerUnits, counted_exactly, er, erk
from torch_flowprune.selection.rules.rounding import rounded

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch_flowprune.LayerCollapseWarning", "ignore::torch_flowprune.TiedScoresWarning"
)
ALLOCATIONS = {
    "global": {"normalize": None},
    "layer": {"allocation": "layer"},
    "er": {"allocation": "er"},
    "erk": {"allocation": "erk"},
    "lamp": {"allocation": "lamp"},
    "isomorphic": {"allocation": "isomorphic", "normalize": None},
    "mean": {"normalize": "mean"},
    "max": {"normalize": "max"},
    "l2": {"normalize": "l2"},
    "function": {"allocation": lambda layers, sparsity: {layer.name: sparsity for layer in layers}},
    "capped": {"max_sparsity": 0.8, "normalize": None},
    "kept": {"min_keep": {"0*": 2}, "normalize": None},
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 16, 16)
    )


def kept(model):
    return {name: mask.flatten(1).any(1) if mask.dim() > 1 else mask for name, mask in fp.masks(model).items()}


@pytest.mark.parametrize("name", ALLOCATIONS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(sparsity=st.floats(0, 0.75), granularity=st.sampled_from(["weight", "filter"]))
def test_every_allocation_removes_exactly_as_many(name, sparsity, granularity):
    model = net()
    report = fp.global_prune(model, "magnitude", sparsity, granularity=granularity, **ALLOCATIONS[name])
    wanted = (
        sum(round(sparsity * layer.units) for layer in report.layers)
        if name == "layer"
        else round(sparsity * report.units)
    )
    assert report.pruned == wanted
    for layer in report.layers:
        assert layer.units - layer.pruned >= (granularity == "filter"), "nothing is emptied"
        if name == "capped":
            assert layer.sparsity <= 0.8 + 1e-9
        if name == "kept" and layer.name == "0.weight":
            assert layer.units - layer.pruned >= 2
        assert layer.why


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_rounds_nest_and_end_where_one_call_does(name, granularity):
    """Magnitudes do not move, so rounds are one call taken apart (but for rankings relative to what is left)."""
    stepwise, before = net(), {}
    for sparsity in (0.2, 0.45, 0.7):
        fp.global_prune(stepwise, "magnitude", sparsity, granularity=granularity, **ALLOCATIONS[name])
        after = fp.masks(stepwise)
        assert all((after[key] <= mask).all() for key, mask in before.items())
        before = after
    rounds = net()
    report = fp.global_prune(
        rounds, "magnitude", 0.7, granularity=granularity, rounds=3, schedule="linear", **ALLOCATIONS[name]
    )
    once = net()
    same = fp.global_prune(once, "magnitude", 0.7, granularity=granularity, **ALLOCATIONS[name])
    assert report.pruned == same.pruned
    if name in ("global", "isomorphic", "layer", "er", "erk", "function", "capped", "kept"):
        assert all(torch.equal(mask, fp.masks(once)[key]) for key, mask in fp.masks(rounds).items())


GIVEN = {
    "more than early rounds take": {"2*": 0.7},
    "two layers": {"0": 0.25, "2*": 0.8},
    "nothing of one": {"0": 0.0},
    "almost all of one": {"2": 0.95},
}


def rounds_of(kind, sparsity, rounds, schedule, **options):
    """After each round: what is gone of each layer, and the masks."""
    model, gone, masks = net(), [], []
    if kind == "pruner":
        pruner = fp.Pruner(model, "magnitude", sparsity, rounds=rounds, schedule=schedule, **options)
        while not pruner.done:
            goal, report = pruner.next_sparsity, pruner.step()
            assert options.get("round_to") or report.pruned == round(goal * report.units)
            gone.append([layer.pruned for layer in report.layers])
            masks.append({name: mask.clone() for name, mask in fp.masks(model).items()})
    else:
        report = fp.global_prune(model, "magnitude", sparsity, rounds=rounds, schedule=schedule, **options)
        gone.append([layer.pruned for layer in report.layers])
    assert all(
        torch.equal(after[name] & mask, after[name]) for now, after in pairwise(masks) for name, mask in now.items()
    )
    return report, gone


@pytest.mark.parametrize("kind", ["pruner", "rounds of one call"])
@pytest.mark.parametrize("allocation", GIVEN.values(), ids=GIVEN)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sparsity=st.floats(0.5, 0.7),
    rounds=st.integers(1, 6),
    schedule=st.sampled_from(["linear", "exponential", "cubic", "paper"]),
    granularity=st.sampled_from(["weight", "filter"]),
)
def test_shares_of_layers_follow_the_schedule_as_the_total_does(
    kind, allocation, sparsity, rounds, schedule, granularity
):
    """After every round a layer has come as much of its way as the model has."""
    options = {"granularity": granularity, "allocation": allocation}
    report, gone = rounds_of(kind, sparsity, rounds, schedule, **options)
    assert report.pruned == round(sparsity * report.units)
    for pattern, share in allocation.items():
        i = next(i for i, layer in enumerate(report.layers) if layer.name.startswith(pattern[0]))
        assert gone[-1][i] == round(share * report.layers[i].units)
        for counts in gone:
            assert abs(counts[i] - gone[-1][i] * sum(counts) / report.pruned) <= len(gone)


@pytest.mark.parametrize("allocation", [{"0": 0.25, "2": 0.5}, {"0": 0.25, "2": 0.5, "5": 0.75}], ids=["two", "all"])
def test_a_pruner_takes_shares_without_a_total(allocation):
    _, gone = rounds_of("pruner", None, 3, "linear", granularity="filter", allocation=allocation)
    assert gone == [[1, 3, 4 * ("5" in allocation)], [2, 7, 8 * ("5" in allocation)], [3, 10, 12 * ("5" in allocation)]]


@pytest.mark.parametrize("kind", ["pruner", "rounds of one call"])
@pytest.mark.parametrize("name", [*ALLOCATIONS, *GIVEN])
@pytest.mark.parametrize(("rounds", "schedule"), [(4, "linear"), (7, "cubic")])
def test_rounds_smaller_than_a_multiple_end_as_near_as_one_call_does(kind, name, rounds, schedule):
    """A width rounded down has lost more than its round asks for, and the next round waits for the schedule."""
    options = {"granularity": "filter", "round_to": 4} | ALLOCATIONS.get(name, {"allocation": GIVEN.get(name)})
    report, gone = rounds_of(kind, 0.5, rounds, schedule, **options)
    assert abs(report.pruned - report.units / 2) <= 4
    for counts in gone:
        widths = [layer.units - count for layer, count in zip(report.layers, counts, strict=True)]
        assert all(width % 4 == 0 for width in widths)
    model = net()
    fp.global_prune(model, "magnitude", 0.5, **options)
    with pytest.raises(ValueError, match="is already at sparsity|takes .* units from the layers it names"):
        fp.global_prune(model, "magnitude", 0.1, **options)


@pytest.mark.parametrize("name", [name for name in ALLOCATIONS if name != "kept"])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_the_order_of_the_layers_decides_nothing_but_ties(name, granularity):
    layers = {key: module for key, module in net().named_modules() if hasattr(module, "weight")}
    masks = []
    for order in (list(layers), list(reversed(layers))):
        model = nn.ModuleDict({f"layer{key}": layers[key] for key in order})
        fp.global_prune(model, "magnitude", 0.5, granularity=granularity, **ALLOCATIONS[name])
        masks.append({key: mask.clone() for key, mask in fp.masks(model).items()})
        fp.remove(model)
        layers = {key: module for key, module in net().named_modules() if hasattr(module, "weight")}
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][key]) for key, mask in masks[0].items())


@pytest.mark.parametrize("granularity", ["filter", "channel"])
def test_the_default_empties_nothing_and_zero_says_otherwise(granularity):
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    options = {"granularity": granularity, "example_inputs": torch.randn(2, 3, 8, 8), "normalize": None}
    report = fp.global_prune(model, "magnitude", 0.5, **options)
    first = report.layers[0]
    assert (first.units - first.pruned, first.why) == (1, "held at 1 by one unit a layer")
    emptied = net()
    with torch.no_grad():
        emptied[0].weight.mul_(1e-3)
    report = fp.global_prune(emptied, "magnitude", 0.5, min_keep=0, **options)
    assert report.layers[0].pruned == report.layers[0].units


def test_single_weights_have_no_floor_of_their_own():
    assert fp.global_prune(net(), "magnitude", 1.0).sparsity == 1


def test_a_layer_under_a_tenth_is_named():
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    text = r"less than a tenth is left of 2.weight \(1 of 20\): .*normalize='mean'"
    with pytest.warns(fp.LayerCollapseWarning, match=text):
        fp.global_prune(model, "magnitude", 0.4, granularity="filter", normalize=None)


def plain_erk(layers, sparsity, dims):
    """Evci et al.: a density of ε·Σ/Π of the dimensions, layers above 1 dense, ε by bisection."""
    raw = {one.name: sum(one.shape[:dims]) / torch.tensor(one.shape[:dims]).prod().item() for one in layers}
    low, high = 0.0, 1e9
    for _ in range(300):
        middle = (low + high) / 2
        left = sum(min(1.0, middle * raw[one.name]) * one.units for one in layers)
        low, high = (middle, high) if left < (1 - sparsity) * sum(one.units for one in layers) else (low, middle)
    return {one.name: 1 - min(1.0, low * raw[one.name]) for one in layers}


LAYERS = [
    LayerUnits("stem", (64, 3, 7, 7), 64 * 3 * 49),
    LayerUnits("body", (128, 64, 3, 3), 128 * 64 * 9),
    LayerUnits("point", (256, 128, 1, 1), 256 * 128),
    LayerUnits("head", (1000, 256), 256000),
]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(("rule", "dims"), [(er, 2), (erk, 4)])
def test_erdos_renyi_against_the_formula_written_out(rule, dims, sparsity):
    assert rule(LAYERS, sparsity) == pytest.approx(plain_erk(LAYERS, sparsity, dims), abs=1e-6)


def test_lamp_against_the_formula_written_out():
    scores = torch.rand(30, dtype=torch.float64)
    plain = [float(s**2 / sum(t**2 for t in scores if t >= s)) for s in scores]
    assert NORMALIZERS["lamp"](scores).tolist() == pytest.approx(plain)
    with pytest.raises(ValueError, match="'lamp' squares scores, and these are signed"):
        NORMALIZERS["lamp"](torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("kind", ["mean", "max", "l2"])
def test_scores_are_divided_over_what_is_left(kind):
    scores, alive = torch.tensor([4.0, 100.0, 1.0, 3.0]), torch.tensor([True, False, True, True])
    left = scores[alive]
    by = {"mean": left.mean(), "max": left.max(), "l2": left.norm()}[kind]
    assert torch.allclose(comparable(scores, alive, NORMALIZERS[kind])[alive], left / by)
    assert torch.equal(comparable(torch.zeros(3), None, NORMALIZERS[kind]), torch.zeros(3))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_counts_add_up_within_their_bounds(data):
    least = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    most = [low + data.draw(st.integers(0, 9)) for low in least]
    shares = [data.draw(st.floats(0, 20)) for _ in least]
    total = data.draw(st.integers(sum(least), sum(most)))
    counts = counted_exactly(shares, total, least, most)
    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(least, counts, most, strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_widths_are_multiples_as_near_as_may_be(data):
    """A layer that may have any width keeps what it has: others are rounded next to it."""
    left = {str(i): data.draw(st.integers(1, 40)) for i in range(data.draw(st.integers(1, 4)))}
    multiples = {name: data.draw(st.sampled_from([1, 2, 4, 8])) for name in left}
    kept = {name: data.draw(st.integers(1, count)) for name, count in left.items()}
    made = rounded(kept, left, dict.fromkeys(left, 1), multiples)
    allowed = {
        name: [kept[name]] if step == 1 else [n for n in range(1, left[name] + 1) if n % step == 0 or n == left[name]]
        for name, step in multiples.items()
    }
    assert all(made[name] in allowed[name] for name in left)
    best = min(abs(sum(pick) - sum(kept.values())) for pick in product(*allowed.values()))
    assert abs(sum(made.values()) - sum(kept.values())) <= best + sum(multiples.values()) / 2


def test_round_to_keeps_multiples_through_the_whole_call():
    model = net()
    report = fp.global_prune(model, "magnitude", 0.5, granularity="filter", round_to=4, include=nn.Conv2d)
    assert [(layer.units - layer.pruned) % 4 for layer in report.layers] == [0, 0]
    assert abs(report.pruned - 16) <= 2
    assert "a multiple of 4" in report.layers[1].why
    with pytest.raises(ValueError, match="round_to=8 is for granularity='channel' and 'filter'"):
        fp.global_prune(net(), "magnitude", 0.5, round_to=8)


def test_every_output_gives_up_equally_much():
    """In a transposed layer outputs lie along the second axis."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ConvTranspose1d(6, 4, 3))
    fp.global_prune(model, "magnitude", 0.5, allocation="row")
    assert (~model[0].weight_mask).sum(1).tolist() == [4] * 6
    assert (~model[1].weight_mask).sum((0, 2)).tolist() == [9] * 4
    for target in parameters_of(model).values():
        if target.mask is not None:
            rows, mask = (t.movedim(target.output_axis, 0).flatten(1) for t in (target.parameter.abs(), target.mask))
            assert all(row[m].min() >= row[~m].max() for row, m in zip(rows, mask, strict=True))
    fp.global_prune(model, "magnitude", 0.75, scope="row")
    assert (~model[0].weight_mask).sum(1).tolist() == [6] * 6


def test_a_mapping_says_how_much_goes_from_layers_by_name():
    model = net()
    report = fp.global_prune(model, "magnitude", granularity="filter", allocation={"0": 0.25, "2*": 0.5})
    assert [layer.pruned for layer in report.layers] == [3, 10, 0]
    model = net()
    report = fp.global_prune(model, "magnitude", 0.5, granularity="filter", allocation={"0": 0.25})
    assert report.layers[0].pruned == 3
    assert report.pruned == 24


@pytest.mark.parametrize("allocation", ["layer", "er", "erk", "lamp", "global"])
@pytest.mark.parametrize("cost", ["flops", "parameters"])
def test_a_cost_is_met_by_every_allocation(allocation, cost):
    model = build()
    report = fp.global_prune(
        model, "magnitude", 0.4, granularity="channel", example_inputs=X, allocation=allocation, cost=cost
    )
    dense, left = getattr(report.dense, cost), getattr(report.left, cost)
    assert left <= 0.6 * dense
    small = fp.shrink(model, X)
    torch.testing.assert_close(small(X), model(X), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["pruner", "rounds of one call"])
@pytest.mark.parametrize("allocation", ["layer", "erk", "global"])
@pytest.mark.parametrize("round_to", [1, 4, 8])
@pytest.mark.parametrize(("rounds", "schedule"), [(3, "cubic"), (10, "linear")])
def test_a_cost_is_met_in_rounds_smaller_than_a_step(kind, allocation, round_to, rounds, schedule):
    """Widths overshoot a round's target by up to a multiple each, and the next round waits for the schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    options = {"granularity": "channel", "example_inputs": torch.randn(2, 3, 16, 16), "cost": "flops"}
    options |= {"allocation": allocation, "round_to": round_to}
    if kind == "pruner":
        pruner = fp.Pruner(model, "magnitude", 0.5, rounds=rounds, schedule=schedule, **options)
        while not pruner.done:
            report = pruner.step()
    else:
        report = fp.global_prune(model, "magnitude", 0.5, rounds=rounds, schedule=schedule, **options)
    assert report.left.flops <= 0.5 * report.dense.flops
    assert fp.global_prune(model, "magnitude", 0.5, **options).newly_pruned == 0
    if round_to < 8:  # of so small a net a step of eight everywhere is most of what went
        with pytest.raises(ValueError, match=r"what is pruned stays pruned: sparsity=0\.01 is lower"):
            fp.global_prune(model, "magnitude", 0.01, **options)


def test_equal_fractions_meet_a_target_of_flops():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    x = torch.randn(2, 3, 16, 16)
    report = fp.global_prune(
        model, "magnitude", 0.5, granularity="channel", scope="layer", cost="flops", example_inputs=x
    )
    shares = [layer.sparsity for layer in report.layers]
    assert max(shares) - min(shares) <= 1 / 16
    assert 0.4 < report.left.flops / report.dense.flops <= 0.5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"allocation": "erd"}, "allocation should be one of global, lamp, isomorphic, row, layer, er, erk, a mapping"),
        ({"allocation": "erk", "scope": "layer"}, "scope='layer' is short for allocation='layer': give one of the two"),
        ({"allocation": "lamp", "normalize": "mean"}, "leave normalize= out"),
        ({"normalize": "median"}, "normalize should be 'mean', 'max', 'l2', 'lamp', 'default' or None, got 'median'"),
        ({"round_to": 0}, "round_to should be a whole number of at least 1"),
        ({"max_sparsity": 1.5}, "max_sparsity should be a fraction of a layer's units"),
        ({"max_sparsity": {"9*": 0.5}}, "max_sparsity: '9\\*' matches no layer that is pruned; .*0.weight"),
        ({"max_sparsity": 0.3}, "24 of 48 units should be pruned, and at most .* can: max_sparsity= keep"),
        ({"allocation": {"2": 0.5, "0": 0.5, "5": 0.25}}, "gives every layer its sparsity, 0.4167 in all: leave"),
        ({"allocation": lambda layers, sparsity: {}}, "the allocation gave no sparsity for 0.weight, 2.weight"),
        ({"allocation": lambda layers, s: {one.name: 2.0 for one in layers}}, "gave 2.0 for '0.weight': expected"),
        ({"allocation": "row"}, "allocation='row' is for single weights"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_touched(options, text):
    model = net()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=text):
        fp.global_prune(model, "magnitude", 0.5, granularity="filter", **options)
    assert list(model.state_dict()) == before


def test_the_pruner_and_compare_take_all_of_it():
    pruner = fp.Pruner(net(), "magnitude", 0.5, rounds=2, granularity="filter", allocation="layer", round_to=2)
    pruner.step()
    report = pruner.step()
    assert all((layer.units - layer.pruned) % 2 == 0 for layer in report.layers)
    batch = (torch.randn(4, 3, 8, 8), torch.arange(4))
    found = fp.compare(net(), ["magnitude"], 0.5, batch, granularity="filter", normalize="mean", max_sparsity=0.75)
    assert found.outcomes[0].emptied == 0


def test_a_report_says_what_decided():
    report = fp.global_prune(cases.cnn(), "magnitude", 0.5, granularity="filter", allocation="layer")
    assert {layer.why for layer in report.layers} <= {"layer", "held at 1 by one unit a layer"}
    assert report.to_dict()["layers"][0]["why"]


@pytest.mark.parametrize(("granularity", "why"), [("filter", "scores by LAMP"), ("channel", "scores over their mean")])
@pytest.mark.parametrize("method", ["magnitude", "l1"])
def test_measures_of_weights_alone_are_made_comparable_between_layers(method, granularity, why):
    """By default, for widths: a layer of small weights gives up no more than its width says."""
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    report = fp.global_prune(model, method, 0.5, granularity=granularity, example_inputs=IMAGES)
    assert report.layers[0].why == f"global, {why}"
    assert 0.0 < report.layers[0].sparsity < 0.75


def test_filters_are_ranked_by_lamp_by_default_as_if_it_had_been_said():
    masks = []
    for options in ({}, {"normalize": "lamp"}, {"allocation": "lamp"}, {"allocation": "lamp", "normalize": "lamp"}):
        model = net()
        fp.global_prune(model, "magnitude", 0.5, granularity="filter", **options)
        masks.append(fp.masks(model))
    assert all(torch.equal(masks[0][name], other[name]) for other in masks[1:] for name in masks[0])


def test_other_measures_and_scores_of_ones_own_are_ranked_as_they_are():
    batch = (torch.randn(4, 3, 8, 8), torch.arange(4))
    for method in ("taylor", "loss_preservation", lambda theta: theta.norm(dim=-1)):
        report = fp.global_prune(net(), method, 0.5, granularity="filter", data=batch)
        assert {layer.why for layer in report.layers} <= {"global", "held at 1 by one unit a layer"}
    scores = dict(fp.scores(net(), "magnitude", granularity="filter").items())
    assert fp.global_prune(net(), sparsity=0.3, granularity="filter", scores=scores).layers[1].why == "global"


def test_scores_taken_first_are_pruned_with_as_the_call_would():
    first, second = net(), net()
    fp.global_prune(first, "magnitude", 0.5, granularity="filter")
    fp.global_prune(second, sparsity=0.5, scores=fp.scores(second, "magnitude", granularity="filter"))
    assert all(torch.equal(mask, fp.masks(second)[name]) for name, mask in fp.masks(first).items())


# -- kinds of layers ------------------------------------------


class Block(nn.Module):
    """Hidden units between two linear layers, beside a shortcut."""

    def __init__(self, width, hidden):
        super().__init__()
        self.rise, self.fall = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.fall(torch.relu(self.rise(x)))


class Mixed(nn.Module):
    """Two blocks of hidden units, small weights; and two kernels, large ones."""

    def __init__(self):
        super().__init__()
        self.kernels = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten())
        self.blocks = nn.Sequential(nn.Linear(6 * 16, 10), Block(10, 12), Block(10, 20), nn.Linear(10, 3))

    def forward(self, x):
        return self.blocks(self.kernels(x))


def mixed():
    torch.manual_seed(0)
    model = Mixed().eval()
    with torch.no_grad():
        for p in model.kernels.parameters():
            p.mul_(100)
    return model


IMAGES = torch.randn(2, 3, 8, 8)
HIDDEN = ("blocks.1.rise.weight", "blocks.2.rise.weight")


def lowest_of_kind(model, names, gone):
    """Which units of these layers stay, sorted in one list."""
    norms = {name: model.get_parameter(name).detach().flatten(1).norm(dim=1) for name in names}
    ranked = sorted((value, name, i) for name, row in norms.items() for i, value in enumerate(row.tolist()))
    out = {(name, i) for _, name, i in ranked[:gone]}
    return {name: torch.tensor([(name, i) not in out for i in range(len(row))]) for name, row in norms.items()}


def test_each_kind_is_ranked_by_itself_to_the_same_share():
    model, dense = mixed(), mixed()
    words = {"granularity": "channel", "example_inputs": IMAGES, "normalize": None}
    report = fp.global_prune(model, "magnitude", 0.5, allocation="isomorphic", **words)
    assert report.pruned == round(0.5 * report.units)
    layers = {layer.name: layer for layer in report.layers}
    gone = sum(layers[name].pruned for name in HIDDEN)
    assert gone == 16
    for name, stays in lowest_of_kind(dense, HIDDEN, gone).items():
        assert torch.equal(fp.masks(model)[name].any(1), stays)
    assert {layer.why for layer in report.layers} == {"isomorphic"}
    raw = mixed()
    fp.global_prune(raw, "magnitude", 0.5, **words)
    assert sum(int((~fp.masks(raw)[name].any(1)).sum()) for name in HIDDEN) > gone, "in one ranking the small ones go"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_kinds_go_alike_to_a_target_in_parameters(share):
    model = mixed()
    words = {"granularity": "channel", "example_inputs": IMAGES, "cost": "parameters"}
    report = fp.global_prune(model, "magnitude", share, allocation="isomorphic", **words)
    assert report.left.parameters <= (1 - share) * report.dense.parameters
    hidden = [layer for layer in report.layers if layer.name in HIDDEN]
    others = [layer for layer in report.layers if layer.name not in HIDDEN]
    shares = [sum(one.pruned for one in some) / sum(one.units for one in some) for some in (hidden, others)]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)
    fp.shrink(model, IMAGES)


def test_heads_of_a_transformer_are_one_kind_and_hidden_units_another():
    timm = pytest.importorskip("timm")
    model, x = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    report = fp.global_prune(model, "magnitude", 0.5, allocation="isomorphic", granularity="channel", example_inputs=x)
    for part in ("attn", "mlp"):
        layers = [layer for layer in report.layers if part in layer.name]
        assert sum(layer.pruned for layer in layers) == pytest.approx(0.5 * sum(layer.units for layer in layers), abs=1)


def test_weights_and_filters_have_kinds_by_their_kernels():
    for granularity in ("weight", "filter"):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 3)
        )
        report = fp.global_prune(model, "magnitude", 0.5, allocation="isomorphic", granularity=granularity)
        first, second, third, fourth = report.layers
        assert (second.sparsity, third.sparsity) == (0.5, 0.5)
        assert first.pruned + fourth.pruned == (first.units + fourth.units) / 2
