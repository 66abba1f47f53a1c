"""Sweeps within a budget of memory, with sums on the host, in mixed precision: the same derivatives."""

import gc

import cases
import oracles
import pytest
import torch
from budgets import images, least, wide_net
from cases import CASES, every_case
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.gradients.batches.memory_budget import Peak

KINDS = ("g", "g2", "g2_sample", "Hg")


def counting(seen):
    def closure(model, batch):
        seen.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1])

    return closure


def peak_of(work):
    gc.collect()
    with Peak() as memory:
        work()
    return memory.peak


def test_what_is_made_where_a_freed_tensor_was_counts():
    """An address known of a tensor from before is forgotten with it: another one there is new."""
    before = torch.ones(1000)
    with Peak() as memory:
        made = before + 1
        assert len(memory._known) == 2
        del before
        assert len(memory._known) == 1
    assert memory.live == made.nbytes


@pytest.mark.parametrize("needs", [("g",), ("g", "g2"), KINDS])
@pytest.mark.parametrize("sizes", [(16,), (16, 7, 1)], ids=["one batch", "several"])
@pytest.mark.parametrize("share", [0.2, 0.5, 3.0])
def test_the_peak_stays_under_the_budget_and_the_result_is_the_same(needs, sizes, share):
    model, data = wide_net(), images(*sizes)
    whole = peak_of(lambda: fp.flow(model, data, needs=needs, progress=False))
    budget = max(int(share * whole), int(1.01 * least(model, data, needs=needs)))
    expected = fp.flow(model, data, needs=needs)
    seen = []
    fp.flow(model, data, needs=needs, max_memory=budget, closure=counting(seen))
    taken = peak_of(lambda: fp.flow(model, data, needs=needs, max_memory=budget))
    assert taken <= budget
    if share < 0.5:
        assert max(seen) > 1, "no smaller than it must be"
        assert 16 not in seen, "whole batches do not fit"
    found = fp.flow(model, data, needs=needs, max_memory=budget)
    assert found.samples == sum(sizes)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    for kind in needs:
        oracles.assert_named_close(getattr(found, kind), getattr(expected, kind), 1e-9)


@every_case
@pytest.mark.parametrize(
    "options", [{"max_memory": "1GB"}, {"offload": True}, {"offload": True, "max_memory": "1GB"}], ids=str
)
def test_every_net_with_room_to_spare_and_on_the_host(case, options):
    model, batches = case.model(), case.batches((5, 2, 1, 3))
    expected, found = oracles.dense(model, batches), fp.flow(model, batches, needs=KINDS, **options)
    oracles.assert_named_close(found.g, expected.g, case.tolerance)
    oracles.assert_named_close(found.Hg, expected.Hg, case.tolerance)
    oracles.assert_named_close(found.g2, oracles.squared_gradients(model, batches), case.tolerance)


def passes(budget):
    model, data, seen = wide_net(), images(6, 6, 6, 6), []
    point = fp.flow(model, data, closure=counting(seen), max_memory=budget, reduction="mean")
    oracles.assert_named_close(point.Hg, fp.flow(model, data).Hg, 1e-9)
    assert budget is None or budget == "1GB" or peak_of(lambda: fp.flow(model, data, max_memory=budget)) <= budget
    return seen.count(6)


def test_graphs_that_fit_are_kept_for_the_second_sweep():
    """Each kept graph saves running the model on its batch once more."""
    assert passes(None) == 8
    assert passes("1GB") == 4
    whole = peak_of(lambda: fp.flow(wide_net(), images(6, 6, 6, 6)))
    counts = [passes(int(share * whole)) for share in (1.2, 1.8, 2.4, 3.0, 5.0)]
    assert counts == sorted(counts, reverse=True)
    assert set(counts) - {4, 8}, "some kept, some not"


class Places(nn.Module):
    """Looks its positions up in a buffer, which the graph of its gradient then holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("places", torch.arange(5))
        self.embed, self.mix, self.out = nn.Embedding(5, 4), nn.Linear(4, 64), nn.Linear(64, 3)
        self.double()

    def forward(self, x):
        return self.out((self.mix(x) + self.mix(self.embed(self.places))).tanh().mean(1))


def test_buffers_that_kept_graphs_hold_are_not_written():
    model = Places()
    data = [(torch.randn(n, 5, 4, dtype=torch.float64), torch.arange(n) % 3) for n in (3, 1, 4)]
    expected = fp.flow(model, data)
    found = fp.flow(model, data, max_memory="1GB")
    oracles.assert_named_close(found.g, expected.g)
    oracles.assert_named_close(found.Hg, expected.Hg)


def test_where_everything_fits_one_sample_is_tried_once():
    """More runs are made only where a budget might not do."""
    seen, model = [], wide_net()
    whole = peak_of(lambda: fp.flow(model, images(6, 6)))
    words = {"closure": counting(seen), "check": False, "reduction": "mean"}
    fp.flow(model, images(6, 6), max_memory="1GB", **words)
    assert [size for size in seen if size < 3] == [1]
    seen.clear()
    fp.flow(model, images(6, 6), max_memory=int(1.2 * whole), **words)
    assert [size for size in seen if size < 3] == [1, 1, 2]


def test_randomness_in_eval_mode_is_the_same_for_kept_and_other_graphs():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = wide_net()

        def forward(self, x):
            return self.net(F.dropout(x, 0.5, training=True))

    data = images(6, 6, 6, 6)
    torch.manual_seed(3)
    expected = fp.flow(Noisy(), data)
    for share in (1.8, 2.4, 10):
        torch.manual_seed(3)
        budget = int(share * peak_of(lambda: fp.flow(wide_net(), data)))
        torch.manual_seed(3)
        found = fp.flow(Noisy(), data, max_memory=budget)
        oracles.assert_named_close(found.g, expected.g, 1e-9)
        oracles.assert_named_close(found.Hg, expected.Hg, 1e-9)


def test_one_batch_of_an_iterator_may_be_cut():
    model, data = wide_net(), images(16)
    budget = int(1.5 * least(model, data))
    oracles.assert_named_close(fp.flow(model, iter(data), max_memory=budget).Hg, fp.flow(model, data).Hg, 1e-9)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.cross_entropy(x, y, reduction="sum"),
        lambda x, y: F.cross_entropy(x, y) + x.sum(0).square().sum(),
        lambda x, y: F.cross_entropy(x, y, weight=x.new_tensor([1.0, 5.0, 20.0])),
    ],
    ids=["sum", "over the batch", "weighted"],
)
def test_a_loss_that_is_no_mean_over_samples_cannot_be_cut(loss):
    model, data = wide_net(), images(16)
    budget = int(1.5 * least(model, data, needs=("g",)))
    with pytest.raises(
        ValueError,
        match=r"max_memory= cuts batches, which needs a loss that is a mean over samples or tokens, or a sum: that "
        r"of .*; say how it reduces a batch with reduction=",
    ):
        fp.flow(model, data, loss=loss, needs=("g",), max_memory=budget)
    fp.flow(model, data, loss=loss, needs=("g",), max_memory="1GB")


def test_batch_norm_in_train_mode_cannot_be_cut():
    with pytest.raises(
        ValueError, match=r"max_memory= cuts batches, and '1' takes its statistics over a whole one .mode='train'"
    ):
        fp.flow(wide_net(), images(8), mode="train", max_memory="1GB")


@pytest.mark.parametrize("size", [0, -1, "2 GB/s", "lots", 1.5, True, ""])
def test_a_budget_that_is_none(size):
    with pytest.raises(
        ValueError, match="max_memory should be a number of bytes above 0 or text such as '2GB' or '512MiB', got"
    ):
        fp.flow(cases.mlp(), CASES["mlp"].batch(4), max_memory=size)


def test_global_prune_and_scores_hand_the_options_on():
    for options in ({"max_memory": 1}, {"autocast": torch.float16}):
        for call in (
            fp.scores,
            lambda *args, **options: fp.global_prune(args[0], args[1], 0.5, data=args[2], **options),
        ):
            with pytest.raises(ValueError, match="max_memory|autocast"):
                call(wide_net(), "loss_preservation", images(4), **options)
    masks = []
    for options in ({}, {"max_memory": "2MB", "offload": True}):
        model = wide_net()
        torch.manual_seed(1)
        fp.global_prune(model, "gradient_norm_preservation", 0.5, data=images(9, 4), **options)
        masks.append(fp.masks(model))
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


# On the host


def test_offloading_where_nothing_curves():
    """The second derivative of a hinge in a linear model is 0, for which autograd hands out nothing."""
    model = nn.Linear(4, 1)
    ranked = lambda model, batch: F.margin_ranking_loss(model(batch[0]), model(batch[1]), torch.ones(5, 1))
    found = fp.flow(model, (torch.randn(5, 4), torch.randn(5, 4)), closure=ranked, offload=True)
    assert bool(found.g["weight"].any())
    assert not any(value.any() for value in found.Hg.values())


def test_no_hook_is_left_by_offloading():
    model = wide_net()
    fp.flow(model, images(4), offload=True)
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_what_is_kept_on_the_host_is_read_on_the_parameters_device():
    point = fp.Flow(theta={"w": torch.empty(2, device="meta")}, g={"w": torch.ones(2)})
    assert point.tensors("g")["w"].device.type == "meta"
    assert {name: value.device.type for name, value in point.tensors("g").items()} == {"w": "meta"}
    assert point.g["w"].device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloading_from_a_gpu():
    model, data = wide_net(), images(6, 6)
    expected = fp.flow(model, data)
    found = fp.flow(model.cuda(), data, offload=True)
    assert found.Hg["0.weight"].device.type == "cpu"
    oracles.assert_named_close(found.Hg, expected.Hg, 1e-9)
    report = fp.global_prune(model, "gradient_norm_preservation", 0.5, data=data, offload=True)
    assert report.pruned == round(0.5 * report.units)


# Mixed precision


def test_autocast_runs_the_model_in_bfloat16_and_sums_in_float32():
    model, data = wide_net().float(), [(x.float(), y) for x, y in images(6, 6)]
    kinds = []
    model[3].register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    expected, found = fp.flow(model, data, needs=KINDS), fp.flow(model, data, needs=KINDS, autocast=torch.bfloat16)
    assert set(kinds) == {torch.float32, torch.bfloat16}
    for kind in KINDS:
        values, others = oracles.flatten(getattr(found, kind)), oracles.flatten(getattr(expected, kind))
        assert values.dtype == torch.float32
        error = (values - others).norm() / others.norm()
        assert 1e-6 < error < 0.1, kind


def test_autocast_takes_bfloat16_only():
    with pytest.raises(ValueError, match=r"autocast should be torch.bfloat16 or None \(gradients underflow in float16"):
        fp.flow(cases.mlp(), CASES["mlp"].batch(4), autocast=torch.float16)


class AnySize(nn.Module):
    """Images of any size, so that a batch of large ones is cut where one of small ones is kept."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(1, 4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.out(self.conv(x).tanh().mean((2, 3)))


@pytest.mark.parametrize("sides", [(4, 16), (16, 4), (4, 16, 4), (4, 4, 16, 4)], ids=str)
@pytest.mark.parametrize("share", [1.1, 1.6, 3.0])
def test_graphs_that_are_kept_are_those_of_the_last_batches(sides, share):
    """Of a kept batch before one that is not, the second sweep would read the batch again and leave the other out."""
    model = AnySize()
    batches = [(torch.randn(4, 1, side, side, dtype=torch.float64), torch.arange(4) % 3) for side in sides]
    budget = int(share * max(least(model, [batch]) for batch in batches))
    expected, found = fp.flow(model, batches), fp.flow(model, batches, max_memory=budget)
    oracles.assert_named_close(found.g, expected.g, 1e-10)
    oracles.assert_named_close(found.Hg, expected.Hg, 1e-10)


@pytest.mark.parametrize("ignored", [{0}, {3}, {1, 3}, {2, 3}], ids=str)
def test_batches_of_which_all_is_ignored_beside_kept_graphs(ignored):
    model, batches = wide_net(), images(4, 4, 4, 4)
    batches = [(x, torch.full((4,), -100) if i in ignored else y) for i, (x, y) in enumerate(batches)]
    expected, found = fp.flow(model, batches), fp.flow(model, batches, max_memory="100MB")
    assert found.loss == pytest.approx(expected.loss)
    oracles.assert_named_close(found.Hg, expected.Hg, 1e-10)
