"""A coupling given to the calls: read once and used by all of them, or written by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.channels import coupling as reader

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
BATCH = (X, torch.arange(12) % 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def readings(monkeypatch):
    """How many times a model was read."""
    seen = []
    monkeypatch.setattr(reader, "read", lambda *args, real=reader.read: seen.append(1) or real(*args))
    return seen


CALLS = {
    "scores": lambda model, **words: fp.scores(model, "taylor", BATCH, granularity="channel", **words),
    "compare": lambda model, **words: fp.compare(
        model, "taylor", [0.2, 0.5], BATCH, granularity="channel", **words
    ).to_dict(),
    "diagnose": lambda model, **words: fp.diagnose(model, [BATCH, BATCH], granularity="channel", **words).to_dict(),
    "units": lambda model, **words: prune(model, 0.5, **words),
    "flops": lambda model, **words: prune(model, 0.5, cost="flops", **words),
    "rounds": lambda model, **words: prune(model, 0.5, rounds=3, **words),
}


def prune(model, sparsity, **words):
    return fp.global_prune(model, "taylor", sparsity, data=BATCH, granularity="channel", **words).to_dict()


@pytest.mark.parametrize("call", CALLS)
def test_a_coupling_read_before_gives_what_reading_gives(call, readings):
    fresh, given = CALLS[call](net()), net()
    coupling = fp.couple(given, X)
    readings.clear()
    found = CALLS[call](given, coupling=coupling)
    assert readings == []
    if call == "scores":
        assert all(torch.equal(found[name], value) for name, value in fresh.items())
    else:
        assert found == fresh


def test_a_coupling_of_the_dense_model_serves_the_pruned_one():
    """And one read off a pruned model counts what the dense model costs."""
    model = net()
    coupling = fp.couple(model, X)
    prune(model, 0.3, coupling=coupling)
    again = fp.couple(model, X)
    report = prune(model, 0.6, coupling=coupling)
    assert report["dense"] == {
        "parameters": sum(p.numel() for p in net().parameters()),
        "flops": 12 * 2 * (60 + 80 + 24),
    }
    assert again.costs.dense == coupling.costs.dense
    small = fp.shrink(model, X, coupling=coupling)
    assert sum(p.numel() for p in small.parameters()) == report["left"]["parameters"]


class Sorted(nn.Module):
    """An operator without a rule: nothing can be removed of it but by who knows better."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)).sort(0).values)


def by_hand():
    units = torch.arange(4)
    slices = (("a.weight", 0, "producer"), ("a.bias", 0, "affine"), ("b.weight", 1, "consumer"))
    return fp.Coupling((fp.Group("hidden", tuple(fp.Slice(name, axis, units, role) for name, axis, role in slices)),))


def test_a_coupling_written_by_hand_is_pruned_and_shrunk():
    torch.manual_seed(0)
    model = Sorted()
    scores = fp.scores(model, "taylor", BATCH, granularity="channel", coupling=by_hand())["hidden"]
    report = prune(model, 0.5, coupling=by_hand())
    kept = fp.masks(model)["a.weight"].any(1)
    assert torch.equal(kept, scores > scores.sort().values[1])
    assert report["dense"] is None
    small = fp.shrink(model, X, coupling=by_hand())
    torch.testing.assert_close(small(X), model(X))
    assert small.a.out_features == 2


def test_a_pruner_by_a_coupling_written_by_hand():
    model = Sorted()
    pruner = fp.Pruner(model, "taylor", 0.5, rounds=2, granularity="channel", coupling=by_hand())
    while not pruner.done:
        F.cross_entropy(model(X), BATCH[1]).backward()
        pruner.track()
        pruner.step()
    assert int(fp.masks(model)["a.weight"].any(1).sum()) == 2


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        ({"coupling": by_hand()}, ValueError, "is for granularity='channel' and 'block', got granularity='weight'"),
        (
            {"coupling": by_hand(), "granularity": "channel"},
            ValueError,
            "group 'hidden' has a slice of 'a.weight', and",
        ),
        ({"coupling": 3, "granularity": "channel"}, TypeError, "coupling should be what fp.couple gives"),
    ],
)
def test_a_coupling_that_does_not_fit(words, error, text):
    with pytest.raises(error, match=text):
        fp.global_prune(net(), "magnitude", 0.5, **words)


def test_of_a_coupling_written_by_hand_no_cost_is_known():
    with pytest.raises(ValueError, match="a coupling written by hand has no costs"):
        prune(Sorted(), 0.5, coupling=by_hand(), cost="flops")


def test_a_coupling_that_was_read_is_the_same_and_saved_alike():
    """What a slice finds out when it is used is no part of it."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    coupling = fp.couple(model, torch.ones(2, 4))
    before = coupling.to_dict()
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", coupling=coupling)
    assert coupling.to_dict() == before


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_coupling_of_a_wrapped_model_is_that_of_the_model(wrap):
    model = net()
    coupling = fp.couple(wrap(model), X)
    assert [group.name for group in coupling.groups] == [group.name for group in fp.couple(model, X).groups]
    wrapped = wrap(model)
    fp.global_prune(wrapped, "magnitude", 0.5, granularity="channel", coupling=coupling)
    small = fp.shrink(wrapped, X, coupling=coupling)
    assert type(small) is type(wrapped)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
