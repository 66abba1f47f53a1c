"""Losses whose kernels have no second derivative: those in their place give torch's value and gradient, and H·g."""

import itertools

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.gradients.operators import twice_differentiable

CLASSES, TIMES = 5, 9
LABELS = torch.tensor([[1, 1, 2], [3, 4, 1], [2, 0, 0], [1, 2, 3]])
LASTING, LENGTHS = torch.tensor([9, 8, 5, 9]), torch.tensor([3, 2, 1, 3])
IN_A_ROW = torch.cat([row[:n] for row, n in zip(LABELS, LENGTHS, strict=True)])


def ctc(*targets, normalised=True, **words):
    return lambda x: F.ctc_loss(x.log_softmax(-1) if normalised else x, *targets, **words)


MEANT = torch.tensor([[0, 1, -1, 2], [3, -1, 0, 1], [-1, 0, 1, 2], [0, 1, 2, 3], [2, 0, -1, -1]])
CLASS, WEIGHT = torch.tensor([0, 3, 1, 1, 2]), torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
SEQUENCE, ROWS = (TIMES, 4, CLASSES), (5, 4)
LOSSES = {
    **{f"ctc, {how}": (ctc(LABELS, LASTING, LENGTHS, reduction=how), SEQUENCE) for how in ("mean", "sum", "none")},
    "ctc, labels in a row": (ctc(IN_A_ROW, tuple(LASTING.tolist()), tuple(LENGTHS.tolist())), SEQUENCE),
    "ctc, another blank": (ctc(LABELS.clamp(max=3), LASTING, LENGTHS, blank=4), SEQUENCE),
    "ctc, no probabilities": (ctc(LABELS, LASTING, LENGTHS, normalised=False), SEQUENCE),
    "ctc, nothing said": (ctc(LABELS, LASTING, torch.tensor([3, 2, 0, 3])), SEQUENCE),
    "ctc, too short": (ctc(LABELS, torch.tensor([9, 8, 5, 2]), LENGTHS, zero_infinity=True), SEQUENCE),
    "ctc, one": (ctc(LABELS[0], torch.tensor(9), torch.tensor(3), reduction="none"), (TIMES, CLASSES)),
    **{
        f"margins, p={p}, {how}, {'weights' if weight is not None else 'no weights'}": (
            lambda x, p=p, how=how, weight=weight: F.multi_margin_loss(
                x, CLASS, p=p, margin=0.7, weight=weight, reduction=how
            ).square(),
            ROWS,
        )
        for p, how, weight in itertools.product((1, 2), ("mean", "sum", "none"), (None, WEIGHT))
    },
    "margins, one": (lambda x: F.multi_margin_loss(x, CLASS[1], p=2), ROWS[1:]),
    **{
        f"labels, {how}": (lambda x, how=how: F.multilabel_margin_loss(x, MEANT, reduction=how).square(), ROWS)
        for how in ("mean", "sum", "none")
    },
    "labels, one": (lambda x: F.multilabel_margin_loss(x, MEANT[0]).square(), ROWS[1:]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_gradient_and_its_change(name):
    loss, shape = LOSSES[name]
    torch.manual_seed(0)
    x, v = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    value = loss(x)
    with twice_differentiable():
        found = loss(x)
        (g,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        (product,) = torch.autograd.grad(g, x, v)
    torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g, *torch.autograd.grad(value.sum(), x), rtol=1e-10, atol=1e-12)
    sides = [(x.detach() + sign * 1e-6 * v).requires_grad_() for sign in (1, -1)]
    ahead, behind = (torch.autograd.grad(loss(side).sum(), side)[0] for side in sides)
    torch.testing.assert_close(product, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)


def test_a_sample_that_cannot_be_said_in_time_has_an_infinite_loss():
    x = torch.randn(SEQUENCE).log_softmax(-1)
    words = {"input_lengths": torch.tensor([9, 8, 5, 2]), "target_lengths": LENGTHS, "reduction": "none"}
    with twice_differentiable():
        found = F.ctc_loss(x, LABELS, **words)
    torch.testing.assert_close(found, F.ctc_loss(x, LABELS, **words))


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.read, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, CLASSES)
        self.double()

    def forward(self, x):
        return self.out(self.read(x)[0]).log_softmax(-1).transpose(0, 1)


def test_a_speech_model_is_scored_by_second_order_measures():
    model, x = Speech(), torch.randn(4, TIMES, 3, dtype=torch.float64)
    loss = lambda output, target: F.ctc_loss(output, *target)
    batches = [(x[a:b], (LABELS[a:b], LASTING[a:b], LENGTHS[a:b])) for a, b in ((0, 3), (3, 4))]
    found = fp.flow(model, batches, loss=loss, check=True)
    whole = lambda: loss(model(x), (LABELS, LASTING, LENGTHS))
    parameters = dict(model.named_parameters())
    with twice_differentiable():
        g = torch.autograd.grad(whole(), list(parameters.values()), create_graph=True)
        product = torch.autograd.grad(g, list(parameters.values()), [value.detach() for value in g])
    plain = torch.autograd.grad(whole(), list(parameters.values()))
    oracles.assert_named_close(found.g, dict(zip(parameters, plain, strict=True)), 1e-10)
    oracles.assert_named_close(found.Hg, dict(zip(parameters, product, strict=True)), 1e-10)
