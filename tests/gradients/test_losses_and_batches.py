"""Every loss in every form of batch, run in every way, against the dense Hessian of the loss over all the data.

A case says what a batch of samples from ``a`` to ``b`` is, and what the loss over these is: a sum, and what it is
divided by. One row more buys all the ways of running.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import oracles
import pytest
import torch
from budgets import least
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import torch_flowprune as fp

SAMPLES = 7
EDGES = {"one batch": (0, 7), "uneven": (0, 3, 4, 7), "one sample each": tuple(range(8))}
DOUBLE = {"dtype": torch.float64}
WEIGHT = torch.tensor([1.0, 5.0, 20.0], **DOUBLE)


@dataclass(frozen=True)
class Case:
    """A model, its batches, and its loss: ``part(net, a, b)`` is the sum over samples and what it is divided by."""

    model: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    part: Callable[[Callable[..., Any], int, int], tuple[Tensor, float]]
    words: dict[str, Any] = field(default_factory=dict)
    inseparable: bool = False
    """Whether no batch of it can be cut."""


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), **DOUBLE)


X, Y = drawn(SAMPLES, 4), torch.tensor([0, 0, 0, 1, 1, 2, 2])
KEPT = torch.where(torch.arange(SAMPLES) % 3 == 1, -100, Y)
REALS, BITS = drawn(SAMPLES, 3), (drawn(SAMPLES, 3) > 0).double()
SOFT = drawn(SAMPLES, 3).softmax(1)


def summed(loss, target, count=None):
    """A loss that sums: over the samples, or over what ``count`` counts."""

    def part(net, a, b):
        return loss(net(X[a:b]), target[a:b]), float(b - a if count is None else count(a, b))

    return part


def pairs(target):
    return lambda a, b: (X[a:b], target[a:b])


CE = partial(F.cross_entropy, reduction="sum")
LOSSES = {
    "cross-entropy": Case(mlp, pairs(Y), summed(CE, Y)),
    "cross-entropy, a module": Case(mlp, pairs(Y), summed(CE, Y), {"loss": nn.CrossEntropyLoss()}),
    "a function of one's own": Case(mlp, pairs(Y), summed(CE, Y), {"loss": lambda o, t: F.cross_entropy(o, t)}),
    "label smoothing": Case(
        mlp,
        pairs(Y),
        summed(partial(CE, label_smoothing=0.2), Y),
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.2)},
    ),
    "probabilities": Case(mlp, pairs(SOFT), summed(CE, SOFT)),
    "class weights": Case(
        mlp,
        pairs(Y),
        summed(partial(CE, weight=WEIGHT), Y, lambda a, b: WEIGHT[Y[a:b]].sum()),
        {"loss": nn.CrossEntropyLoss(weight=WEIGHT)},
    ),
    "ignored": Case(mlp, pairs(KEPT), summed(CE, KEPT, lambda a, b: (KEPT[a:b] >= 0).sum())),
    "a sum, set": Case(mlp, pairs(Y), summed(CE, Y), {"loss": partial(F.cross_entropy, reduction="sum")}),
    "a sum, told": Case(mlp, pairs(Y), summed(CE, Y), {"loss": lambda o, t: CE(o, t), "reduction": "sum"}),
    "a mean, told": Case(mlp, pairs(Y), summed(CE, Y), {"loss": lambda o, t: CE(o, t) / len(t), "reduction": "mean"}),
    "squares": Case(mlp, pairs(REALS), summed(lambda o, t: (o - t).square().sum() / 3, REALS), {"loss": F.mse_loss}),
    "bits": Case(
        mlp,
        pairs(BITS),
        summed(lambda o, t: F.binary_cross_entropy_with_logits(o, t, reduction="sum") / 3, BITS),
        {"loss": nn.BCEWithLogitsLoss()},
    ),
    "warmed": Case(mlp, pairs(Y), summed(lambda o, t: CE(o / 3, t), Y), {"temperature": 3.0}),
    "focal": Case(mlp, pairs(Y), summed(lambda o, t: focal(o, t).sum(), Y), {"loss": lambda o, t: focal(o, t).mean()}),
    "counted by a function": Case(
        mlp,
        pairs(Y),
        summed(partial(CE, ignore_index=2), Y, lambda a, b: (Y[a:b] != 2).sum()),
        {
            "loss": lambda o, t: F.cross_entropy(o, t, ignore_index=2) if (t != 2).any() else o.sum() * 0,
            "reduction": lambda batch: (batch[1] != 2).sum(),
        },
    ),
    "margins": Case(
        mlp,
        pairs(Y),
        summed(lambda o, t: ((1 - o.gather(1, t[:, None]) + o).clamp(min=0) ** 2).sum() / 3 - len(t) / 3, Y),
        {"loss": nn.MultiMarginLoss(p=2)},
    ),
}


def focal(output, target):
    losses = F.cross_entropy(output, target, reduction="none")
    return (1 - torch.exp(-losses)).square() * losses


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = mlp(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


class Heads(NamedTuple):
    logits: Tensor
    aux: Tensor


FIRST = {"loss": lambda o, t: F.cross_entropy(o[0], t)}


def of_three(model, batch):
    return F.triplet_margin_loss(*(model(x) for x in batch), margin=2.0)


def of_two(o, target):
    return F.cross_entropy(o["classes"], target["classes"]) + F.mse_loss(o["numbers"], target["numbers"])


def two(net, a, b):
    y = net(X[a:b])["classes"]
    return CE(y, Y[a:b]) + (2 * y - REALS[a:b]).square().sum() / 3, float(b - a)


def three(net, a, b):
    anchor, near, far = (net(x) for x in (X[a:b], X[a:b] + 0.1 * SHIFT[a:b], SHIFT[a:b]))
    return F.triplet_margin_loss(anchor, near, far, margin=2.0, reduction="sum"), float(b - a)


SHIFT = drawn(SAMPLES, 4).flip(0)


def wrapped(wrap, unwrap, words):
    part = lambda net, a, b: (CE(unwrap(net(X[a:b])), Y[a:b]), float(b - a))
    return Case(lambda: Wrapped(wrap), pairs(Y), part, words)


OUTPUTS = {
    "a dict with logits": wrapped(lambda y: {"logits": y}, lambda o: o["logits"], {}),
    "a dict with out, torch's loss": wrapped(lambda y: {"out": y}, lambda o: o["out"], {"loss": F.cross_entropy}),
    "an object with logits": wrapped(lambda y: Heads(y, 2 * y), lambda o: o.logits, {}),
    "a tuple": wrapped(lambda y: (y, 2 * y), lambda o: o[0], FIRST),
    "a list": wrapped(lambda y: [y, 2 * y], lambda o: o[0], FIRST),
    "three inputs that are compared": Case(
        mlp, lambda a, b: (X[a:b], X[a:b] + 0.1 * SHIFT[a:b], SHIFT[a:b]), three, {"closure": of_three}
    ),
    "two heads with targets in a dict": Case(
        lambda: Wrapped(lambda y: {"classes": y, "numbers": 2 * y}),
        lambda a, b: (X[a:b], {"classes": Y[a:b], "numbers": REALS[a:b]}),
        two,
        {"loss": of_two},
    ),
    "a dict of its own": wrapped(
        lambda y: {"a": y}, lambda o: o["a"], {"loss": lambda o, t: F.cross_entropy(o["a"], t)}
    ),
}


class Recurrent(nn.Module):
    """Time first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.out = nn.RNN(4, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.out(self.rnn(x)[0][-1])


class Attending(nn.Module):
    """With a mask that all samples share, as long as there are samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x, mask):
        q = self.qkv(x)
        return self.out(F.scaled_dot_product_attention(q, q, q, attn_mask=mask).mean(1))


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 2, 2).double()

    def forward(self, images):
        return torch.stack([self.conv(image[None]).tanh().mean((2, 3))[0] for image in images])


class Tokens(nn.Module):
    """Logits for each token; given labels, a loss of its own over those that are not -100, at the next place."""

    def __init__(self, causal=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(5, 3), nn.RNN(3, 3, batch_first=True), nn.Linear(3, 5)
        self.causal = causal
        self.double()

    def forward(self, ids, labels=None):
        logits = self.head(self.mix(self.embed(ids))[0])
        if labels is None:
            return logits
        loss = F.cross_entropy(*self.scored(logits, labels))
        return {"loss": loss, "logits": logits}

    def scored(self, logits, labels):
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return logits.flatten(0, 1), labels.flatten()


class OfPacked(nn.Module):
    """Sequences of several lengths in one object of torch's own, a named tuple."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.out = nn.RNN(4, 3).double(), nn.Linear(3, 3).double()

    def forward(self, packed):
        return self.out(self.rnn(packed)[1][-1])


@dataclass(frozen=True)
class Sample:
    """A batch of a class of the user's own."""

    x: Tensor
    y: Tensor
    note: str = ""


UNEVEN = [drawn(length, 4) for length in (5, 3, 2, 6, 4, 1, 3)]
SEQUENCES, SHARED = drawn(6, SAMPLES, 4), 3 * drawn(SAMPLES, SAMPLES)
TOKENS = drawn(SAMPLES, SAMPLES, 4)
IMAGES = [drawn(1, 3 + i % 3, 4) for i in range(SAMPLES)]
BOXES = [{"boxes": drawn(1 + i % 2, 2)} for i in range(SAMPLES)]
IDS = torch.randint(5, (SAMPLES, 6), generator=torch.Generator().manual_seed(2))
LABELS = torch.where(torch.arange(6) < torch.tensor([6, 2, 4, 6, 1, 3, 6])[:, None], IDS, -100)


def distance(output, boxes):
    return torch.stack([(o - b["boxes"].mean(0)).square().sum() for o, b in zip(output, boxes, strict=True)])


def of_tokens(causal):
    def part(net, a, b):
        labels = LABELS[a:b]
        scored = Tokens(causal).scored(net(IDS[a:b]), labels)
        return CE(*scored), float((scored[1] >= 0).sum())

    return part


def plain(net_of, target=Y):
    return lambda net, a, b: (CE(net_of(net, a, b), target[a:b]), float(b - a))


FORMS = {
    "inputs in a list": Case(mlp, lambda a, b: [X[a:b], Y[a:b]], summed(CE, Y)),
    "a dict": Case(mlp, lambda a, b: {"input": X[a:b], "labels": Y[a:b], "index": torch.arange(a, b)}, summed(CE, Y)),
    "a closure": Case(
        mlp,
        lambda a, b: {"x": X[a:b], "y": Y[a:b]},
        summed(CE, Y),
        {"closure": lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])},
    ),
    "time first": Case(
        Recurrent,
        lambda a, b: (SEQUENCES[:, a:b], Y[a:b]),
        plain(lambda net, a, b: net(SEQUENCES[:, a:b])),
        {"batch_dim": (1, 0)},
    ),
    "time first, by a number": Case(
        Recurrent,
        lambda a, b: (SEQUENCES[:, a:b], Y[a:b]),
        plain(lambda net, a, b: net(SEQUENCES[:, a:b])),
        {"batch_dim": 1},
    ),
    "time first, its size alone told": Case(
        Recurrent,
        lambda a, b: (SEQUENCES[:, a:b], Y[a:b]),
        plain(lambda net, a, b: net(SEQUENCES[:, a:b])),
        {"batch_size": lambda batch: len(batch[1])},
        inseparable=True,
    ),
    "a shared mask": Case(
        Attending,
        lambda a, b: ((TOKENS[a:b], SHARED), Y[a:b]),
        plain(lambda net, a, b: net(TOKENS[a:b], SHARED)),
        {"batch_dim": ((0, None), 0)},
    ),
    "a shared mask in a dict": Case(
        Attending,
        lambda a, b: {"x": TOKENS[a:b], "mask": SHARED, "labels": Y[a:b]},
        plain(lambda net, a, b: net(TOKENS[a:b], SHARED)),
        {"batch_dim": {"mask": None}},
    ),
    "packed sequences": Case(
        OfPacked,
        lambda a, b: (pack_sequence(UNEVEN[a:b], enforce_sorted=False), Y[a:b]),
        plain(lambda net, a, b: net(pack_sequence(UNEVEN[a:b], enforce_sorted=False))),
    ),
    "a dataclass": Case(
        mlp,
        lambda a, b: Sample(X[a:b], Y[a:b]),
        summed(CE, Y),
        {"closure": lambda model, batch: F.cross_entropy(model(batch.x), batch.y)},
    ),
    "lists of samples": Case(
        Detector,
        lambda a, b: (IMAGES[a:b], BOXES[a:b]),
        lambda net, a, b: (distance(net(IMAGES[a:b]), BOXES[a:b]).sum(), float(b - a)),
        {"loss": lambda o, t: distance(o, t).mean()},
    ),
    "a causal language model": Case(
        partial(Tokens, causal=True), lambda a, b: {"ids": IDS[a:b], "labels": LABELS[a:b]}, of_tokens(True)
    ),
    "a masked language model": Case(
        partial(Tokens, causal=False), lambda a, b: {"ids": IDS[a:b], "labels": LABELS[a:b]}, of_tokens(False)
    ),
    "tokens": Case(
        partial(Tokens, causal=False),
        lambda a, b: (IDS[a:b], LABELS[a:b]),
        of_tokens(False),
        {"loss": lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()), "reduction": "token"},
    ),
}
CASES = {**LOSSES, **OUTPUTS, **FORMS}
every_case = pytest.mark.parametrize("name", CASES)
every_edge = pytest.mark.parametrize("edges", EDGES.values(), ids=EDGES)


def dense(case, model, count):
    """Loss, gradient by name and Hessian of the loss over the first samples."""
    theta = oracles.trainable(model)

    def value(vector):
        net = partial(functional_call, model, oracles.unflatten(vector, theta))
        total, whole = case.part(lambda *args: net(args), 0, count)
        return total / whole

    vector = oracles.flatten(theta).requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        total = value(vector)
        (g,) = torch.autograd.grad(total, vector)
        H = torch.autograd.functional.hessian(value, vector.detach())
    return oracles.Dense(total.item(), oracles.unflatten(g, theta), H)


def squares(case, model, edges):
    """The mean of squared gradients over batches with these edges, each by what its loss is divided by."""
    total, weights = {}, 0.0
    for a, b in pairwise(edges):
        loss, weight = case.part(model, a, b)
        if weight:
            for name, p in model.named_parameters():
                (g,) = torch.autograd.grad(loss / weight, p, retain_graph=True)
                total[name] = total.get(name, 0) + weight * g.square()
            weights += weight
    return {name: value / weights for name, value in total.items()}


def batches_of(case, edges):
    return [case.batch(a, b) for a, b in pairwise(edges)]


WAYS = {
    "plainly": ({}, 1e-9),
    "in parts": ({"max_memory": True}, 1e-9),
    "sums on the host": ({"offload": True}, 1e-9),
    "in parts, sums on the host": ({"max_memory": True, "offload": True}, 1e-9),
    "some samples": ({"max_samples": 5}, 1e-9),
    "some samples in parts": ({"max_samples": 5, "max_memory": True}, 1e-9),
    "in bfloat16": ({"autocast": torch.bfloat16}, 0.1),
    "some samples in parts in bfloat16": ({"autocast": torch.bfloat16, "max_samples": 5, "max_memory": True}, 0.1),
}


@every_case
@every_edge
@pytest.mark.parametrize("way", WAYS)
def test_g_and_Hg_are_those_of_the_loss_over_all_the_data(name, edges, way):
    case, (words, tolerance) = CASES[name], WAYS[way]
    if case.inseparable and words.keys() & {"max_memory", "max_samples"}:
        pytest.skip("its batches cannot be cut")
    model = case.model()
    data, words = batches_of(case, edges), {**case.words, **words}
    if words.pop("max_memory", False):
        words["max_memory"] = int(1.3 * max(least(model, [batch], needs=("g", "Hg"), **words) for batch in data))
    found = fp.flow(model, data, **words)
    count = words.get("max_samples", SAMPLES)
    expected = dense(case, model, count)
    assert found.samples == count
    assert found.loss == pytest.approx(expected.loss, rel=max(1e-10, tolerance / 5))
    for kind in ("g", "Hg"):
        close(getattr(found, kind), getattr(expected, kind), tolerance)


def close(found, expected, tolerance):
    """By the norm over all parameters: what is rounded to bfloat16 is off in places."""
    scale = oracles.flatten(expected).norm()
    assert scale > 0
    error = oracles.flatten({name: found[name].cpu() - value for name, value in expected.items()}).norm() / scale
    assert error < tolerance


@every_case
@every_edge
@pytest.mark.parametrize("words", [{}, {"offload": True}, {"max_samples": 5}], ids=str)
def test_squares_are_those_of_batches_and_of_samples(name, edges, words):
    case = CASES[name]
    if case.inseparable:
        pytest.skip("its batches cannot be cut")
    model, count = case.model(), words.get("max_samples", SAMPLES)
    found = fp.flow(model, batches_of(case, edges), needs=("g2", "g2_sample"), **case.words, **words)
    cut = (*(edge for edge in edges if edge < count), count)
    close(found.g2, squares(case, model, cut), 1e-10)
    close(found.g2_sample, squares(case, model, tuple(range(count + 1))), 1e-10)


def test_parts_were_parts():
    """Else the budgets above would show nothing."""
    model, seen = mlp(), []
    words = {"needs": ("g", "Hg")}
    budget = int(1.3 * least(model, [(X, Y)], **words))
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    fp.flow(model, (X, Y), max_memory=budget, **words)
    assert seen[-1] < SAMPLES
