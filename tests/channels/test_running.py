"""What is foretold that a smaller model runs and holds is what it runs and holds; and tables of how long that takes."""

import json

import pytest
import torch
from channel_cases import CASES, coupled
from residual_net import X, build
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import torch_flowprune as fp
from torch_flowprune.channels.costs.latency_table import median_seconds
from torch_flowprune.channels.costs.operators import Call, Holding, Laid, Operand, most_held
from torch_flowprune.channels.group_masks import channel_masks
from torch_flowprune.channels.shrinking.removal import shrink
from torch_flowprune.scoring.candidates import channel_candidates

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")


# norms of a part of their channels are made of several operators, and are foretold as torch's one
_NORMS = ("norm over less", "norm of one group", "channels last norm", "residual width", "told in the code")
NARROWED = [name for name in CASES if any(words in name for words in _NORMS)]
WRITTEN = "multi-head attention of torch"
"""A module written for its sizes stands in its place: the same products, laid out otherwise."""

COPIES_LESS = "grouped queries, expanded"
"""Of the last head that is left a view does where of two a copy was made."""


def flops_of_run(run):
    """By torch's own counter."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.backends.mkldnn.flags(enabled=False),
    ):
        run()
    return float(counter.get_total_flops())


def flops_of(model, x):
    return flops_of_run(lambda: model(*x) if isinstance(x, tuple) else model(x))


def operations(runs, _device):
    """A clock without time."""
    return [flops_of_run(run) for run in runs]


def shapes_of(calls):
    """What each reads, however its code lays that out or spells its defaults; copies to lay out are left out."""
    seen = [(one.target, tree_leaves((one.args, one.kwargs))) for one in calls]
    read = [(target, [x.shape for x in leaves if isinstance(x, Laid)]) for target, leaves in seen]
    return sorted(one for one in read if "clone" not in one[0])


def kept_of(coupling):
    return {group.name: torch.arange(group.size) % 3 != 1 for group in coupling.groups}


@pytest.mark.parametrize("name", CASES)
def test_a_smaller_model_runs_and_holds_what_was_foretold(name):
    model, x, _ = coupled(CASES[name])
    known = fp.couple(model, x)
    keep = kept_of(known)
    small = shrink(model, x, masks=channel_masks(known, keep, dict(model.named_parameters())))
    found = fp.couple(small, x).costs
    if name == WRITTEN or name in NARROWED:
        assert known.costs.count("flops", keep) == found.count("flops", found.all)
        return
    assert shapes_of(known.costs.calls(keep)) == shapes_of(found.calls(found.all))
    foretold, held = known.costs.count("memory", keep), found.count("memory", found.all)
    assert foretold == held or (foretold > held and name == COPIES_LESS)


# lengths of packed sequences are values, which no call by itself can make up
@pytest.mark.parametrize("name", [name for name in CASES if name != "LSTM that reads packed sequences"])
def test_every_call_can_be_run_by_itself_at_any_size(name):
    """Its operations add up to those of the smaller model, counted on a run of it."""
    model, x, _ = coupled(CASES[name])
    known = fp.couple(model, x)
    keep = kept_of(known)
    small = shrink(model, x, masks=channel_masks(known, keep, dict(model.named_parameters())))
    table = fp.LatencyTable(timer=operations)
    assert table.milliseconds(known.costs.calls(keep), torch.device("cpu")) == 1e3 * known.costs.of(keep).flops
    with torch.no_grad():
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        assert known.costs.of(keep).flops == flops_of(small, x)
        torch.backends.mha.set_fastpath_enabled(fast)


def most_allocated(model, x):
    """By torch's profiler: what the allocator handed out at most, besides the model and its input."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, torch.no_grad():
        model(x)
    held, most = 0, 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


class Branches(nn.Module):
    """``a`` is read at last by a sum, long after it was made; ``b`` is let go before."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x):
        a = torch.relu(self.first(x))
        b = torch.tanh(self.second(a))
        b = b.exp().exp()
        c = a + b
        del a, b
        return self.third(c.neg()).view(-1, 2)


@pytest.mark.parametrize("inplace", [True, False])
def test_what_is_held_is_what_the_allocator_hands_out(inplace):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 32), nn.ReLU(inplace), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    for model in (plain, Branches()):
        x = torch.randn(16, 8)
        known = fp.couple(model.eval(), x).costs
        own = 4 * (sum(p.numel() for p in model.parameters()) + x.numel())
        assert known.count("memory", known.all) == own + most_allocated(model, x)


def test_a_graph_that_was_exported_holds_results_until_they_are_read_last():
    class Exported(nn.Module):
        """Reads a value while it is traced, which a recorder refuses."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            torch.ones(2).tolist()
            return self.b(torch.relu(self.a(x)))

    x = torch.randn(5, 4)
    known = fp.couple(Exported(), x).costs
    own = 4 * (24 + 6 + 18 + 3 + 20)
    assert own + 4 * 5 * 12 <= known.count("memory", known.all) <= own + 4 * 5 * 12 + 8


def test_the_most_that_is_held_by_hand():
    def one(made, freed, size):
        return Holding(Operand((size,), torch.float32, (0,)), made, freed)

    sizes = {"small": 1, "large": 10}
    held = [one(-1, 9, "small"), one(0, 2, "large"), one(2, 3, "large"), one(3, 9, "small"), one(1, 2, "small")]
    assert most_held(held, sizes) == 4 * (1 + 10 + 1)
    assert most_held([], sizes) == 0


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_tensors_are_laid_out_as_they_were_seen(order):
    made = Laid((2, 3, 4, 5), torch.float32, order).make(torch.device("cpu"))
    assert made.shape == (2, 3, 4, 5)
    assert sorted(range(4), key=lambda dim: -made.stride(dim)) == list(order)
    assert made.untyped_storage().nbytes() == 4 * 120
    assert 0.5 <= made.min() <= made.max() <= 1.5
    assert not Laid((3,), torch.int64, (0,)).make(torch.device("cpu")).any()


# -- a target in them ------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_latency_that_counts_operations_prunes_as_flops_do(share):
    first, second = build(), build()
    options = {"granularity": "channel", "example_inputs": X}
    table = fp.LatencyTable(timer=operations, multiple=1)
    report = fp.global_prune(first, "magnitude", share, cost=table, **options)
    same = fp.global_prune(second, "magnitude", share, cost="flops", **options)
    assert report.pruned == same.pruned
    assert all(torch.equal(mask, fp.masks(second)[name]) for name, mask in fp.masks(first).items())


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_target_of_memory_is_what_the_smaller_model_holds(share):
    model = build()
    dense = fp.couple(model, X).costs
    fp.global_prune(model, "magnitude", share, cost="memory", granularity="channel", example_inputs=X)
    small = fp.couple(fp.shrink(model, X), X).costs
    assert small.count("memory", small.all) <= (1 - share) * dense.count("memory", dense.all)
    found = next(iter(channel_candidates(model, X).values())).costs
    assert found.count("memory", {}) == small.count("memory", small.all)


def test_a_pruner_measures_an_operator_once_and_keeps_what_it_measured(tmp_path):
    path, measured = tmp_path / "latency.json", []

    def timer(runs, device):
        measured.append(len(runs))
        return [1e-9 * (1000 + flops) for flops in operations(runs, device)]

    options = {"rounds": 3, "schedule": "linear", "granularity": "channel", "example_inputs": X}
    pruner = fp.Pruner(build(), "magnitude", 0.5, cost=fp.LatencyTable(path, timer=timer), **options)
    while not pruner.done:
        pruner.step()
    kept = json.loads(path.read_text())
    assert kept["device"].startswith("cpu, ")
    assert set(measured) == {len(fp.couple(build(), X).costs.operators)}
    before = list(measured)
    again = fp.Pruner(build(), "magnitude", 0.5, cost=fp.LatencyTable(path, timer=timer), **options)
    while not again.done:
        again.step()
    assert measured == before
    assert len(kept["milliseconds"]) > measured[0]
    assert not list(tmp_path.glob("*.new"))


def test_widths_are_measured_at_multiples(tmp_path):
    net = nn.Sequential(nn.Linear(4, 320), nn.ReLU(), nn.Linear(320, 4)).eval()
    path = tmp_path / "latency.json"
    table = fp.LatencyTable(path, timer=lambda runs, device: [run().numel() * 1e-6 for run in runs], multiple=16)
    fp.global_prune(net, "magnitude", 0.3, cost=table, granularity="channel", example_inputs=torch.randn(2, 4))
    widths = {int(text.split("[2x")[1].split("]")[0]) for text in table.known if "relu" in text}
    assert len(widths) > 2
    assert all(width % 16 == 0 for width in widths)


def test_a_word_is_enough():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()
    options = {"granularity": "channel", "example_inputs": torch.randn(2, 3, 32, 32)}
    report = fp.global_prune(model, "magnitude", 0.3, cost="latency", **options)
    assert 0 < report.pruned < report.units


@pytest.mark.parametrize("text", ["", "[]", '{"device": "cpu"}', '{"device": "cpu", "milliseconds": {"a": "b"}}'])
def test_what_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="should be a table that LatencyTable wrote, JSON with 'device'"):
        fp.LatencyTable(path)


def test_a_table_of_another_device_is_refused_where_something_would_be_measured(tmp_path):
    path, call = tmp_path / "latency.json", Call("aten.relu.default", (Laid((3,), torch.float32, (0,)),), {})
    path.write_text(json.dumps({"device": "a phone", "milliseconds": {str(call): 2.0}}))
    table = fp.LatencyTable(path)
    assert table.milliseconds([call, call], torch.device("cpu")) == 4.0
    other = Call("aten.relu.default", (Laid((4,), torch.float32, (0,)),), {})
    with pytest.raises(ValueError, match=r"was measured on a phone, and the model is on cpu, .*: name another file"):
        table.milliseconds([other], torch.device("cpu"))


@pytest.mark.parametrize("multiple", [0, -1, 2.0, True])
def test_a_multiple_is_a_whole_number(multiple):
    with pytest.raises(ValueError, match="multiple should be a whole number of at least 1"):
        fp.LatencyTable(multiple=multiple)


def test_the_clock_runs_all_in_turn_five_times_or_more():
    seen = []
    seconds = median_seconds([lambda: seen.append(0), lambda: seen.append(1)], torch.device("cpu"))
    assert len(seconds) == 2
    assert all(0 <= one < 1 for one in seconds)
    assert len(seen) >= 12
    assert seen == [0, 1] * (len(seen) // 2)


def test_a_call_is_handed_what_the_one_before_made():
    relu = Call("aten.relu.default", (Laid((3,), torch.float32, (0,)),), {})
    add = Call("aten.add.Tensor", (Laid((3,), torch.float32, (0,)), Laid((3,), torch.float32, (0,))), {"alpha": 2})
    run, handed = add.ready(torch.device("cpu")), torch.tensor([100.0, 200.0, 300.0])
    first = run(handed)
    assert torch.equal(run(handed), first)
    assert (first > handed).all() and (first < handed + 4).all()
    other = relu.ready(torch.device("cpu"))(torch.ones(4))
    assert other.shape == (3,)


def test_of_one_operator_at_several_places_the_mean_is_kept():
    call = Call("aten.relu.default", (Laid((3,), torch.float32, (0,)),), {})
    table = fp.LatencyTable(timer=lambda runs, device: [0.001, 0.003])
    assert table.milliseconds([call, call], torch.device("cpu")) == pytest.approx(4.0)
    assert table.known == {str(call): pytest.approx(2.0)}


@pytest.mark.parametrize("cost", ["latency", "memory"])
def test_what_cannot_be_reached_is_said_in_its_unit(cost):
    made = fp.LatencyTable(timer=operations, multiple=1) if cost == "latency" else cost
    unit = r"ms of latency" if cost == "latency" else r"bytes of memory"
    with pytest.raises(
        ValueError, match=rf"at most .* of the model's [\d.,e+]+ {unit} can be removed, and 99\.9% should"
    ):
        fp.global_prune(build(), "magnitude", 0.999, cost=made, granularity="channel", example_inputs=X)
    with pytest.raises(ValueError, match=f"cost='{cost}' decides how much is pruned from each layer"):
        fp.global_prune(
            build(), "magnitude", 0.5, cost=cost, granularity="channel", example_inputs=X, allocation={"stem*": 0.5}
        )


def test_parts_that_are_all_empty_are_joined():
    """A detector that detects nothing joins nothing."""

    class Detects(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            scores = self.head(self.body(x).relu())
            found = [scores[i][scores[i] > 1e9] for i in range(2)]
            return scores, torch.cat(found)

    assert fp.couple(Detects(), torch.ones(2, 4))["body.weight"].size == 8
