"""Means over batches, and over parts of them, against one batch of everything; losses that are no mean of samples."""

from functools import partial
from itertools import pairwise

import cases
import oracles
import pytest
import torch
from budgets import images, least, wide_net
from cases import CASES
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp

VOCABULARY, LENGTH = 7, 6
WEIGHT = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)


class Output(dict):
    def __getattr__(self, name):
        return self[name]


class LanguageModel(nn.Module):
    """Logits for each token, and a loss of its own over those of the labels that are not -100."""

    def __init__(self, causal, extra=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(VOCABULARY, 4), nn.RNN(4, 5, batch_first=True)
        self.head, self.causal, self.extra = nn.Linear(5, VOCABULARY), causal, extra
        self.double()

    def forward(self, input_ids, labels=None):
        logits = self.head(self.mix(self.embed(input_ids))[0])
        scored, wanted = (logits[:, :-1], labels[:, 1:]) if self.causal else (logits, labels)
        loss = F.cross_entropy(scored.flatten(0, 1), wanted.flatten()) + self.extra * logits.square().mean()
        return Output(loss=loss, logits=logits)


def padded(lengths):
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (len(lengths), LENGTH))
    labels = torch.where(torch.arange(LENGTH) < torch.tensor(lengths)[:, None], ids, -100)
    return {"input_ids": ids, "labels": labels}


def rows(batch, *edges):
    return [{key: value[a:b] for key, value in batch.items()} for a, b in pairwise(edges)]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
def test_a_language_models_mean_is_over_all_tokens(causal):
    model, whole = LanguageModel(causal), padded([6, 6, 2, 3, 6, 0, 2])
    expected = fp.flow(model, whole)
    found = fp.flow(model, rows(whole, 0, 2, 4, 5, 6, 7))
    assert found.samples == 7
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    oracles.assert_named_close(found.g, expected.g, 1e-10)
    oracles.assert_named_close(found.Hg, expected.Hg, 1e-10)
    by_samples = fp.flow(model, rows(whole, 0, 2, 4, 5, 7), reduction="mean")
    assert by_samples.loss != pytest.approx(expected.loss, rel=1e-3)


def test_a_language_models_other_loss_is_taken_for_a_mean_over_samples():
    model, whole = LanguageModel(causal=True, extra=0.5), padded([6, 6, 2, 3])
    batches = rows(whole, 0, 1, 4)
    losses = [fp.flow(model, batch, needs=("g",)).loss for batch in batches]
    assert fp.flow(model, batches, needs=("g",)).loss == pytest.approx((losses[0] + 3 * losses[1]) / 4)


def summed(output, target):
    return F.cross_entropy(output, target, reduction="sum")


SUMS = {
    "told": {"loss": summed, "reduction": "sum"},
    "module": {"loss": nn.CrossEntropyLoss(reduction="sum")},
    "partial": {"loss": partial(F.cross_entropy, reduction="sum")},
}


@pytest.mark.parametrize("words", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("sizes", [(6,), (5, 2, 1, 3)], ids=["one batch", "uneven"])
def test_a_sum_weighs_as_a_sum(words, sizes):
    model, batches = cases.mlp(), CASES["mlp"].batches(sizes)
    expected = fp.flow(model, batches, needs=("g", "g2", "g2_sample", "Hg"))
    found = fp.flow(model, batches, needs=("g", "g2", "g2_sample", "Hg"), **words)
    assert found.loss == pytest.approx(expected.loss)
    for kind in ("g", "g2", "g2_sample", "Hg"):
        oracles.assert_named_close(getattr(found, kind), getattr(expected, kind), 1e-10)


def ignoring(output, target):
    return F.cross_entropy(output, target, ignore_index=2)


OVER_PLACES = {
    "class weights": {"loss": nn.CrossEntropyLoss(weight=WEIGHT)},
    "class weights, set": {"loss": partial(F.cross_entropy, weight=WEIGHT)},
    "ignored": {"loss": nn.CrossEntropyLoss(ignore_index=2)},
    "told": {"loss": lambda x, y: F.cross_entropy(x, torch.where(y == 2, -100, y)), "reduction": "token"},
    "sum": {"loss": summed, "reduction": "sum"},
}


def sorted_batch():
    x, _ = images(16)[0]
    y = torch.tensor([0] * 7 + [1] * 5 + [2] * 4)
    return x, y


@pytest.mark.parametrize("name", OVER_PLACES)
@pytest.mark.parametrize("needs", [("g",), ("g", "Hg")], ids=["g", "Hg"])
def test_batches_and_parts_weigh_by_what_the_loss_is_a_mean_over(name, needs):
    """Classes one after the other, so that no part is like the whole."""
    model, (x, y), words = wide_net(), sorted_batch(), OVER_PLACES[name]
    if name == "told":
        y = torch.where(y == 2, -100, y)
        words = {"loss": lambda x, y: F.cross_entropy(x, y), "reduction": "token"}
    expected = fp.flow(model, (x, y), needs=needs, **words)
    batches = [(x[a:b], y[a:b]) for a, b in ((0, 5), (5, 11), (11, 16))]
    budget = int(1.5 * least(model, [(x, y)], needs=needs, **words))
    for found in (
        fp.flow(model, batches, needs=needs, **words),
        fp.flow(model, (x, y), needs=needs, max_memory=budget, **words),
    ):
        assert found.loss == pytest.approx(expected.loss)
        for kind in needs:
            oracles.assert_named_close(getattr(found, kind), getattr(expected, kind), 1e-9)


@pytest.mark.parametrize("reduction", [None, "sum"])
def test_a_loss_that_is_not_what_it_is_said_to_be_cannot_be_cut(reduction):
    """Of a batch sorted by class the first samples alone would pass."""
    model, batch = wide_net(), sorted_batch()
    loss = lambda x, y: F.cross_entropy(x, y, weight=WEIGHT)
    budget = int(1.5 * least(model, [batch], needs=("g",), loss=loss))
    with pytest.raises(ValueError, match="needs a loss that is a mean over samples or tokens, or a sum"):
        fp.flow(model, batch, needs=("g",), loss=loss, max_memory=budget, reduction=reduction)


def test_held_out_losses_and_predictions_weigh_alike():
    model, whole = LanguageModel(causal=True), padded([6, 6, 2, 3, 6, 2])
    batches = rows(whole, 0, 2, 4, 6)
    masks = {"head.weight": torch.arange(35).view(7, 5) % 3 > 0}
    one, many = (fp.predict(model, masks, data) for data in (whole, batches))
    assert (many.loss, many.first_order) == pytest.approx((one.loss, one.first_order))
    one, many = (fp.compare(model, "magnitude", 0.5, data).loss for data in (whole, batches))
    assert many == pytest.approx(one)


def test_all_ignored_and_an_unknown_word():
    batch = (torch.randn(4, 3), torch.full((4,), -100))
    with pytest.raises(ValueError, match="every target is ignored: there is nothing to take a mean loss over"):
        fp.flow(nn.Linear(3, 2), [batch, batch])
    with pytest.raises(ValueError, match="reduction should be one of"):
        fp.flow(nn.Linear(3, 2), batch, reduction="tokens")
