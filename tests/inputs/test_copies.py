"""Copies of models: activations that were kept, forwards that were patched."""

import copy
import functools

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.inputs import copied_model


class Keeps(nn.Module):
    """What it computed stays in a list, a dict or an object."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way, self.kept = nn.Linear(6, 8), nn.Linear(8, 3), way, None

    def forward(self, x):
        h = torch.relu(self.a(x))
        self.kept = self.way(h)
        return self.b(h)


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


WAYS = {"tensor": lambda h: h, "list": lambda h: [h, h], "dict": lambda h: {"maps": (h, 1)}, "object": Held}


@pytest.mark.parametrize("way", WAYS)
def test_models_that_keep_activations_are_read_pruned_and_shrunk(way):
    model, x = Keeps(WAYS[way]), torch.randn(4, 6)
    model(x).sum().backward()
    assert [group.size for group in fp.couple(model, x).groups] == [8]
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    model(x).sum().backward()
    small = fp.shrink(model, x)
    assert small.a.out_features == 4
    torch.testing.assert_close(small(x), model(x))


def patched_by_closure(layer, log):
    forward = layer.forward

    @functools.wraps(forward)
    def timed(x):
        log.append(len(x))
        return forward(x)

    layer.forward = timed


def test_a_patched_forward_runs_the_copys_own_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x, log = torch.randn(4, 6), []
    patched_by_closure(model[4], log)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    small = fp.shrink(model, x)
    small(x).sum().backward()
    assert small[4].weight.grad is not None
    assert model[4].weight_orig.grad is None
    assert small[4].in_features < 16
    before = len(log)
    torch.testing.assert_close(small(x), model(x))
    assert len(log) == before + 2, "the user's log goes on"


def test_what_a_closure_holds_besides_is_shared():
    layer, counts = nn.Linear(2, 2), {"calls": 0}

    def counted(x):
        counts["calls"] += 1
        return nn.Linear.forward(layer, x)

    layer.forward = counted
    again = copied_model(layer)
    again(torch.ones(1, 2)), layer(torch.ones(1, 2))
    assert counts["calls"] == 2
    with torch.no_grad():
        again.weight.zero_(), again.bias.zero_()
    assert not again(torch.ones(1, 2)).any()
    assert layer(torch.ones(1, 2)).any()


def test_what_is_not_patched_is_copied_as_it_would_be():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.note = copied_model
    again = copied_model(model)
    assert again.note is copied_model
    assert str(copy.deepcopy(model)) == str(again)
    assert torch.equal(again[0].weight, model[0].weight)
    assert again[0].weight is not model[0].weight


def test_a_hook_that_closes_over_its_module_writes_to_the_copys():
    class Logs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(3, 2), []

            def note(module, args, output):
                self.seen.append(output.shape)

            self.layer.register_forward_hook(note)

        def forward(self, x):
            self.layer(x)
            return x * len(self.seen)

    model, x = Logs(), torch.ones(1, 3)
    new = copied_model(model)
    assert torch.equal(new(x), x)
    assert (len(new.seen), len(model.seen)) == (1, 0)
