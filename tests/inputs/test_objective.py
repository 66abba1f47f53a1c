"""The loss on one batch: what the user's function gets, and targets that the default is not meant for."""

import copy
from functools import partial

import cases
import oracles
import pytest
import torch
from cases import CASES
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp


class Supervised(nn.Module):
    """A model with an auxiliary head, as torchvision's segmentation models have one."""

    def __init__(self, form):
        super().__init__()
        self.body, self.head, self.aux, self.form = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4), form

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.form(self.head(hidden), self.aux(hidden))


class Output:
    def __init__(self, out, aux):
        self.logits, self.aux = out, aux


FORMS = {"dict": lambda out, aux: {"out": out, "aux": aux}, "tuple": lambda out, aux: (out, aux), "object": Output}


def both(output, target):
    if isinstance(output, Output):
        output = {"out": output.logits, "aux": output.aux}
    a, b = output.values() if isinstance(output, dict) else output
    return F.cross_entropy(a, target) + 0.4 * F.cross_entropy(b, target)


def gradient(loss, model):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_loss_gets_what_the_model_returned(form):
    model, x, y = Supervised(form), torch.randn(4, 8), torch.randint(4, (4,))
    found = fp.flow(model, (x, y), loss=both, needs=("g",))
    oracles.assert_named_close(found.g, gradient(both(model(x), y), model), 1e-5)


@pytest.mark.parametrize("form", [FORMS["dict"], FORMS["object"]], ids=["dict", "object"])
@pytest.mark.parametrize(
    "loss",
    [None, F.cross_entropy, nn.CrossEntropyLoss(), partial(F.cross_entropy, reduction="mean")],
    ids=["none", "function", "module", "partial"],
)
@pytest.mark.filterwarnings("ignore:the loss does not reach aux")
def test_torchs_losses_read_the_logits(form, loss):
    x, y = torch.randn(4, 8), torch.randint(4, (4,))
    found = fp.flow(Supervised(form), (x, y), loss=loss, needs=("g",))
    assert found.g["head.weight"].any()
    assert not found.g["aux.weight"].any()


def test_temperature_divides_logits_and_nothing_else():
    x, y = torch.randn(4, 8), torch.randint(4, (4,))
    with pytest.raises(TypeError, match="the model returned a tuple of 2, not logits"):
        fp.flow(Supervised(FORMS["tuple"]), (x, y), loss=both, temperature=2.0)


X = torch.linspace(-1, 1, 24).view(6, 4)
MEANT_FOR_OTHERS = {
    "regression": (torch.linspace(-2, 2, 18).view(6, 3), "negative or do not sum to 1"),
    "one number each": (torch.zeros(6), "the targets are torch.float32 of shape .6,., the logits of shape .6, 3."),
    "several labels": ((torch.linspace(-1, 1, 18).view(6, 3) > 0).float(), "negative or do not sum to 1"),
    "several labels as integers": (torch.ones(6, 3, dtype=torch.long), "whole numbers, several a sample"),
    "indices in a column": (torch.zeros(6, 1, dtype=torch.long), r"indices of shape \(6,\) go with them"),
    "int32": (torch.zeros(6, dtype=torch.int32), "the targets are torch.int32: make indices torch.long"),
    "no tensor": ([0] * 6, "the target is a list of 6"),
}


@pytest.mark.parametrize(("target", "text"), MEANT_FOR_OTHERS.values(), ids=MEANT_FOR_OTHERS)
def test_targets_that_are_no_classes_ask_for_a_loss(target, text):
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=rf"no loss= is given, .*{text}.* (pass )?loss="):
        fp.scores(model, "snip", (X, target))


def test_an_autoencoder_and_a_model_of_one_output_ask_for_a_loss():
    for model, target in ((nn.Linear(4, 4), X), (nn.Linear(4, 1), torch.zeros(6, dtype=torch.long))):
        with pytest.raises(ValueError, match="no loss= is given"):
            fp.scores(model, "snip", (X, target))
    assert fp.scores(nn.Linear(4, 4), "snip", (X, X), loss=F.mse_loss)["weight"].any()


@pytest.mark.parametrize(
    ("shape", "target"),
    [((6, 3), torch.randint(3, (6,))), ((2, 3, 4), torch.randint(3, (2, 4))), ((6, 3), torch.eye(3).repeat(2, 1))],
    ids=["indices", "dense indices", "probabilities"],
)
def test_classes_need_no_loss(shape, target):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.randn(*shape))

        def forward(self, x):
            return self.logits * x.mean()

    model, x = Net(), torch.ones(len(target), 2)
    expected = F.cross_entropy(model(x), target)
    assert fp.flow(model, (x, target), needs=("g",)).loss == pytest.approx(expected.item())


def test_the_class_of_a_loss_is_answered():
    text = r"loss should be a function, got the class CrossEntropyLoss: make one, CrossEntropyLoss\(\)"
    with pytest.raises(TypeError, match=text):
        fp.global_prune(cases.mlp(), "snip", 0.5, data=CASES["mlp"].batch(4), loss=nn.CrossEntropyLoss)


class OneInput(nn.Module):
    """A model that is called with an image, and knows of no labels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 4)

    def forward(self, image):
        return self.net(image)


@pytest.mark.parametrize("options", [{}, {"loss": F.cross_entropy}], ids=["no loss", "a loss"])
def test_a_model_gets_what_its_signature_takes_of_a_dict_batch(options):
    model, image, label = OneInput(), torch.randn(8, 16), torch.randint(4, (8,))
    found = fp.flow(model, {"image": image, "label": label, "id": torch.arange(8)}, needs=("g",), **options)
    expected = fp.flow(model, (image, label), needs=("g",))
    oracles.assert_named_close(found.g, expected.g, 1e-7)
    report = fp.global_prune(
        copy.deepcopy(model), "synflow", 0.5, data=[{"image": image, "label": label, "id": torch.arange(8)}]
    )
    assert report.pruned == 32


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"image": torch.ones(2, 16), "y": torch.zeros(2)}, r"its target under one of .* or pass closure="),
        ({"picture": torch.ones(2, 16)}, r"the keys of a dict batch should be what the model takes \(image\)"),
    ],
)
def test_a_dict_batch_of_other_keys_names_them(batch, text):
    with pytest.raises(ValueError, match=text):
        fp.flow(OneInput(), batch)


class TakesList(nn.Module):
    """A model that is called with a list of inputs of several sizes, as torchvision's detectors are."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 4)

    def forward(self, images, targets=None):
        assert targets is None
        return self.net(torch.stack([image.mean(0) for image in images]))


def test_a_list_as_input_is_one_argument():
    model, images, y = TakesList(), [torch.randn(5, 8), torch.randn(7, 8)], torch.tensor([1, 2])
    found = fp.flow(model, (images, y), needs=("g",))
    oracles.assert_named_close(found.g, gradient(F.cross_entropy(model(images), y), model), 1e-5)
    assert fp.global_prune(model, "synflow", 0.5, example_inputs=images).pruned == 16


def test_a_list_is_spread_where_the_model_needs_several():
    model = nn.Bilinear(3, 5, 4)
    a, b, y = torch.randn(6, 3), torch.randn(6, 5), torch.randint(4, (6,))
    found, expected = (fp.flow(model, (inputs, y), needs=("g",)) for inputs in ([a, b], (a, b)))
    oracles.assert_named_close(found.g, expected.g, 1e-7)


def test_a_closure_gets_the_batch_as_it_was_given():
    from collections import UserDict

    class Encoding(UserDict):
        def __getattr__(self, name):
            if name == "data":
                raise AttributeError(name)
            return self.data[name]

    batch = Encoding({"x": X, "labels": torch.zeros(6, dtype=torch.long)})
    closure = lambda model, batch: F.cross_entropy(model(batch.x), batch.labels)
    found = fp.flow(nn.Linear(4, 3), [batch], closure=closure, needs=("g",), max_samples=4)
    assert found.samples == 4
    assert len(batch.x) == 6
