"""The smaller model against the masked one: float64, everything random, each channel by itself and many at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from channel_cases import CASES, Fn, assert_equal_without, coupled, randomised, with_masks
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as for_all
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from torch_flowprune.channels.coupling import couple
from torch_flowprune.channels.group_masks import channel_masks
from torch_flowprune.channels.shrinking.graphs.exported_module import ExportedModule
from torch_flowprune.channels.shrinking.own_code import own_class
from torch_flowprune.channels.shrinking.proof.equivalence import relative_error
from torch_flowprune.channels.shrinking.removal import shrink
from torch_flowprune.channels.shrinking.saving.architecture import describe, rebuild
from torch_flowprune.channels.shrinking.surgery import ShrinkError

PRUNABLE = [name for name, case in CASES.items() if case.groups]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNABLE)
def test_each_channel_by_itself(name: str) -> None:
    model, x, coupling = coupled(CASES[name])
    for group in coupling.groups:
        for unit in range(group.size):
            assert_equal_without(model, x, coupling, {group.name: [unit]})


@pytest.mark.parametrize("name", PRUNABLE)
def test_the_last_channel_of_each_group(name: str) -> None:
    model, x, coupling = coupled(CASES[name])
    for group in coupling.groups:
        assert_equal_without(model, x, coupling, {group.name: [group.size - 1]})


@pytest.mark.parametrize("name", PRUNABLE)
def test_half_of_every_group(name: str) -> None:
    model, x, coupling = coupled(CASES[name])
    removed = {g.name: torch.randperm(g.size)[: g.size // 2].tolist() for g in coupling.groups}
    small = assert_equal_without(model, x, coupling, removed)
    assert own_class(type(small)) is own_class(type(model))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PRUNABLE)
def test_the_shrunk_model_has_a_coupling_of_its_own_and_shrinks_again(name: str) -> None:
    model, x, coupling = coupled(CASES[name])
    small = assert_equal_without(model, x, coupling, {g.name: [0] for g in coupling.groups})
    again = couple(small, x)
    sizes = {g.name: g.size for g in again.groups}
    assert all(sizes[g.name] == g.size - 1 for g in coupling.groups if g.size > 2)
    if again.groups:
        assert_equal_without(small, x, again, {g.name: [g.size - 1] for g in again.groups})


# -- what layers say of themselves ------------------------------------------


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.InstanceNorm2d(8), "num_features"),
        (nn.BatchNorm2d(8, affine=False, track_running_stats=False), "num_features"),
        (nn.PReLU(8), "num_parameters"),
        (nn.GroupNorm(8, 8), "num_groups"),
        (nn.GroupNorm(8, 8, affine=False), "num_groups"),
    ],
    ids=["instance norm", "batch norm without a tensor", "prelu", "group norm", "group norm without a tensor"],
)
def test_layers_state_the_sizes_they_have(layer: nn.Module, name: str, recwarn: pytest.WarningsRecorder) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 2, 1)).eval(), torch.randn(2, 3, 8, 8)
    given = halved(model, x)
    small = shrink(model, x, masks=given)
    small(x)
    assert getattr(small[1], name) == 4
    assert not recwarn.list


# -- exact beyond the example ------------------------------------------


def halved(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    coupling = couple(model, x)
    keep = {g.name: torch.arange(g.size) >= g.size // 2 for g in coupling.groups}
    return channel_masks(coupling, keep, dict(model.named_parameters()))


def test_a_scale_read_off_the_width_is_not_trusted() -> None:
    """The module's own code would use the new width; the dense one's is put in its place, or else it is an error."""
    layers = {"a": nn.Linear(8, 6), "b": nn.Linear(6, 3)}
    divided = randomised(Fn(lambda s, x: (lambda y: s.b(y.div(len(y[0]) ** 0.5)))(s.a(x)), **layers)).eval()
    x = torch.randn(2, 8, dtype=torch.float64)
    given = halved(divided, x)
    with pytest.raises(ShrinkError, match="differs from the masked"):
        shrink(divided, x, masks=given)
    small = shrink(divided, x, masks=given, graphs=True)
    assert isinstance(small, ExportedModule)
    other = torch.randn(4, 8, dtype=torch.float64)
    assert relative_error(with_masks(divided, given)(other), small(other)) < 1e-12


# -- what training does otherwise ------------------------------------------


class OnlyInTraining(nn.Module):
    """Its training forward reads the hidden channels in a way that its eval forward does not."""

    def __init__(self, noise: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.noise, self.dropout = (
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 2),
            noise,
            dropout,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.sigmoid(self.norm(self.a(x)))
        if self.training and not self.dropout:
            hidden = (
                hidden + self.noise * torch.randn_like(hidden) if self.noise else hidden / hidden.mean(-1, keepdim=True)
            )
        return self.b(torch.nn.functional.dropout(hidden, self.dropout, self.training))


def test_a_training_forward_that_would_differ_is_found_out() -> None:
    torch.manual_seed(0)
    model, x = OnlyInTraining().train(), torch.randn(5, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ShrinkError, match="output in train mode differs from the masked model's by"):
        shrink(model, x, masks=halved(model, x))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"noise": 1.0}])
def test_what_training_draws_is_no_difference(options: dict[str, float]) -> None:
    """Dropout is off in the trial, in any form.

    Where something else draws, by width, only eval mode can be compared.
    """
    torch.manual_seed(0)
    model, x = OnlyInTraining(**options), torch.randn(5, 4)
    assert shrink(model, x, masks=halved(model, x)).a.out_features == 3


@pytest.mark.parametrize("drop", [lambda s, x: s.drop(x), lambda s, x: nn.functional.dropout(x, 0.5, s.training)])
def test_dropout_hides_no_difference_in_training(drop: Callable[..., torch.Tensor]) -> None:
    def forward(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        hidden = s.a(x)
        return s.b(drop(s, hidden) / (hidden.mean(-1, keepdim=True) if s.training else 1))

    model, x = Fn(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2), drop=nn.Dropout(0.5)), torch.randn(5, 4)
    with pytest.raises(ShrinkError, match="in train mode"):
        shrink(model, x, masks=halved(model, x))


def test_one_sample_is_enough_for_eval_mode() -> None:
    """Batch norm cannot train on it; the proof is then of eval mode."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval()
    assert shrink(model, torch.randn(1, 4), masks=halved(model, torch.randn(2, 4)))[0].out_features == 3


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_vit",
        "test_convnext",
        "test_efficientnet",
        "test_byobnet",
        "test_mambaout",
        "test_nfnet",
        "test_vit3",
    ],
)
def test_models_people_have_in_both_modes_with_gradients(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    size = (96, 96) if hasattr(model, "set_input_size") else (64, 64)
    if hasattr(model, "set_input_size"):
        model.set_input_size(size)
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    model = (
        calibrated(model, x)
        if any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        else gently_randomised(model)
    )
    coupling = couple(model, x)
    removed = {g.name: torch.randperm(g.size)[: g.size // 2].tolist() for g in coupling.groups}
    assert_equal_without(model, x, coupling, removed)


def gently_randomised(model: nn.Module) -> nn.Module:
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim <= 1 or not p.any():
                p.mul_(torch.rand_like(p) + 0.5).add_(0.1 * torch.randn_like(p))
    return model


# -- the paper's models ------------------------------------------


def vgg13(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for factor in (1, 1, 0, 2, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0):
        if factor:
            layers += [
                nn.Conv2d(channels, factor * width, 3, padding=1, bias=False),
                nn.ReLU(),
                nn.BatchNorm2d(factor * width),
            ]
            channels = factor * width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


def mobilenet(width: int) -> nn.Module:
    def block(a: int, b: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False),
            nn.BatchNorm2d(a),
            nn.ReLU(),
            nn.Conv2d(a, b, 1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(),
        ]

    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    widths = [1, 2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32]
    for a, b in pairwise(widths):
        layers += block(a * width, b * width, 2 if b == 2 * a and b > 2 else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32 * width, 10))


class Block(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.skip = (
            nn.Sequential() if a == b else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.skip(x))


def resnet56(width: int) -> nn.Module:
    blocks = [
        Block(a * width, b * width, b // a) for a, b in [(1, 1)] * 9 + [(1, 2)] + [(2, 2)] * 8 + [(2, 4)] + [(4, 4)] * 8
    ]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


@pytest.mark.parametrize(("make", "groups"), [(vgg13, 10), (mobilenet, 14), (resnet56, 27 + 3)])
def test_the_papers_models_at_75_percent(make: Callable[[int], nn.Module], groups: int) -> None:
    torch.manual_seed(0)
    model = calibrated(make(4), torch.randn(8, 3, 32, 32, dtype=torch.float64))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    coupling = couple(model, x)
    assert len(coupling.groups) == groups
    removed = {g.name: torch.randperm(g.size)[: 3 * g.size // 4].tolist() for g in coupling.groups}
    assert_equal_without(model, x, coupling, removed)


def calibrated(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Random affine values, and the running statistics that go with them, so that signals neither die nor explode."""
    model = randomised(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.kaiming_normal_(p)
        model.train()(x)
    return model.eval()


# -- state, save and load ------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_momentum_is_sliced_along(inplace: bool) -> None:
    case = CASES["residual"]
    torch.manual_seed(0)
    model, x = case.make(), torch.randn(case.shape)
    given = halved(model, x)
    for name, p in model.named_parameters():
        p.data.mul_(given.get(name, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reference = copy.deepcopy(model)
    other = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for m, o in ((model, optimizer), (reference, other)):
        step(m, o, x, given)
    small = shrink(model, x, masks=given, optimizer=optimizer, inplace=inplace)
    assert (small is model) is inplace
    assert [p for g in optimizer.param_groups for p in g["params"]] == list(small.parameters())
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in small.parameters())
    for _ in range(2):
        step(small, optimizer, x, {})
        step(reference, other, x, given)
    assert relative_error(reference(x), small(x)) < 1e-5


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, given: dict[str, torch.Tensor]) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        if name in given and p.grad is not None:
            p.grad.mul_(given[name])
    optimizer.step()


def test_model_pruned_by_torch_loses_its_dead_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    x = torch.randn(3, 4)
    small = shrink(model, x)
    assert small[0].weight.shape == (3, 4) and small[2].weight.shape == (2, 3)
    assert torch.allclose(model(x), small(x)) and hasattr(model[0], "weight_orig")
    shrink(model, x, inplace=True)
    assert model[0].weight.shape == (3, 4) and not hasattr(model[0], "weight_orig")


def test_without_masks_what_is_zero_is_dead() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    assert shrink(model, x)[0].out_features == 6
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 0
    assert shrink(model, x)[0].out_features == 5


@pytest.mark.parametrize("name", ["conv bn relu", "attention", "grouped", "tied", "group norm"])
def test_described_and_rebuilt(name: str) -> None:
    model, x, coupling = coupled(CASES[name])
    small = assert_equal_without(model, x, coupling, {g.name: [0] for g in coupling.groups})
    text = json.dumps(describe(model, small))
    again = rebuild(CASES[name].make().double(), json.loads(text)).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))


def test_the_model_is_as_it_was_when_shrinking_fails() -> None:
    layers = {"a": nn.Linear(8, 6), "b": nn.Linear(6, 3)}
    model = randomised(Fn(lambda s, x: (lambda y: s.b(y.div(len(y[0]) ** 0.5)))(s.a(x)), **layers)).eval()
    x = torch.randn(2, 8, dtype=torch.float64)
    given = halved(model, x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ShrinkError):
        shrink(model, x, masks=given, inplace=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_an_emptied_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    coupling = couple(model, torch.randn(2, 4))
    given = channel_masks(coupling, {"0.weight": torch.zeros(6, dtype=torch.bool)}, dict(model.named_parameters()))
    with pytest.raises(ShrinkError, match=r"nothing would be left of 0\.weight"):
        shrink(model, torch.randn(2, 4), masks=given)


# -- random networks ------------------------------------------


class Random(nn.Module):
    """Layers in a row, each reading the sum, product or concatenation of two earlier results."""

    def __init__(self, plan: list[tuple[str, str, int, int]]) -> None:
        super().__init__()
        self.layers, self.joins = nn.ModuleList(), []
        widths = [4]
        for kind, wanted, width, back in plan:
            other = back % len(widths)
            # decided here: code that compares shapes when it runs does something else once they have shrunk
            join = wanted if wanted == "cat" or widths[-1] == widths[other] else "none"
            channels = widths[-1] + (widths[other] if join == "cat" else 0)
            self.layers.append(layer_of(kind, channels, width))
            self.joins.append((join, other))
            widths.append(channels if kind in ("norm", "group norm", "depthwise", "sigmoid") else width)
        self.head = nn.Linear(widths[-1], 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = [x]
        for (join, other), layer in zip(self.joins, self.layers, strict=True):
            results.append(layer(joined(join, results[-1], results[other])))
        return self.head(results[-1].mean((2, 3)))


def joined(join: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return {"cat": lambda: torch.cat([a, b], 1), "add": lambda: a + b, "multiply": lambda: a * b, "none": lambda: a}[
        join
    ]()


def layer_of(kind: str, channels: int, width: int) -> nn.Module:
    return {
        "conv": lambda: nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()),
        "point": lambda: nn.Conv2d(channels, width, 1, bias=False),
        "norm": lambda: nn.BatchNorm2d(channels),
        "group norm": lambda: nn.GroupNorm(2, channels),
        "depthwise": lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        "grouped": lambda: nn.Conv2d(channels, width, 1, groups=2),
        "sigmoid": lambda: nn.Sigmoid(),
    }[kind]()


PLANS = st.lists(
    st.tuples(
        st.sampled_from(["conv", "point", "norm", "group norm", "depthwise", "grouped", "sigmoid"]),
        st.sampled_from(["add", "multiply", "cat"]),
        st.sampled_from([4, 6, 8]),
        st.integers(0, 5),
    ),
    min_size=2,
    max_size=6,
)


@settings(
    max_examples=12,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@for_all(PLANS, st.integers(0, 10**6))
def test_random_networks(plan: list[tuple[str, str, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    model = calibrated(Random(plan), x)
    coupling = couple(model, x)
    removed = {g.name: torch.randperm(g.size)[: 1 + g.size // 3].tolist() for g in coupling.groups}
    assert_equal_without(model, x, coupling, removed)


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@for_all(PLANS, st.integers(0, 10**6))
def test_many_random_networks(plan: list[tuple[str, str, int, int]], seed: int) -> None:
    test_random_networks.hypothesis.inner_test(plan, seed)  # type: ignore[attr-defined]
