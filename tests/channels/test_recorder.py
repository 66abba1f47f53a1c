"""What one forward shows of a model.

The graph that `torch.export` gives, no trace, and no graph where values decide.
"""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from channel_cases import CASES, coupled
from torch import Tensor, nn
from torch.distributions import Categorical

import torch_flowprune as fp
from torch_flowprune.channels.coupling import couple, coupling_of
from torch_flowprune.channels.rules.table import RULES
from torch_flowprune.channels.tracing.exported_program import program_of, twin
from torch_flowprune.channels.tracing.labelled_graph import read, trace
from torch_flowprune.channels.tracing.nodes import module_path, operator_name
from torch_flowprune.channels.tracing.onlookers import without_onlookers
from torch_flowprune.channels.tracing.paths import UnrecordableError
from torch_flowprune.channels.tracing.recorder import recorded
from torch_flowprune.inputs import tree_leaves


@dataclass
class Scored:
    """What people give in place of a tuple."""

    logits: Tensor


ELSEWHERE = torch.randn(4)


class Net(nn.Module):
    """Two layers with something done in between to what the first gives."""

    def __init__(self, middle: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(4))
        self.constant, self.held = torch.ones(4), {"in a dict": [torch.ones(4)]}
        self.middle = [middle]  # in a list, as a function is no submodule

    def forward(self, x: Tensor) -> Any:
        return self.last(self.middle[0](self, self.first(x)))


def traced(middle: Callable[[Net, Tensor], Any], training: bool = False) -> Any:
    return recorded(twin(Net(middle)), (torch.randn(2, 3),), {}, training)[0]


# torch.export cannot read the lengths of packed sequences, and does not say whose code divides by a number of channels
TOLD = [name for name in CASES if "told in the code" in name or "OwnRMSNorm" in name]
NOT_BY_EXPORT = ("LSTM that reads packed sequences", *TOLD)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_BY_EXPORT])
def test_the_coupling_is_that_of_torch_export(name: str) -> None:
    model, x, found = coupled(CASES[name])
    assert trace(model, (x,), {}, False)[0].program is None
    exported = coupling_of(read(model, (x,), {}, RULES, program_of(model, (x,), {}, False)))
    assert found.to_dict() == exported.to_dict()
    assert found.unknown == exported.unknown


def test_the_graph_names_operators_as_they_were_called_modules_and_sizes() -> None:
    traced, _ = recorded(
        twin(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU()))), (torch.randn(2, 3),), {}, training=False
    )
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert [(operator_name(n), module_path(n), tuple(n.meta["val"].shape)) for n in calls] == [
        ("linear", "0", (2, 4)),
        ("relu", "1.0", (2, 4)),
    ]
    assert list(traced.sources.values()) == [("parameter", "0.weight"), ("parameter", "0.bias")]
    assert all(node.meta["val"].is_meta for node in traced.graph.nodes if "val" in node.meta)


def test_attention_of_torch_is_read_through_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    names = {
        operator_name(n)
        for n in trace(layer, (torch.randn(2, 5, 8),), {}, False)[0].graph.nodes
        if n.op == "call_function"
    }
    assert "scaled_dot_product_attention" in names
    assert not any("encoder" in name for name in names)


@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_part_is_read_as_its_code(warm: bool) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(3, 4), torch.compile(nn.Linear(4, 5), backend="eager"), nn.Linear(5, 2)),
        torch.randn(2, 3),
    )
    if warm:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's compiler, about the Python it runs in
            net(x)
    assert {group.name: group.size for group in couple(net, x).groups} == {"0.weight": 4, "1._orig_mod.weight": 5}


def test_torchs_compiler_is_not_imported_for_a_first_coupling() -> None:
    """It would take a second, where a small model's graph takes a hundredth."""
    code = (
        "import sys, torch; from torch_flowprune.channels.coupling import couple; couple(torch.nn.Linear(3, 2), "
        "torch.ones(2, 3)); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def in_its_own_precision(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        return x.float() * 2


def test_what_the_code_does_in_a_precision_of_its_own_is_read_too() -> None:
    """`torch.export` makes one operator of it, which has no rule."""
    assert couple(Net(in_its_own_precision).eval(), torch.randn(2, 3)).unknown == {}


# -- no trace ------------------------------------------


class Traces(nn.Module):
    """Everything a forward could leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.never_called = nn.Linear(3, 3)  # sends the reading to the training graph too
        self.count, self.cache = 0, {}

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        x.add_(1)
        self.cache["last"] = self.drop(self.norm(self.layer(x)))
        random.random()
        np.random.rand()
        return self.cache["last"] + torch.rand(())


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(fails: bool) -> None:
    model, x = Traces(), torch.ones(4, 3)
    model.norm.eval()
    if fails:
        model.layer.register_forward_hook(lambda *_: 1 / 0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    if fails:
        with pytest.raises(UnrecordableError, match="ZeroDivisionError"):
            couple(model, x)
    else:
        couple(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (model.count, model.cache, model.training, model.norm.training) == (0, {}, True, False)
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert torch.equal(x, torch.ones(4, 3))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()
    if not fails:
        model.train()(x).sum().backward()  # nothing was made in inference mode that autograd would refuse


@cache
def grid(size: int) -> Tensor:
    return torch.ones(size) * 2


def test_what_the_code_caches_for_the_whole_program_can_be_differentiated() -> None:
    grid.cache_clear()
    net, x = Net(lambda net, x: x * grid(4)), torch.randn(2, 3)
    assert trace(net, (x,), {}, False)[0].program is None
    net(x).sum().backward()


# -- where values decide ------------------------------------------


def guarded(net: Net, x: Tensor) -> Tensor:
    try:
        return x * float(x.sum())
    except Exception:  # noqa: BLE001 - as code that wants to be robust does
        return x


def in_a_thread(net: Net, x: Tensor) -> Tensor:
    out: list[Tensor] = []
    worker = threading.Thread(target=lambda: out.append(x * 2))
    worker.start()
    worker.join()
    return out[0]


LOGGED: list[float] = []


def logged(net: Net, x: Tensor) -> Tensor:
    LOGGED.append(float(x.abs().mean()))
    return x


def checked(net: Net, x: Tensor) -> Tensor:
    if x.isnan().any():
        raise ValueError
    return x


VALUES = {
    "numpy": lambda net, x: x * float(x.numpy().sum()),
    "array": lambda net, x: x * float(np.asarray(x).sum()),
    "many": lambda net, x: x * sum(number.item() for number in x.repeat(40, 1).flatten()),
}
READ = {
    "kept for a log": (logged, 4),
    "a check": (checked, 4),
    "of the input": (lambda net, x: x * net.seen.sum().item(), 4),
    "a size": (lambda net, x: x * torch.ones(int(net.seen.argmax()) + 1, 1)[:1], 4),
    "a constant": (lambda net, x: x * net.constant.sum().item(), 4),
    "multiplied with": (lambda net, x: x * x.sum().item(), 4),
    "an average multiplied with": (lambda net, x: x * x.mean().item(), 0),
    "a list": (lambda net, x: x * x[0].tolist()[0], 0),
    "if, on the other path a softmax": (lambda net, x: x.softmax(-1) if x.sum() > 1e9 else x, 0),
    "if, on this path a softmax": (lambda net, x: x.softmax(-1) if x.sum() < 1e9 else x, 0),
    "a number that is far off": (lambda net, x: x.softmax(-1) if float(x.sum()) > 1e4 else x, 0),
    "if, both paths alike": (lambda net, x: -x if x.sum() > 0 else x, 4),
    "if in an if": (lambda net, x: (x.softmax(-1) if x.sum() > 1e9 else -x) if x.sum() > 1e8 else x, 0),
    "where rows are not zero": (lambda net, x: x[net.seen[:, 0].nonzero()[:, 0]], 4),
    "where channels are not zero": (lambda net, x: x * len(x.nonzero()), 0),
    "rows that a mask picks": (lambda net, x: x[net.seen[:, 0] >= 0], 4),
    "elements that a mask picks": (lambda net, x: x[x > -1e9][None, :1].expand(1, 4), 0),
}


@pytest.mark.parametrize("name", READ)
def test_a_number_that_is_read_costs_what_it_guards(name: str) -> None:
    f, units = READ[name]
    torch.manual_seed(0)
    net = Net(f).eval()
    net.register_forward_pre_hook(lambda net, args: setattr(net, "seen", args[0].abs()))
    assert [group.size for group in couple(net, torch.randn(2, 3)).groups] == ([units] if units else [])


def test_a_number_that_is_handed_out_costs_what_it_is_taken_of() -> None:
    class Averaged(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.first(x)
            return self.last(h), h.mean().item()

    net, x = Averaged(lambda net, x: x).double().eval(), torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        net.first.weight[0], net.first.bias[0], net.last.weight[:, 0] = 0, 0, 0
    small = fp.shrink(net, x)
    assert small.first.out_features == 3
    assert small(x)[1] == pytest.approx(net(x)[1], rel=1e-12)


def test_a_layer_that_did_not_run_where_values_decide_is_asked_for() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h, chosen = self.a(x), [int(i) for i in (x[:, 0] > 1e9).long()]
            return torch.stack([self.experts[i](row) for i, row in zip(chosen, h, strict=True)])

    with pytest.raises(UnrecordableError, match=r"values decide what runs .*give example_inputs on which all layers"):
        couple(Experts(), torch.randn(2, 3))


@pytest.mark.parametrize("flag", [True, False])
def test_a_layer_that_runs_by_neither_answer_stays_and_the_others_are_read(flag: bool) -> None:
    """Of a truth value both answers are tried, so that nothing else can run."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.never = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.other, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            h = torch.relu(self.b(h)) if bool((x.sum() > 1e9) == flag) else torch.relu(self.other(h))
            return self.head(h)

    torch.manual_seed(0)
    net, x = Either().double().eval(), torch.randn(2, 3, dtype=torch.float64)
    fp.global_prune(net, "magnitude", 0.5, granularity="channel", example_inputs=x)
    small = fp.shrink(net, x)
    assert small.b.weight.shape[0] == small.other.weight.shape[0] < 8
    assert small.never.weight.shape == (8, 8)
    for inputs in (x, x + 1e10):
        torch.testing.assert_close(small(inputs), net(inputs), rtol=1e-12, atol=1e-12)


def test_a_module_that_the_forward_moves_or_sets_is_the_same_one() -> None:
    """``module.to(dtype)`` asks whether two tensors are of a kind, which no value decides."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            self.b = self.b.to(x.dtype)
            return self.b(h)

    net, x = Cast(), torch.randn(2, 3)
    assert [group.size for group in couple(net, x).groups] == [8]


def test_a_layer_is_asked_for_that_the_other_answer_would_run_on_other_inputs() -> None:
    """With none picked the code fails, and tells nothing of inputs of which some are picked."""

    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.picked = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h, large = torch.relu(self.a(x)), x[:, 0] > 1e9
            out = self.b(h)
            if large.any():
                out = out + self.picked(h[large].amax(0))
            return out

    with pytest.raises(UnrecordableError, match=r"values decide what runs .*give example_inputs on which all layers"):
        couple(Picks(), torch.randn(2, 3))


OUTSIDE = {
    "a tensor of the program": lambda net, x: x + ELSEWHERE,
    "another thread": in_a_thread,
}
WRITES = {
    "a parameter": lambda net, x: x + net.first.bias.add_(1),
    "a view of a parameter": lambda net, x: x + net.first.bias[1:2].zero_(),
    "a constant": lambda net, x: x + net.constant.mul_(2),
    "a constant in a dict": lambda net, x: x + net.held["in a dict"][0].mul_(2),
    "out=": lambda net, x: torch.add(x[0], 1, out=net.constant),
}


@pytest.mark.parametrize("name", [*VALUES, *OUTSIDE, *WRITES])
def test_no_graph_is_handed_out_where_values_decide(name: str) -> None:
    says = (
        "hands out values|reads more than .* numbers"
        if name in VALUES
        else "from outside"
        if name in OUTSIDE
        else "writes to a parameter"
    )
    with pytest.raises(UnrecordableError, match=says):
        traced({**VALUES, **OUTSIDE, **WRITES}[name])


@pytest.mark.parametrize("name", WRITES)
def test_what_the_model_goes_on_with_is_not_written_to(name: str) -> None:
    model = Net(WRITES[name])
    kept = [model.first.bias, model.constant, model.held["in a dict"][0]]
    before = [tensor.detach().clone() for tensor in kept]
    with pytest.raises(UnrecordableError):
        recorded(twin(model), (torch.randn(2, 3),), {}, False)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


KNOWN = {
    "a constant": lambda net, x: x + net.constant,
    "a constant in a dict": lambda net, x: x * net.held["in a dict"][0],
    "a buffer": lambda net, x: x + net.calls,
    "numbers of numpy": lambda net, x: x + torch.from_numpy(np.ones(4, np.float32)),
    "numbers": lambda net, x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "a new tensor": lambda net, x: x + torch.arange(4),
    "indices": lambda net, x: x[:, torch.tensor([0, 1, 2, 3])],
    "sizes": lambda net, x: x if x.shape[0] == 2 else -x,
    "several results": lambda net, x: torch.cat(x.chunk(2, 1), 1),
    "written in place": lambda net, x: x.view(-1).relu_().view(2, 4),
}


@pytest.mark.parametrize("name", KNOWN)
def test_tensors_whose_origin_is_known_are_recorded(name: str) -> None:
    assert traced(KNOWN[name]).program is None


def test_an_output_in_which_no_tensors_are_found_is_refused() -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> Any:
            return threading.local() if x is None else type("Output", (), {"logits": super().forward(x)})()

    with pytest.raises(
        UnrecordableError, match=r"the model gives a Output, in which no tensors are found: .*use_cache=False"
    ):
        recorded(twin(Wrapped(lambda net, x: x)), (torch.randn(2, 3),), {}, False)


@pytest.mark.parametrize("holder", [Scored, lambda y: SimpleNamespace(y=y), lambda y: Categorical(logits=y)])
def test_an_output_that_has_its_tensors_in_attributes_is_read(holder: Callable[[Tensor], Any]) -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> Any:
            return holder(super().forward(x))

    model, x = Wrapped(lambda net, h: h).eval(), torch.randn(2, 3)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=x)
    small = fp.shrink(model, x)
    assert (small.first.out_features, small.last.out_features) == (2, 2)
    for expected, found in zip(tree_leaves(model(x)), tree_leaves(small(x)), strict=True):
        torch.testing.assert_close(found, expected)


def test_an_output_that_neither_way_can_read_is_named() -> None:
    """A tensor from outside leaves it to the export, whose own words are of pytrees."""

    class Wrapped(Net):
        def forward(self, x: Tensor) -> Any:
            return type("Output", (), {"logits": super().forward(x)})()

    with pytest.raises(UnrecordableError, match=r"the model gives a Output, in which no tensors are found"):
        trace(Wrapped(OUTSIDE["a tensor of the program"]).eval(), (torch.randn(2, 3),), {}, False)


def test_what_can_not_be_recorded_is_exported() -> None:
    graph = trace(Net(OUTSIDE["a tensor of the program"]).eval(), (torch.randn(2, 3),), {}, False)[0]
    assert graph.program is not None


def test_an_operator_over_functions_is_one_without_a_rule() -> None:
    """As an export makes of a part without gradients, where the recording fails."""

    class WithoutGradients(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.first(x) + ELSEWHERE
            return self.last(self.middle[0](self, h))

    coupling = couple(WithoutGradients(lambda net, x: x).eval(), torch.randn(2, 3))
    assert coupling.groups == ()
    assert coupling.costs.dense.parameters == sum(p.numel() for p in Net(lambda net, x: x).parameters())


def test_what_can_be_read_neither_way_is_said_in_a_line_with_its_statement() -> None:
    with pytest.raises(UnrecordableError, match=r"cannot be read off this model: numpy hands out values.*line \d+ of"):
        couple(Net(VALUES["numpy"]).eval(), torch.randn(2, 3))


def test_inputs_that_the_model_does_not_run_on_are_told_by_its_own_error() -> None:
    with pytest.raises(
        UnrecordableError, match=r"^the model does not run on the example inputs: RuntimeError: mat1"
    ) as e:
        couple(Net(lambda net, x: x).eval(), torch.randn(2, 7))
    assert len(str(e.value).splitlines()) == 1


LOOKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a mean that is kept": lambda o: o.mean(),
    "a mean that is read": lambda o: o.mean().item(),
    "an operator without a rule": lambda o: torch.histc(o, 5),
    "a question": lambda o: bool(o.isnan().any()),
    "statistics over channels": lambda o: o.softmax(1).var(1),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_a_hook_looks_at_binds_nothing(name: str) -> None:
    net, log = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval(), []
    x = torch.randn(2, 3, 8, 8)
    net[1].register_forward_hook(lambda module, args, output: log.append(LOOKS[name](output)))
    assert [group.size for group in couple(net, x).groups] == [8]


def test_code_that_writes_to_its_weights_is_read_by_export_and_freezes_them() -> None:
    """Where it does so without gradients, the export has an operator around that part that has no schema."""

    class Rescales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.a.weight.mul_(1.0)
            return self.b(self.a(x).relu())

    coupling = couple(Rescales().eval(), torch.randn(4, 3))
    assert coupling.groups == ()
    assert list(coupling.unknown) == ["wrap_with_set_grad_enabled"]


def filters() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval(), torch.randn(2, 3, 8, 8)


def test_hooks_that_look_run_once_and_see_the_model_that_they_were_made_for() -> None:
    """A sum over channels has the dense model's width: the smaller model is proved without it, and has the hook."""
    net, x = filters()
    seen, total = [], torch.zeros(8)
    net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))

    def add(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        total.add_(output.mean((0, 2, 3)))

    net[1].register_forward_hook(add, with_kwargs=True)
    net(x)
    once = total.clone()
    seen.clear()
    assert [group.size for group in couple(net, x).groups] == [8]
    assert len(seen) == 1
    torch.testing.assert_close(total, 2 * once)
    keep = torch.ones(8, 3, 3, 3, dtype=torch.bool)
    keep[:4], bias = False, torch.arange(8) > 3
    small = fp.shrink(net, x, masks={"0.weight": keep, "0.bias": bias})
    assert len(seen) == 2
    assert (small[0].out_channels, len(small[0]._forward_pre_hooks), len(small[1]._forward_hooks)) == (4, 1, 1)


def clamps(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.clamp(max=1e9)


def writes(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.clamp_(max=1e9)


def keeps(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    module.kept = output  # type: ignore[assignment]


@pytest.mark.parametrize("hook", [clamps, writes, keeps])
def test_hooks_that_may_change_something_are_read_along(hook: Callable[..., Any]) -> None:
    (net, x), log = filters(), []
    net[1].register_forward_hook(hook)
    assert without_onlookers(net, (x,), {}) is net
    net[1].register_forward_hook(lambda module, args, output: log.append(output.mean()))
    net[2].register_forward_hook(lambda module, args, output: log.append(output.mean()))
    assert [len(module._forward_hooks) for module in without_onlookers(net, (x,), {})] == [0, 1, 0]


def test_hooks_that_set_weights_or_that_the_forward_relies_on_are_read_along() -> None:
    net, x = filters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(net[0])
    assert without_onlookers(net, (x,), {}) is net

    class Gathers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.held = filters()[0], []
            self.layers[0].register_forward_hook(lambda module, args, output: self.held.append(output))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.held.clear()
            return self.layers(x) + self.held[0].mean()

    gathers = Gathers()
    assert without_onlookers(gathers, (x,), {}) is gathers
    assert couple(gathers, x).unknown == {}
    assert gathers.held == []


def test_a_head_that_is_idle_binds_all_the_same() -> None:
    """Its weights read what the trunk makes: it may be trained, and may be asked for later."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head, self.aside = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.trunk(x)
            self.kept = self.aside(h.relu()).mean()
            return self.head(h)

    group = couple(Heads(), torch.randn(2, 3))["trunk.weight"]
    assert {"head.weight", "aside.weight"} <= {part.parameter for part in group.slices}


class Rebuilds(nn.Module):
    def __init__(self, way: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(6, 8), nn.Linear(8, 3), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.way(self.a(x))))


REBUILT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "copy": copy.copy,
    "deepcopy": lambda t: copy.deepcopy(t.detach()),
    "set_": lambda t: torch.empty(0).set_(t.untyped_storage(), 0, t.shape, t.stride()),
}


@pytest.mark.parametrize("way", REBUILT)
def test_a_tensor_laid_over_the_same_memory_is_the_same(way: str) -> None:
    (group,) = couple(Rebuilds(REBUILT[way]), torch.randn(3, 6)).groups
    assert {part.parameter for part in group.slices} == {"a.weight", "a.bias", "b.weight"}


def test_a_copy_that_no_operator_made_is_an_error_with_its_statement() -> None:
    net = Rebuilds(lambda t: torch.empty(0).set_(t.untyped_storage().clone(), 0, t.shape, t.stride()))
    with pytest.raises(UnrecordableError, match=r"made of a copy of memory, .* use clone\(\), at line"):
        couple(net, torch.randn(3, 6))


def test_sizes_that_packed_sequences_are_read_with_are_not_tried_otherwise() -> None:
    """A kernel that is told another one reads past the end of memory."""

    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn, self.out = nn.Linear(3, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(self.a(x), lengths.cpu(), batch_first=True)
            return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])

    _, reads = recorded(twin(Packs()), (torch.randn(2, 5, 3), torch.tensor([5, 3])), {}, False)
    assert reads and all(read.is_size for read in reads)
    assert all(
        not read.is_size
        for read in recorded(twin(Net(lambda net, h: h * float(h.mean()))), (torch.randn(2, 3),), {}, False)[1]
    )


class Strided(nn.Module):
    """Computes its padding of whole numbers that it keeps in buffers, as audio codecs do."""

    def __init__(self, layers: int = 20) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, stride=1) for _ in range(layers))
        self.head = nn.Linear(4, 2)
        for name, value in {"stride": 1, "kernel": 3, "padding": 2}.items():
            self.register_buffer(name, torch.tensor(value), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            frames = torch.ceil((x.shape[-1] - self.kernel + self.padding) / self.stride + 1).to(torch.int64) - 1
            extra = frames * self.stride + self.kernel - self.padding - x.shape[-1]
            left, right = self.padding, torch.clamp(extra, min=0)
            if max(left, right) >= x.shape[-1]:
                x = nn.functional.pad(x, (0, int(left)))
            x = torch.relu(conv(nn.functional.pad(x, (int(left), int(right)))))
        return self.head(x.mean(-1))


def test_whole_numbers_that_the_model_holds_are_read_without_end() -> None:
    model, x = Strided(), torch.randn(2, 4, 30)
    assert len(couple(model, x).groups) == 20


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])  # bytes may be flags, and statistics change
def test_other_numbers_that_the_model_holds_may_change(dtype: torch.dtype) -> None:
    model = Strided(40)
    model.stride = model.stride.to(dtype)
    with pytest.raises(UnrecordableError, match="reads more than 64 numbers"):
        recorded(twin(model), (torch.randn(2, 4, 30),), {}, False)


def test_what_is_drawn_is_no_constant() -> None:
    class Drawing(Strided):
        def forward(self, x: Tensor) -> Tensor:
            self.stride = self.kernel - 2 + 0 * torch.randint(0, 2, ())
            return super().forward(x)

    with pytest.raises(UnrecordableError, match="reads more than 64 numbers"):
        recorded(twin(Drawing(40)), (torch.randn(2, 4, 30),), {}, False)


def test_a_count_that_decides_is_tried_both_ways() -> None:
    """How many steps were made, say: a whole number that the model holds, and that will be another."""

    class Warming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cold, self.warm = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)
            self.register_buffer("steps", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            return (self.cold if self.steps < 100 else self.warm)(self.first(x))

    (group,) = couple(Warming(), torch.randn(2, 3)).groups
    assert {part.parameter for part in group.slices} >= {"cold.weight", "warm.weight"}


class Looking(nn.Module):
    """Has layers, and code after them that looks at every value, as a detector's does at its boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 40)), nn.Linear(40, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = [row[: max(int(value), 1)] for row in self.body(x) for value in row]
        return [self.head(nn.functional.pad(row, (0, 40 - len(row)))) for row in kept]


def test_what_torch_says_of_an_export_is_not_for_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnrecordableError, match="numbers off tensors.* a part of it, the backbone say, can be read"):
        couple(Looking(), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


def test_a_part_is_read_where_the_model_is_not() -> None:
    model, x = Looking(), torch.randn(2, 3)
    fp.global_prune(model.body, "magnitude", 0.5, granularity="channel", example_inputs=x)
    masked = model(x)
    model.body = fp.shrink(model.body, x)
    assert model.body[0].out_features == 4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(masked, model(x), strict=True))
