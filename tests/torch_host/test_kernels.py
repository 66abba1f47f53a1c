"""Rows 3.7 and 3.15 of docs/explanation/host.md: what a layer's forward makes of its masked weight."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import pruned, snapshot, train
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import torch_flowprune as fp

ROWS = {
    "3.7": (
        "weight-standardised convolutions: zeros in the weight, none in the kernel",
        "handled",
        (
            "classes of timm and transformers are known by name: the mask is put on the standardised kernel, and "
            "`fp.remove` is refused where zeros would not survive it (whole filters do). For any other class or "
            "parent, a prune runs a trial without side effects (of the model, if data or example inputs are "
            "given; else of each layer that has a forward of its own), looks at the kernels used, and warns with "
            "the fraction of them that is zero"
        ),
    ),
    "3.15": (
        "a subclass that uses other kernels besides its own, or flips, transposes or rescales its own (no fault)",
        "handled",
        "the weight is masked where it is read, and no other kernel is. After `fp.remove` the output is the same",
    ),
}

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
LOST = "zeros do not survive what the model makes of {}.*granularity='filter'"

known = pytest.mark.parametrize("name", ["ScaledStdConv2d", "StdConv2d", "StdConv2dSame", "ScaledStdConv2dSame"])


def standardised(weight):
    return weight - weight.flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))


class Child(nn.Conv2d):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.extra = nn.Conv2d(*sizes)

    def forward(self, x):
        return super().forward(x) + self.extra(x)


class Partial(nn.Conv2d):
    """Counts what it sees with a kernel of ones."""

    def forward(self, x):
        seen = functional.conv2d(torch.ones_like(x), torch.ones_like(self.weight))
        return super().forward(x) * (self.weight[0].numel() / seen)


class Flipped(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight.flip(2, 3), self.bias)


class Transposed(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, weight=self.weight.transpose(0, 1), bias=self.bias)


class Rescaled(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight / self.weight.norm() + 0 * self.weight.sum(), self.bias)


class FixedFirst(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.conv2d(x, torch.ones(4, 4, 1, 1)))


class ByKeyword(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, weight=standardised(self.weight), bias=self.bias)


class StandardisedLinear(nn.Linear):
    def forward(self, x):
        return functional.linear(x, standardised(self.weight), self.bias)


class PastTheMask(nn.Linear):
    def forward(self, x):
        return functional.linear(x, *self.parameters())


class Parent(nn.Module):
    """Standardises the weight of its child, a plain convolution, and remembers what it used."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.used = standardised(self.inner.weight)
        self.calls += 1
        return functional.conv2d(x + 0 * torch.rand_like(x), self.used, self.inner.bias).mean((2, 3))


def by_instance():
    layer = nn.Conv2d(4, 4, 3)
    layer.forward = lambda x: functional.conv2d(x, standardised(layer.weight), layer.bias)
    return layer


def kernels_used(model, images):
    """The kernel of every convolution that runs."""
    found, real = [], functional.conv2d

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is real:
                found.append(args[1])
            return func(*args, **(kwargs or {}))

    with Record():
        model(images)
    return found


@pytest.mark.parametrize("kind", [Child, Partial, Flipped, Transposed, Rescaled, FixedFirst])
def test_row_3_15_a_subclass_computes_with_its_masked_weight_and_with_other_kernels_as_they_are(kind):
    layer = kind(4, 4, 3)
    twin = copy.deepcopy(layer)
    fp.global_prune(layer, sparsity=0.5, parameters=[(layer, "weight")], example_inputs=IMAGES)
    with torch.no_grad():
        twin.weight.mul_(layer.weight_mask)
    assert torch.equal(layer(IMAGES), twin(IMAGES))
    assert torch.equal(fp.remove(layer)(IMAGES), twin(IMAGES))
    assert type(layer) is kind


LOSING = {
    "by keyword": (lambda: ByKeyword(4, 4, 3), r"weight \(ByKeyword: 50.0% of the weight is zero, 0.0% of the kernel"),
    "linear": (lambda: StandardisedLinear(8, 8), r"weight \(StandardisedLinear: 50.0% .* 0.0% of the kernel"),
    "on the instance": (by_instance, r"weight \(Conv2d: 50.0% .* 0.0% of the kernel"),
    "past the mask": (lambda: PastTheMask(8, 8), r"weight \(PastTheMask: 50.0% .* 0.0% of the kernel"),
    "inside": (lambda: nn.Sequential(nn.Linear(8, 8), StandardisedLinear(8, 8)), r"1.weight \(StandardisedLinear: "),
}


@pytest.mark.parametrize("case", LOSING)
@pytest.mark.parametrize("frozen", [False, True])
def test_row_3_7_zeros_that_the_forward_fills_are_warned_of(case, frozen):
    make, text = LOSING[case]
    layer = make().requires_grad_(not frozen)
    with pytest.warns(UserWarning, match=LOST.format(text)) as caught:
        fp.global_prune(layer, sparsity=0.5, allocation="layer")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(parameter.requires_grad is not frozen for parameter in layer.parameters())


@pytest.mark.parametrize("case", LOSING)
def test_row_3_7_whole_filters_are_not_warned_of(case):
    if case == "past the mask":
        return
    pruned(LOSING[case][0](), granularity="filter")


BATCH = (IMAGES, torch.tensor([0, 1]))
AT_HAND = {
    "data": {"data": BATCH},
    "example": {"example_inputs": IMAGES},
    "closure": {"data": IMAGES, "closure": lambda model, images: model(images).sum()},
    "loader": {"data": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*BATCH), 2, shuffle=True)},
}


@pytest.mark.parametrize("case", AT_HAND)
def test_row_3_7_a_parent_that_rewrites_its_childs_weight_is_seen_in_a_trial_without_a_trace(case):
    model = Parent()
    torch.manual_seed(0)
    before, state = list(model.__dict__), torch.get_rng_state()
    with pytest.warns(UserWarning, match=LOST.format(r"inner.weight \(Conv2d: 50.0% .* 0.0% of the kernel")):
        fp.global_prune(model, sparsity=0.5, **AT_HAND[case])
    assert list(model.__dict__) == before
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def compiled_in_place(model, **words):
    model.compile(**words)
    return model


@pytest.mark.parametrize("made", [torch.compile, compiled_in_place], ids=["wrapped", "in place"])
def test_row_3_7_a_compiled_model_is_tried_as_its_code(made):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with pytest.warns(UserWarning, match=LOST.format(r"inner.weight \(Conv2d: 50.0% .* 0.0% of the kernel")):
        fp.global_prune(made(Parent(), backend=backend), sparsity=0.5, example_inputs=IMAGES)
    assert graphs == []


def test_row_3_7_a_trial_uses_up_no_iterator():
    data = iter([BATCH])
    fp.global_prune(Parent(), sparsity=0.5, data=data)
    assert next(data) is BATCH


def test_row_3_7_what_cannot_be_run_is_not_judged():
    fp.global_prune(nn.Sequential(nn.Linear(3, 6), Parent()), sparsity=0.5, example_inputs=IMAGES)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore:.*torch.jit.* is not supported")
def test_row_3_7_a_model_with_scripted_parts_is_not_tried():
    model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), StandardisedLinear(8, 8))
    with pytest.warns(UserWarning, match=LOST.format("1.weight")):  # which is tried alone
        fp.global_prune(model, sparsity=0.5, include="1", example_inputs=ROWS)


def test_row_3_7_a_model_without_modes_is_not_tried():
    model = torch.export.export(nn.Sequential(nn.Linear(8, 8)), (ROWS,)).module()
    expected = model(ROWS)
    fp.global_prune(model, sparsity=0.5, include="*weight", example_inputs=ROWS)
    assert not torch.equal(model(ROWS), expected)


def test_row_3_7_an_error_made_of_the_warning_leaves_the_model_as_it_was():
    layer = ByKeyword(4, 4, 3)
    before = snapshot(layer)
    with pytest.raises(UserWarning, match="zeros do not survive"):
        pruned(layer)
    assert snapshot(layer) == before


@known
def test_row_3_7_known_convolutions_have_the_mask_on_the_standardised_kernel(name):
    layers = pytest.importorskip("timm.layers")
    model = pruned(nn.Sequential(getattr(layers, name)(4, 4, 3)), data=(IMAGES, torch.zeros(2, 4, 4)), loss=loss)
    train(model, IMAGES)
    (kernel,) = kernels_used(model, IMAGES)
    assert torch.equal(kernel == 0, ~model[0].weight_mask)
    before = snapshot(model)
    with pytest.raises(ValueError, match="standardises its weight before use.*prune whole filters"):
        fp.remove(model)
    with pytest.raises(ValueError, match="standardises its weight before use"):
        prune.remove(model[0], "weight")
    assert snapshot(model) == before


def loss(output, target):
    return output.sum()


@pytest.mark.parametrize("when", ["before", "after"])
def test_row_3_7_a_known_convolution_with_a_forward_on_the_instance(when):
    layers = pytest.importorskip("timm.layers")
    layer = layers.ScaledStdConv2d(4, 4, 3)
    for step in ("before", "prune", "after"):
        if step == "prune":
            pruned(layer)
        elif step == when:
            own = layer.forward
            layer.forward = lambda x, own=own: own(x)
    (kernel,) = kernels_used(layer, IMAGES)
    assert torch.equal(kernel == 0, ~layer.weight_mask)


def test_row_3_7_a_subclass_with_a_forward_of_its_own_is_not_a_known_one():
    layers = pytest.importorskip("timm.layers")

    class Own(layers.StdConv2d):
        forward = nn.Conv2d.forward

    layer = pruned(Own(4, 4, 3))
    expected = layer(IMAGES)
    assert torch.equal(fp.remove(layer)(IMAGES), expected)


def test_row_3_7_the_class_of_transformers_is_known():
    bit = pytest.importorskip("transformers.models.bit.modeling_bit")
    layer = pruned(bit.WeightStandardizedConv2d(4, 4, 3))
    (kernel,) = kernels_used(layer, IMAGES)
    assert torch.equal(kernel == 0, ~layer.weight_mask)


def test_row_3_7_a_known_convolution_can_be_traced():
    layers = pytest.importorskip("timm.layers")
    model = pruned(nn.Sequential(layers.StdConv2d(4, 4, 3)))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(IMAGES), model(IMAGES))


def test_row_3_7_filters_of_a_standardised_convolution_can_be_removed():
    layers = pytest.importorskip("timm.layers")
    model = pruned(nn.Sequential(layers.ScaledStdConv2d(4, 4, 3, bias=False)), granularity="filter")
    expected = model(IMAGES)
    torch.testing.assert_close(fp.remove(model)(IMAGES), expected)
