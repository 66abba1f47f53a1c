"""How many samples a batch has, told or read off it, and batches that are cut."""

import cases
import oracles
import pytest
import torch
from cases import CASES
from torch import nn

import torch_flowprune as fp
from torch_flowprune.inputs.data.batch_sizes import first, halves, parts, size_of, spread_out

X, Y = torch.randn(6, 4), torch.randint(3, (6,))
IMAGES = [torch.randn(3, 8 + i, 9) for i in range(4)]
BOXES = [{"boxes": torch.randn(2 + i, 4)} for i in range(4)]
READ = {
    "inputs and target": ((X, Y), 6),
    "a tensor": (X, 6),
    "a tuple of inputs and a shared mask": (((X, torch.ones(9, 9)), Y), 6),
    "a loader's list of inputs": ([[X, X], Y], 6),
    "a dict": ({"ids": X, "labels": Y}, 6),
    "a dict without a target": ({"ids": X, "y": Y}, 6),
    "a scalar beside": ((X, Y, torch.tensor(2.0)), 6),
    "a list of images, a list of boxes": ((IMAGES, BOXES), 4),
    "a list of images, a tensor": ((IMAGES, torch.zeros(4)), 4),
    "texts": ((["a", "b"], torch.zeros(2)), 2),
}
UNTOLD = {
    "time first": ((torch.randn(7, 5, 4), torch.zeros(5)), "7 in the inputs, 5 in the target"),
    "one sample without an axis for it": ((X[0], Y[0]), "4 in the inputs, no one length in the target"),
    "two readings": ([[X, X], [Y, Y]], "2 or 6 in the inputs, 2 or 6 in the target"),
    "tensors of several lengths": ({"a": X, "b": torch.zeros(5)}, "no one length in the inputs"),
    "an object": (object(), "no one length in the inputs"),
}


@pytest.mark.parametrize(("batch", "size"), READ.values(), ids=READ)
def test_what_inputs_and_target_agree_on(batch, size):
    assert size_of(batch) == size


@pytest.mark.parametrize(("batch", "text"), UNTOLD.values(), ids=UNTOLD)
def test_what_cannot_be_told_asks(batch, text):
    with pytest.raises(ValueError, match=rf"the number of samples in a batch is unclear: {text}; .*pass batch_size="):
        size_of(batch)
    assert size_of(batch, 5) == size_of(batch, lambda _: 5) == 5


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "3", lambda batch: 0, lambda batch: None])
def test_a_size_out_of_range(size):
    with pytest.raises(ValueError, match="batch_size should be a whole number of at least 1, or a function"):
        fp.flow(cases.mlp(), CASES["mlp"].batch(4), batch_size=size)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.RNN(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][-1])


def test_batches_weigh_by_the_samples_they_are_told_to_have():
    torch.manual_seed(0)
    model = TimeFirst().double()
    batches = [(torch.randn(7, k, 5, dtype=torch.double), torch.randint(3, (k,))) for k in (5, 2)]
    found = fp.flow(model, batches, batch_size=lambda batch: len(batch[1]))
    everything = [(torch.cat([x for x, _ in batches], 1), torch.cat([y for _, y in batches]))]
    expected = oracles.dense(model, everything)
    assert found.samples == 7
    oracles.assert_named_close(found.g, expected.g)
    oracles.assert_named_close(found.Hg, expected.Hg)


@pytest.mark.parametrize(
    "words", [{"max_samples": 3}, {"needs": ("g2_sample",)}], ids=["max_samples", "sample squares"]
)
def test_a_batch_that_cannot_be_cut_is_not(words):
    batch = (torch.randn(7, 5, 5), torch.randint(3, (5,)))
    with pytest.raises(ValueError, match="cut a batch, which should have its 5 samples along the first axis"):
        fp.flow(TimeFirst(), batch, batch_size=5, **{"needs": ("g",), **words})


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return torch.stack([self.conv(image[None]).tanh().mean((2, 3))[0] for image in images])


def distance(output, boxes):
    return torch.stack([(o - b["boxes"].mean(0)).square().sum() for o, b in zip(output, boxes, strict=True)]).mean()


def test_lists_of_samples_weigh_by_their_entries_and_are_cut_in_them():
    model = Detector()
    found = fp.flow(model, [(IMAGES[:3], BOXES[:3]), (IMAGES[3:], BOXES[3:])], loss=distance, needs=("g", "g2_sample"))
    single = [
        torch.autograd.grad(distance(model([i]), [b]), list(model.parameters()))
        for i, b in zip(IMAGES, BOXES, strict=True)
    ]
    for name, gradients in zip(("conv.weight", "conv.bias"), zip(*single, strict=True), strict=True):
        torch.testing.assert_close(found.g[name], torch.stack(gradients).mean(0))
        torch.testing.assert_close(found.g2_sample[name], torch.stack(gradients).square().mean(0))
    assert fp.flow(model, [(IMAGES, BOXES)], loss=distance, needs=("g",), max_samples=3).samples == 3


def test_lists_as_long_as_the_batch():
    """Two inputs, two samples: whole tensors, cut each. Three images of three channels: the boxes tell."""
    pair = [[torch.randn(2, 5), torch.randn(2, 7)], torch.zeros(2)]
    assert [tuple(x.shape) for x in first(pair, 2, 1)[0]] == [(1, 5), (1, 7)]
    assert first((IMAGES[:3], BOXES[:3]), 3, 2)[0] == IMAGES[:2]


def test_cut_batches_are_those_samples():
    batch = {"x": X, "labels": Y, "mask": torch.ones(9, 9)}
    pieces = [part for part, _ in parts(batch, 6, 4)]
    assert [len(piece["x"]) for piece in pieces] == [3, 3]
    assert all(piece["mask"].shape == (9, 9) for piece in pieces)
    torch.testing.assert_close(torch.cat([piece["x"] for piece in pieces]), X)
    (even, two), (odd, also_two) = halves((IMAGES, BOXES), 4)
    assert (even[0], odd[1], two, also_two) == (IMAGES[::2], BOXES[1::2], 2, 2)
    assert [size for _, size in halves((X[:5], Y[:5]), 5)] == [3, 2]
    assert halves((X[:1], Y[:1]), 1) == []
    torch.testing.assert_close(first((X, Y), 6, 2)[0], X[:2])
    torch.testing.assert_close(spread_out((X, Y), 6, 2)[0], X[[0, 3]])


@pytest.mark.parametrize("count", [4, 30])
def test_class_balanced_needs_a_class_for_each_sample(count):
    data = torch.utils.data.TensorDataset(torch.zeros(10, 2), torch.zeros(10))
    with pytest.raises(ValueError, match=f"targets= should have an entry for each sample, got {count} for 10"):
        fp.class_balanced(data, 1, targets=[0] * count)


def test_a_list_of_tensors_alike_is_asked_about():
    """It may be input and target, from a loader, or batches of inputs."""
    x = [torch.randn(3, 5), torch.randn(3, 5)]
    words = {"loss": nn.functional.mse_loss, "needs": ("g",)}
    with pytest.raises(ValueError, match="data= is a list of 2 tensors alike, which may be one batch or several"):
        fp.flow(nn.Linear(5, 5), x, **words)
    assert fp.flow(nn.Linear(5, 5), tuple(x), **words).samples == 3
    assert (
        fp.flow(nn.Linear(5, 5), [(one,) for one in x], closure=lambda m, b: m(b[0]).mean(), needs=("g",)).samples == 6
    )
    assert fp.flow(nn.Linear(5, 3), [x[0], torch.arange(3)], needs=("g",)).samples == 3
    pruner = fp.Pruner(nn.Linear(5, 5), "grasp", 0.5, loss=nn.functional.mse_loss)
    pruner.track(x)  # which is always one batch


def test_halves_of_one_batch_have_its_form():
    kinds = set()

    def closure(model, batch):
        kinds.add(type(batch))
        return model(batch).square().mean()

    fp.diagnose(nn.Linear(5, 3), torch.randn(6, 5), method="obd", closure=closure)
    assert kinds == {torch.Tensor}


AXES = {
    "time first": (((SEQUENCE := torch.randn(7, 5, 4)), torch.zeros(5)), (1, 0), 5),
    "time first, target too": ((SEQUENCE, torch.zeros(7, 5)), 1, 5),
    "an axis that the target has not": ((SEQUENCE, torch.zeros(5)), 1, 5),
    "a shared mask": (((X, torch.ones(6, 6)), Y), ((0, None), 0), 6),
    "a key": ({"mask": torch.ones(9, 9), "x": X}, {"mask": None}, 6),
    "a key of the target": ({"x": X, "labels": torch.zeros(2, 6)}, {"labels": 1}, 6),
}


@pytest.mark.parametrize(("batch", "along", "size"), AXES.values(), ids=AXES)
def test_samples_along_other_axes(batch, along, size):
    assert size_of(batch, None, along) == size
    whole = [part for part, _ in parts(batch, size, 2, along)]
    assert len(whole) > 1
    assert sum(size_of(part, None, along) for part in whole) == size


def test_what_is_shared_stays_whole():
    (x, mask), y = first(((X, torch.ones(6, 6)), Y), 6, 2, ((0, None), 0))
    assert (x.shape, mask.shape, y.shape) == ((2, 4), (6, 6), (2,))
    cut = first((SEQUENCE, torch.zeros(5)), 5, 2, (1, 0))
    torch.testing.assert_close(cut[0], SEQUENCE[:, :2])
    even, odd = halves({"x": X, "mask": torch.ones(6, 6)}, 6, {"mask": None})
    assert even[0]["mask"].shape == odd[0]["mask"].shape == (6, 6)


@pytest.mark.parametrize("along", [-1, 1.5, True, "x", (0, "y"), {"mask": -1}])
def test_an_axis_out_of_range(along):
    with pytest.raises(ValueError, match="batch_dim should be the axis that samples lie along"):
        fp.flow(cases.mlp(), CASES["mlp"].batch(4), batch_dim=along)


def test_an_axis_nested_otherwise_than_the_batch():
    with pytest.raises(ValueError, match="should be nested as the batch is, which has a tuple of 2 parts there"):
        fp.flow(cases.mlp(), CASES["mlp"].batch(4), batch_dim=(0, 0, 0))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, mask):
        q = self.q(x)
        return self.out(nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).mean(1))


def test_squares_of_samples_that_are_cut_wrongly_are_an_error():
    """A shared mask that is as long as there are samples, and a loss that looks across them."""
    torch.manual_seed(0)
    x, mask, y = torch.randn(6, 6, 4), torch.randn(6, 6) * 3, torch.randint(3, (6,))
    with pytest.raises(ValueError, match=r"the loss of batch 0 is .*, and the mean of its samples' losses"):
        fp.flow(Attending(), ((x, mask), y), needs=("g2_sample",))
    across = lambda output, target: (output - output.mean(0)).square().mean()
    for data in ((X, Y), [(X, Y), (X, Y)]):
        with pytest.raises(ValueError, match="need samples that do not depend on each other"):
            fp.scores(nn.Linear(4, 3), ["fisher_sample", "grasp"], data, loss=across, reduction="mean")
    fp.flow(nn.Sequential(nn.Linear(4, 3), nn.Dropout()), (X, Y), needs=("g2_sample",), mode="train")


def test_a_report_says_how_samples_were_counted():
    told = fp.global_prune(cases.mlp(), "snip", 0.5, data=CASES["mlp"].batch(4), batch_size=4)
    assert "over 4 samples (counted as batch_size= says)" in str(told)
    assert fp.flow(TimeFirst(), (torch.randn(7, 5, 5), torch.arange(5) % 3), batch_dim=1).counted.startswith(
        "along batch_dim="
    )


def test_more_samples_than_the_data_have():
    batches = CASES["mlp"].batches((4, 3))
    for call in (fp.flow, fp.diagnose, lambda *data, **words: fp.scores(data[0], "snip", data[1], **words)):
        with pytest.warns(UserWarning, match="max_samples=8, and the data has 7: all of them were read"):
            call(cases.mlp(), batches, max_samples=8)
        call(cases.mlp(), batches, max_samples=7)
