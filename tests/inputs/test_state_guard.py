"""Scoring leaves a model, its data and every source of randomness as they were.

When it works, when it is refused, when the model raises.
"""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torch_flowprune as fp

pytestmark = pytest.mark.filterwarnings("ignore:spectral.weight is parametrized")


class Net(nn.Module):
    """Everything a sweep could leave a trace on.

    Batch statistics, dropout, a frozen layer, own buffers, hooks, mixed modes.
    """

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.frozen, self.fc = nn.Linear(16, 6), nn.Linear(6, 3)
        self.spectral = nn.utils.parametrizations.spectral_norm(
            nn.Linear(6, 6)
        )  # its power iteration writes buffers in train mode
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", None)
        self.raise_at = None

    def forward(self, x):
        self.calls += 1
        self.last = x.mean().detach()
        noise = torch.rand(1).item() + random.random() + np.random.rand()
        if self.raise_at is not None and int(self.calls) >= self.raise_at:
            raise ArithmeticError("in the middle")
        x = torch.relu(self.bn(self.conv(x))).flatten(1)
        return self.fc(self.spectral(torch.tanh(self.frozen(self.drop(x))))) + 0 * noise


def build(pruned=False):
    torch.manual_seed(1)
    model = Net()
    model.frozen.requires_grad_(False)
    model.train()
    model.bn.eval()
    model.drop.register_forward_hook(lambda *args: None)
    model.fc.weight.register_hook(lambda grad: None)
    model.fc.register_full_backward_hook(lambda *args: None)
    x, y = torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    F.cross_entropy(model(x), y).backward()
    model.bn.bias.grad = None
    if pruned:
        fp.global_prune(model, sparsity=0.3, include="*")
    return model


class Expanded(nn.Module):
    """Buffers of which one value is in many places; after them one that a failing restore would lose."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(1).expand(4))
        self.register_buffer("table", torch.arange(3.0).view(3, 1).expand(3, 4))
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x):
        with torch.no_grad():
            self.shift.add_(1)
            self.table[:, :1].add_(1)
        return self.fc(x) * self.scale + self.shift + self.table[0]


def test_expanded_buffers_are_put_back():
    model = Expanded()
    before = {name: (buffer, buffer.clone(), buffer.stride()) for name, buffer in model.named_buffers()}
    fp.scores(model, "loss_preservation", (torch.randn(6, 8), torch.arange(6) % 4))
    assert [name for name, _ in model.named_buffers()] == list(before)
    for name, (buffer, value, stride) in before.items():
        assert getattr(model, name) is buffer
        assert torch.equal(buffer, value)
        assert buffer.stride() == stride


def test_all_buffers_are_there_again_where_one_cannot_be_written():
    model = Expanded()

    def forward(x):
        model._buffers["table"].data = torch.ones(2)  # another shape: its value cannot be copied back
        return model.fc(x)

    model.forward = forward
    with pytest.raises(RuntimeError):
        fp.scores(model, "loss_preservation", (torch.randn(6, 8), torch.arange(6) % 4))
    assert list(model._buffers) == ["scale", "table", "shift"]


def loader():
    x, y = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(2)), torch.arange(10) % 3
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))


def trace(model, data):
    """Everything that could change, as values and as identities."""
    modules = list(model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": [
            (name, id(p), p.requires_grad, p._version, None if p.grad is None else (id(p.grad), p.grad.clone()))
            for name, p in model.named_parameters()
        ],
        "parameter hooks": [list((p._backward_hooks or {}).items()) for p in model.parameters()],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "empty buffers": [[key for key, value in module._buffers.items() if value is None] for module in modules],
        "modules": [(id(module), type(module), module.training, sorted(module.__dict__)) for module in modules],
        "hooks": [[list(getattr(module, kind).items()) for kind in hooks] for module in modules],
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "loader": data.generator.get_state() if isinstance(data, DataLoader) else None,
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "threads": torch.get_num_threads(),
        "sdp": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
    }


def assert_equal(one, other, path=""):
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_equal(one[key], other[key], f"{path} / {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path} [{i}]")
    else:
        assert one == other, path


def everything(mode):
    """Samples have no gradients of their own under batch statistics."""
    return ("g", "g2", "Hg", "x2", "diagH") if mode == "train" else ("g", "g2", "g2_sample", "Hg", "x2", "diagH")


X = torch.zeros(1, 1, 4, 4)
CALLS = {
    "flow": lambda model, data, **options: fp.flow(model, data, needs=everything(options.get("mode")), **options),
    "flow of one batch": lambda model, data, **options: fp.flow(
        model, next(iter([(X.expand(3, 1, 4, 4), torch.arange(3))])), needs=everything(options.get("mode")), **options
    ),
    "flow of frozen": lambda model, data, **options: fp.flow(model, data, parameters=["frozen.weight"], **options),
    "flow cut short": lambda model, data, **options: fp.flow(model, data, max_samples=7, **options),
    "synflow": lambda model, data, **options: fp.flow(model, data, needs=("gR",), example_inputs=X, **options),
    "scores": lambda model, data, **options: fp.scores(
        model, ["magnitude", "fisher", "grasp", "synflow"], data, **options
    ),
    "filter scores": lambda model, data, **options: fp.scores(model, "taylor", data, granularity="filter", **options),
    "importance_scores": lambda model, data, **options: fp.importance_scores(model, "grasp", data, **options),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
every_mode = pytest.mark.parametrize("mode", ["eval", "train"])


@every_call
@every_mode
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_after_a_score(call, mode, pruned):
    model, data = build(pruned), loader()
    before = trace(model, data)
    call(model, data, mode=mode)
    assert_equal(before, trace(model, data))


@every_call
@every_mode
@pytest.mark.parametrize("after", [1, 2, 4])
def test_after_the_model_raised(call, mode, after):
    """At the first forward, in the first sweep, and in the second."""
    model, data = build(), loader()
    model.raise_at = int(model.calls) + after
    before = trace(model, data)
    try:
        call(model, data, mode=mode)
    except ArithmeticError as error:
        assert str(error) == "in the middle"
    else:
        assert after > 1, "the model did not raise"
    assert_equal(before, trace(model, data))


def test_random_scores_draw_from_torchs_generator_and_leave_no_other_trace():
    model, data = build(), loader()
    torch.manual_seed(0)
    before = trace(model, data)
    fp.scores(model, ["random", "grasp"], data)
    after = trace(model, data)
    assert not torch.equal(before.pop("torch"), after.pop("torch"))
    assert_equal(before, after)


BAD = {
    "mode": ({"mode": "test"}, ValueError),
    "temperature": ({"temperature": 0}, ValueError),
    "loss of many numbers": ({"loss": lambda x, y: x}, ValueError),
    "loss of nan": ({"loss": lambda x, y: F.cross_entropy(x, y) * float("nan")}, ValueError),
    "loss that raises": ({"loss": lambda x, y: 1 / 0}, ZeroDivisionError),
    "detached loss": ({"loss": lambda x, y: F.cross_entropy(x.detach(), y)}, ValueError),
    "theta0": ({"theta0": {}}, ValueError),
    "max_samples": ({"max_samples": 0}, ValueError),
    "closure and loss": ({"closure": lambda m, b: m(b[0]).sum(), "loss": F.cross_entropy}, ValueError),
}


@pytest.mark.parametrize(("options", "error"), BAD.values(), ids=BAD)
@pytest.mark.parametrize(
    "call",
    [CALLS["scores"], CALLS["importance_scores"], lambda model, data, **options: fp.flow(model, data, **options)],
)
def test_after_a_bad_argument(call, options, error):
    model, data = build(), loader()
    before = trace(model, data)
    with pytest.raises(error):
        call(model, data, **options)
    assert_equal(before, trace(model, data))


@pytest.mark.parametrize("data", [None, [], 3, [torch.zeros(2)]], ids=repr)
@pytest.mark.parametrize("method", ["taylor", "grasp", "nonsense"])
def test_after_bad_data(data, method):
    model = build()
    before = trace(model, data)
    with pytest.raises((ValueError, TypeError)):
        fp.scores(model, method, data)
    assert_equal(before, trace(model, data))


def test_after_data_that_raise():
    model, good = build(), loader()

    class Broken:
        def __iter__(self):
            yield from good
            raise OSError("disk")

    before = trace(model, good)
    with pytest.raises(OSError, match="disk"):
        fp.scores(model, "grasp", Broken())
    after = trace(model, good)
    (
        before.pop("loader"),
        after.pop("loader"),
    )  # not the data's own generator: nothing but the iterable itself was handed in
    assert_equal(before, after)


def test_a_failed_prune_leaves_what_scoring_does():
    model, data = build(), loader()
    model.raise_at = int(model.calls) + 3
    before = trace(model, data)
    with pytest.raises(ArithmeticError):
        fp.global_prune(model, "grasp", 0.5, data=data, rounds=3)
    assert_equal(before, trace(model, data))


def test_a_prune_by_scores_changes_only_what_it_prunes():
    model, data = build(), loader()
    before = trace(model, data)
    fp.global_prune(model, "grasp", 0.9, data=data, rounds=2, include="conv")
    fp.remove(model)
    after = trace(model, data)
    for one in (before, after):
        one["state"].pop("conv.weight")
        one["parameters"] = [row for row in one["parameters"] if row[0] != "conv.weight"]
    assert_equal(before, after)


def test_under_no_grad_and_inference_mode():
    for guard in (torch.no_grad, torch.inference_mode):
        model, data = build(), loader()
        expected = fp.scores(model, "grasp", data)
        with guard():
            before = trace(model, data)
            found = fp.scores(model, "grasp", data)
            assert_equal(before, trace(model, data))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_results_are_free_of_the_graph_and_of_the_model():
    model, data = build(), loader()
    point = fp.flow(model, data, needs=(*everything("eval"), "gR"), example_inputs=X)
    for kind in (*everything("eval"), "gR"):
        for value in getattr(point, kind).values():
            assert not value.requires_grad
            assert value.grad_fn is None
    assert not any(value.requires_grad for value in fp.scores(model, "grasp", data).values())
    assert type(point.loss) is float


class Counted(nn.Linear):
    """Counts how often it is put into a mode, in the way of its own that it has or is given."""

    modes = ()

    def count(self, mode=True):
        self.modes = (*self.modes, mode)
        return nn.Module.train(self, mode)


class Caching(Counted):
    train = Counted.count


@pytest.mark.parametrize("how", ["class", "instance", "none"])
def test_only_modules_with_modes_of_their_own_are_put_into_eval_mode_for_every_batch(monkeypatch, how):
    layer = Caching(4, 3) if how == "class" else Counted(4, 3)
    if how == "instance":
        layer.train = layer.count
    model = nn.Sequential(layer).eval()
    layer.modes, calls = (), []
    plain = nn.Module.train
    monkeypatch.setattr(nn.Module, "eval", lambda module: calls.append(module) or module.train(False))
    data = [(torch.randn(2, 4), torch.tensor([0, 1])) for _ in range(5)]
    fp.flow(model, data, needs=("g",))
    assert nn.Module.train is plain
    assert len(calls) == (0 if how == "none" else 7)  # before the first batch and each, and back as it was
    assert layer.modes.count(False) == (0 if how == "none" else 7)
    assert not model.training
    assert not layer.training


def test_a_closure_that_leaves_the_model_in_train_mode_is_no_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    data = [(torch.randn(2, 4), torch.tensor([0, 1])) for _ in range(4)]

    def closure(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        model.train()
        return loss

    found, expected = fp.flow(model, data, needs=("g",), closure=closure), fp.flow(model, data, needs=("g",))
    assert all(torch.equal(found.g[name], expected.g[name]) for name in expected.g)
    assert not any(module.training for module in model.modules())
