"""Means over batches, and over parts of them, against one batch of everything; losses that are no mean of samples."""

import copy
import warnings
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
    with pytest.warns(UserWarning, match="batches are weighted by their samples"):
        found = fp.flow(model, batches, needs=("g",))
    assert found.loss == pytest.approx((losses[0] + 3 * losses[1]) / 4)


class TwoHeads(LanguageModel):
    """Of several outputs, none of which is called logits, and the sum of their losses."""

    def forward(self, input_ids, labels=None):
        output = super().forward(input_ids, labels)
        return Output(loss=output["loss"] + output["logits"].square().mean(), tokens=output["logits"], pooled=None)


def test_a_model_of_several_heads_is_taken_for_a_mean_over_samples():
    model, whole = TwoHeads(causal=False), padded([6, 6, 2, 3])
    batches = rows(whole, 0, 1, 4)
    losses = [fp.flow(model, batch, needs=("g",)).loss for batch in batches]
    with pytest.warns(UserWarning, match="batches are weighted by their samples"):
        found = fp.flow(model, batches, needs=("g",))
    assert found.loss == pytest.approx((losses[0] + 3 * losses[1]) / 4)


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
    with pytest.raises(ValueError, match="reduction= should give how many terms the loss of a batch is the mean of"):
        fp.flow(nn.Linear(3, 2), batch, reduction=lambda batch: float("nan"))


NOT_OVER_SAMPLES = {
    "ignored": lambda x, y: F.cross_entropy(x, y, ignore_index=2),
    "a sum": lambda x, y: F.cross_entropy(x, y, reduction="sum"),
    "across samples": lambda x, y: F.cross_entropy(x, y) + x.mean(0).square().sum(),
}


@pytest.mark.parametrize("needs", [("g",), ("Hg",), ("diagH",)], ids=str)
@pytest.mark.parametrize("name", NOT_OVER_SAMPLES)
def test_a_loss_that_is_no_mean_over_samples_is_told_of(name, needs):
    """Where it matters, which is of several batches; said once what it is, it is not."""
    model, x, y = cases.mlp(), *CASES["mlp"].batches((12,))[0]
    y = torch.arange(12) % 3
    batches, loss = [(x[:5], y[:5]), (x[5:], y[5:])], NOT_OVER_SAMPLES[name]
    with pytest.warns(
        UserWarning, match="batches are weighted by their samples, as if the loss were a mean over these"
    ):
        fp.flow(model, batches, needs=needs, loss=loss, probes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.flow(model, (x, y), needs=needs, loss=loss, probes=1)
        fp.flow(model, batches, needs=needs, loss=loss, probes=1, reduction="mean")
        fp.flow(model, batches, needs=needs, loss=lambda x, y: F.cross_entropy(x, y), probes=1)


def test_a_diagnosis_and_a_prediction_tell_of_it_too():
    model, batches = cases.mlp(), CASES["mlp"].batches((5, 6))
    masks = {"0.weight": torch.arange(model[0].weight.numel()).view_as(model[0].weight) % 3 > 0}
    loss = NOT_OVER_SAMPLES["a sum"]
    for call in (partial(fp.predict, model, masks), partial(fp.diagnose, model)):
        with pytest.warns(UserWarning, match="batches are weighted by their samples"):
            call(data=batches, loss=loss)


def weighted_inside(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], weight=WEIGHT)


@pytest.mark.parametrize("sizes", [(5, 2, 5, 4), (1,) * 16], ids=["uneven", "one sample each"])
@pytest.mark.parametrize("call", [fp.flow, fp.diagnose])
def test_weights_that_the_first_batches_do_not_show_are_told_of(sizes, call):
    """Classes come one after the other, so that no batch of the first has more than one weight."""
    model, (x, y) = wide_net(), sorted_batch()
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    with pytest.warns(
        UserWarning, match="batches are weighted by their samples, as if the loss were a mean over these"
    ):
        call(model, data=batches, closure=weighted_inside)


@pytest.mark.parametrize("forms", [list, lambda x: {"x": x}], ids=["lists", "dicts"])
def test_a_loss_over_samples_in_batches_that_do_not_go_together_is_not_told_of(forms):
    model = nn.Linear(4, 3)
    batches = [(forms(torch.randn(length, 4)), torch.randn(length, 3)) for length in (5, 2, 4)]
    read = lambda model, batch: F.mse_loss(model(torch.stack(batch[0]) if forms is list else batch[0]["x"]), batch[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.flow(model, batches, needs=("g",), closure=read)


class Summed(nn.CrossEntropyLoss):
    """A forward of its own, which the class it is made from says nothing of."""

    def forward(self, output, target):
        return len(target) * super().forward(output, target)


class Warmed(nn.CrossEntropyLoss):
    def forward(self, output, target):
        return super().forward(output / 2, target)


def test_a_loss_made_from_torchs_is_looked_at():
    model, x, y = nn.Linear(4, 3).double(), torch.randn(16, 4).double(), sorted_batch()[1]
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    with pytest.warns(UserWarning, match="batches are weighted by their samples, as if"):
        fp.flow(model, batches, needs=("g",), loss=Summed())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fp.flow(model, batches, needs=("g",), loss=Warmed(weight=WEIGHT))
    expected = fp.flow(model, (x, y), needs=("g",), loss=nn.CrossEntropyLoss(weight=WEIGHT), temperature=2.0)
    oracles.assert_named_close(found.g, expected.g, 1e-10)


def test_small_differences_are_told_of_in_mixed_precision():
    """The look is at the loss in full precision, where the code runs so."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(12, 4), torch.arange(12) % 3
    loss = lambda o, t: F.cross_entropy(o, t) + 0.01 * o.mean(0).square().sum()
    with pytest.warns(UserWarning, match="batches are weighted by their samples, as if"):
        fp.flow(model, [(x[:5], y[:5]), (x[5:], y[5:])], needs=("g",), loss=loss, autocast=torch.bfloat16)


def test_weights_that_some_parts_do_not_show_cannot_be_cut():
    """Of five samples, three of one class, the first two that are looked at weigh alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    batch = torch.randn(5, 4), torch.tensor([0, 0, 0, 1, 1])
    words = {"loss": lambda x, y: F.cross_entropy(x, y, weight=torch.tensor([1.0, 20.0])), "needs": ("g", "Hg")}
    budget = int(1.3 * least(model, [batch], **words))
    with pytest.raises(ValueError, match="needs a loss that is a mean over samples or tokens, or a sum"):
        fp.flow(model, batch, max_memory=budget, **words)


def noised(model, batch):
    """As diffusion models are trained: a step and a noise of its own for each sample."""
    x = batch[0]
    step, noise = torch.rand(len(x), 1, dtype=x.dtype), torch.randn_like(x)
    return F.mse_loss(model((1 - step) * x + step * noise), noise[:, :3])


def hidden_in_part(model, batch):
    """As masked autoencoders are trained."""
    x = batch[0]
    kept = torch.rand_like(x) < 0.5
    errors = (model(x * kept) - x[:, :3]).square()
    return (errors * ~kept[:, :3]).sum() / (~kept[:, :3]).sum().clamp(min=1)


@pytest.mark.parametrize("closure", [noised, hidden_in_part])
@pytest.mark.parametrize("sizes", [(12,), (5, 6)], ids=["one batch", "two"])
@pytest.mark.parametrize("way", ["in parts", "by samples"])
def test_a_loss_that_draws_runs_in_parts_and_by_samples(closure, sizes, way):
    """Each with draws of its own; H·g is how g changes along g, by the same draws."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).double(), []
    data = [(torch.randn(size, 4, dtype=torch.float64), None) for size in sizes]
    words = {"closure": closure, "needs": ("g", "Hg")}
    if way == "in parts":
        words["max_memory"] = int(1.3 * max(least(model, [batch], **words) for batch in data))
    else:
        words["needs"] = ("g", "Hg", "g2_sample")

    def at(step, along):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter.add_(step * along.get(name, 0))
        torch.manual_seed(3)
        return fp.flow(moved, data, **words)

    found = at(0, {})
    ahead, behind = at(1e-5, found.g), at(-1e-5, found.g)
    change = {name: (ahead.g[name] - behind.g[name]) / 2e-5 for name in found.g}
    oracles.assert_named_close(found.Hg, change, 1e-6)
    if way == "by samples":
        assert all((value >= 0).all() and value.any() for value in found.g2_sample.values())


def test_a_loss_that_draws_is_not_told_of():
    """Its halves tell nothing."""
    model, batches = cases.mlp(), CASES["mlp"].batches((5, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.flow(model, batches, needs=("g",), loss=lambda x, y: F.cross_entropy(x + torch.randn_like(x), y))


def of_itself(model, batch, teacher):
    return F.kl_div(model(batch[0]).log_softmax(1), teacher(batch[0]).softmax(1), reduction="batchmean")


def of_a_critic(model, batch, teacher):
    return (model(batch[0]) - model(batch[0] * (1 + 1e-5))).mean()


def of_an_advantage(model, batch, teacher):
    """As policies are trained: 1 times what sums to 0 over a batch, not over its half."""
    ratio = (model(batch[0]) - teacher(batch[0])).mean(1).exp()
    return (ratio * batch[1]).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("closure", [of_itself, of_a_critic, of_an_advantage])
def test_what_cancels_is_told_apart_to_rounding_of_what_it_is_made_of(closure, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)
    teacher, x = copy.deepcopy(model), torch.randn(6, 4, dtype=dtype)
    advantage = torch.randn(6, dtype=dtype)
    data = [(x, advantage - advantage.mean())] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.flow(model, data, needs=("g",), closure=partial(closure, teacher=teacher))


def test_a_function_says_what_a_batch_counts_for():
    """Of a loss whose own mean is over what it counts, whatever that is."""
    model, (x, y) = wide_net(), sorted_batch()
    words = {"loss": ignoring, "reduction": lambda batch: (batch[1] != 2).sum()}
    needs = ("g", "g2_sample", "Hg")
    expected = fp.flow(model, (x, y), needs=needs, **words)
    batches = [(x[a:b], y[a:b]) for a, b in ((0, 5), (5, 11), (11, 13), (13, 16))]  # the last has nothing that counts
    budget = int(1.5 * least(model, [(x, y)], needs=needs, **words))
    for found in (
        fp.flow(model, batches, needs=needs, **words),
        fp.flow(model, (x, y), needs=needs, max_memory=budget, **words),
    ):
        for kind in needs:
            oracles.assert_named_close(getattr(found, kind), getattr(expected, kind), 1e-9)


class InFloat32(nn.Module):
    """Of a model in float64, logits as language models give them."""

    def __init__(self):
        super().__init__()
        self.net = wide_net()

    def forward(self, x):
        return self.net(x).float()


def test_losses_in_fewer_digits_than_the_model_has_are_not_taken_for_other_data():
    model, batches = InFloat32(), images(6, 5)
    needs = ("g", "g2_sample", "Hg")
    budget = int(1.5 * max(least(model, [batch], needs=needs) for batch in batches))
    expected, found = fp.flow(model, batches, needs=needs), fp.flow(model, batches, needs=needs, max_memory=budget)
    for kind in needs:
        oracles.assert_named_close(getattr(found, kind), getattr(expected, kind), 1e-5)


def penalised(model, batch):
    """As critics are trained: the loss takes a gradient itself."""
    x = batch[0].clone().requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return F.cross_entropy(y, batch[1]) + (slope.flatten(1).norm(dim=1) - 1).square().mean()


def test_a_model_that_knows_its_batchs_size_is_not_run_on_fewer():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, x):
            return self.net(x.view(4, 3))

    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(2)]
    assert fp.flow(Fixed(), batches, loss=lambda o, t: F.cross_entropy(o, t)).samples == 8


def test_a_closure_may_ask_for_a_graph():
    """As one does that checks what it returns."""

    def checked(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if not loss.requires_grad:
            raise ValueError("something is detached")
        return loss

    model, batches = cases.mlp(), CASES["mlp"].batches((5, 6))
    found = fp.flow(model, batches, needs=("g",), closure=checked)
    oracles.assert_named_close(found.g, fp.flow(model, batches, needs=("g",)).g)
    assert fp.compare(model, "magnitude", 0.5, batches, closure=checked).loss == pytest.approx(found.loss)


def test_a_loss_that_takes_gradients_itself_runs_in_parts_and_is_compared():
    model, batches = wide_net(), images(6, 5)
    words = {"closure": penalised, "needs": ("g", "Hg")}
    budget = int(1.5 * max(least(model, [batch], **words) for batch in batches))
    expected, found = fp.flow(model, batches, **words), fp.flow(model, batches, max_memory=budget, **words)
    for kind in words["needs"]:
        oracles.assert_named_close(getattr(found, kind), getattr(expected, kind), 1e-9)
    assert fp.compare(model, "magnitude", 0.5, batches, closure=penalised).loss == pytest.approx(expected.loss)
