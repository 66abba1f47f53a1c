"""The diagnosis against the dense derivatives, and rank correlation against the textbook."""

import json

import cases
import oracles
import pytest
import torch
from cases import CASES, every_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_flowprune as fp
from torch_flowprune.analysis.rank_correlation import spearman


@every_case
def test_every_number_is_the_dense_one(case):
    model, batches = case.model(), case.batches((4, 3))
    dense, theta = oracles.dense(model, batches), oracles.trainable(model)
    found = fp.diagnose(model, batches)
    assert (found.samples, found.method) == (7, "loss_preservation")
    assert found.loss == pytest.approx(dense.loss, rel=1e-9)
    for layer in found.layers:
        t, g, h = theta[layer.name], dense.g[layer.name], dense.Hg[layer.name]
        expected = {
            "weights": t.numel(),
            "theta_norm": (t * t).sum(),
            "theta_norm_rate": -2 * (t * g).sum(),
            "gradient_norm": (g * g).sum(),
            "theta_norm_acceleration": 2 * ((g * g).sum() + (t * h).sum()),
            "theta_Hg": (t * h).sum(),
            "zero_share": ((t * g) == 0).double().mean(),
        }
        for name, value in expected.items():
            assert getattr(layer, name) == pytest.approx(float(value), rel=1e4 * case.tolerance, abs=1e-12), name
    for name in ("weights", "theta_norm", "theta_norm_rate", "gradient_norm", "theta_norm_acceleration", "theta_Hg"):
        assert getattr(found.total, name) == pytest.approx(
            sum(getattr(layer, name) for layer in found.layers), rel=1e-9, abs=1e-14
        )


@pytest.mark.parametrize("split", ["batches", "one batch"])
def test_stability_is_the_correlation_of_two_halves(split):
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 4, 4, 4))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    data, halves = (batches, (batches[::2], batches[1::2])) if split == "batches" else ((x, y), None)
    found = fp.diagnose(model, data, method="taylor")
    options = halves or (((x[0::2], y[0::2]), (x[1::2], y[1::2])), ((x[:8], y[:8]), (x[8:], y[8:])))
    pairs = [halves] if halves else options
    candidates = []
    for one, other in pairs:
        a, b = (fp.scores(model, "taylor", half)["0.weight"] for half in (one, other))
        candidates.append(spearman(a, b))
    assert any(found.layers[0].stability == pytest.approx(value, abs=1e-9) for value in candidates)
    assert -1 <= found.total.stability <= 1


@pytest.mark.parametrize(("limit", "even", "odd"), [(12, 6, 6), (7, 4, 3), (3, 2, 1), (100, 8, 8)])
@pytest.mark.filterwarnings("ignore:max_samples=100, and the data has 16")
def test_the_halves_share_the_samples_that_the_diagnosis_may_read(limit, even, odd):
    """Each half has its share of ``max_samples``: stability is of as many samples as the scores are."""
    model, batches = cases.mlp(), CASES["mlp"].batches((2,) * 8)
    found = fp.diagnose(model, batches, method="taylor", max_samples=limit)
    one, other = (
        fp.scores(model, "taylor", batches[start::2], max_samples=each) for start, each in ((0, even), (1, odd))
    )
    assert found.samples == min(limit, 16)
    for layer in found.layers:
        assert layer.stability == pytest.approx(spearman(one[layer.name], other[layer.name]), abs=1e-12)


def test_one_sample_that_may_be_read_has_no_halves():
    found = fp.diagnose(cases.mlp(), CASES["mlp"].batches((2,) * 8), method="taylor", max_samples=1)
    assert (found.samples, found.total.stability) == (1, None)


@pytest.mark.filterwarnings("ignore:the diagonal of H from")
@pytest.mark.parametrize("options", [{}, {"batch_size": 5}, {"max_samples": 4}, {"mode": "train"}], ids=str)
@pytest.mark.parametrize("sizes", [(5,), (5, 5, 3)], ids=["one batch", "batches"])
@pytest.mark.parametrize("method", ["grasp", "fisher", "fisher_sample", "synflow", "obd", "wanda"])
def test_all_of_it_is_that_of_flows_over_the_data_and_its_halves(method, sizes, options):
    """Whatever a measure reads: the two sweeps give what a flow over all, two over halves and a prediction give."""
    model = cases.mlp() if method == "wanda" else cases.cnn()
    case = CASES["mlp" if method == "wanda" else "cnn"]
    batches = case.batches(sizes)
    if "batch_size" in options and sizes != (5,):
        pytest.skip("the batches are of several sizes")
    if options.get("mode") == "train" and method == "fisher_sample":
        pytest.skip("a norm takes its statistics over the batch")
    name = next(name for name, value in model.named_parameters() if value.dim() > 1)
    masks = {name: torch.rand(model.get_parameter(name).shape) < 0.5}
    torch.manual_seed(3)
    found = fp.diagnose(model, batches, masks=masks, method=method, include=[name], **options)
    limit = options.get("max_samples", sum(sizes))
    if len(batches) == 1:
        x, y = (part[:limit] for part in batches[0])
        pair = [[(x[start::2], y[start::2])] for start in (0, 1)]
    else:
        cut = [(x[:limit], y[:limit]) for x, y in batches][: 1 if limit < 5 else None]
        pair = (
            [cut[start::2] for start in (0, 1)]
            if len(cut) > 1
            else [[(cut[0][0][s::2], cut[0][1][s::2])] for s in (0, 1)]
        )
    kept = {key: value for key, value in options.items() if key == "mode"}
    whole = fp.flow(model, batches, parameters=[name], **options)
    assert found.layers[0].theta_Hg == pytest.approx(
        float((whole.theta[name] * whole.Hg[name]).sum()), rel=1e-9, abs=1e-12
    )
    assert found.loss == pytest.approx(whole.loss, rel=1e-12)
    prediction = fp.predict(model, masks, batches, **options)
    for key, value in vars(prediction).items():
        assert getattr(found.prediction, key) == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), key
    if method not in ("obd", "synflow"):  # draws anew for each; of no data
        one, other = (fp.scores(model, method, half, include=[name], **kept)[name] for half in pair)
        assert found.layers[0].stability == pytest.approx(spearman(one, other), abs=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["taylor", "grasp", "fisher"])
def test_every_batch_is_read_twice(method, masked):
    model, reads = cases.mlp(), []
    batches = CASES["mlp"].batches((4, 4, 4))

    def closure(model, batch):
        reads.append(len(batch[0]))
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    masks = {"0.weight": torch.rand(5, 4) < 0.5} if masked else None
    words = {"check": False, "reduction": "mean"}  # what is told is not tried
    fp.diagnose(model, batches, masks=masks, method=method, closure=closure, **words)
    assert reads == [4] * 6


@pytest.mark.parametrize(("method", "expected"), [("taylor", [4, 2, 2, 4]), ("grasp", [4, 2, 2, 4, 2, 2])])
def test_halves_of_one_batch_are_read_again_only_for_their_own_products(method, expected):
    reads = []

    def closure(model, batch):
        reads.append(len(batch[0]))
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    fp.diagnose(cases.mlp(), [CASES["mlp"].batch(4)], method=method, closure=closure, check=False)
    assert reads == expected


class Changing:
    """Data of another size, or other data, each time that they are read."""

    def __init__(self, *readings):
        self.readings, self.read = readings, 0

    def __iter__(self):
        self.read += 1
        return iter(self.readings[min(self.read, len(self.readings)) - 1])


@pytest.mark.parametrize(
    ("sizes", "text"),
    [((3, 3), "the data gave 7 samples on the first sweep, 6 on the second"), ((4, 3), "the loss of batch 0 was")],
)
def test_other_data_in_the_second_sweep_are_an_error(sizes, text):
    first, second = CASES["mlp"].batches((4, 3)), CASES["mlp"].batches(sizes)
    if sizes == (4, 3):
        second = [(x + 1, y) for x, y in second]
    with pytest.raises(ValueError, match=text):
        fp.diagnose(cases.mlp(), Changing(first, second))


def test_squares_of_samples_need_norms_that_look_at_one():
    with pytest.raises(ValueError, match="g2_sample runs each sample alone, and '1' takes its statistics over"):
        fp.diagnose(cases.cnn(), CASES["cnn"].batches((4, 3)), method="fisher_sample", mode="train")


def test_a_frozen_layer_is_in_the_prediction_and_not_in_the_flow():
    """What a cut does is over all parameters; where the model stands, over those it trains."""
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 3))
    model[2].weight.requires_grad_(False)
    masks = {"2.weight": torch.rand(model[2].weight.shape) < 0.5}
    found = fp.diagnose(model, batches, masks=masks, include=["0.weight"])
    whole = fp.flow(model, batches)
    assert found.layers[0].theta_Hg == pytest.approx(float((whole.theta["0.weight"] * whole.Hg["0.weight"]).sum()))
    predicted = fp.predict(model, masks, batches)
    assert found.prediction.curvature == pytest.approx(predicted.curvature, rel=1e-9)
    assert not model[2].weight.requires_grad


def test_halves_of_a_shuffled_loader_share_no_sample():
    """Two identical halves would show a correlation of 1 whatever the data: on noise it must be far from it."""
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.arange(64) % 3
    for own in (None, torch.Generator().manual_seed(0)):
        seen = []
        loader = DataLoader(
            TensorDataset(torch.cat([x, torch.arange(64.0).double()[:, None]], 1), y),
            batch_size=8,
            shuffle=True,
            generator=own,
        )

        def closure(model, batch, seen=seen):
            seen.append(batch[0][:, 4].tolist())
            return torch.nn.functional.cross_entropy(model(batch[0][:, :4]), batch[1])

        fp.diagnose(cases.mlp(), loader, closure=closure)
        first, second = seen[-8:-4], seen[-4:]
        assert not {i for batch in first for i in batch} & {i for batch in second for i in batch}


@pytest.mark.parametrize("own", [False, True], ids=["global generator", "own generator"])
def test_no_trace(own):
    model, source = cases.cnn().train(), torch.Generator().manual_seed(3) if own else None
    x, y = CASES["cnn"].batch(10)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=source)
    before = (
        torch.get_rng_state(),
        {name: value.clone() for name, value in model.state_dict().items()},
        source and source.get_state(),
    )
    fp.diagnose(model, loader, mode="train")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    assert model.training
    if own:
        assert torch.equal(source.get_state(), before[2])


def test_one_sample_has_no_halves():
    found = fp.diagnose(cases.mlp(), CASES["mlp"].batch(1))
    assert found.total.stability is None
    assert found.table().splitlines()[1].endswith("-")


def test_a_one_shot_iterator_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="read only once: pass a list or a DataLoader"):
        fp.diagnose(cases.mlp(), iter([CASES["mlp"].batch(4)]))


def test_a_proposed_cut_is_predicted_and_not_made():
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 3))
    masks = {"0.weight": torch.rand(5, 4) < 0.5}

    def loss(output, target):
        return torch.nn.functional.cross_entropy(output, target) / 2

    found = fp.diagnose(model, batches, loss, masks=masks, temperature=2.0)
    assert found.prediction == fp.predict(model, masks, batches, loss=loss, temperature=2.0)
    assert found.loss == found.prediction.loss < fp.diagnose(model, batches, temperature=2.0).loss
    assert fp.masks(model) == {}
    assert str(found).endswith(str(found.prediction))
    assert json.loads(json.dumps(found.to_dict()))["prediction"]["curvature"] == found.prediction.curvature


def test_of_channels_and_blocks_the_norms_are_of_all_that_is_read():
    """Layers that make the same channels are one row, and so is a block of several layers."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    torch.manual_seed(0)
    model = Residual()
    data = (torch.randn(6, 4), torch.randint(2, (6,)))
    channels = fp.diagnose(model, data, granularity="channel")
    shared = [model.stem, model.blocks[0][2], model.blocks[1][2]]
    stream = next(layer for layer in channels.layers if layer.name == "stem.weight")
    assert stream.weights == sum(layer.weight.numel() for layer in shared)
    assert stream.theta_norm == pytest.approx(sum(layer.weight.square().sum().item() for layer in shared))
    assert channels.total.weights == sum(layer.weight.numel() for layer in (*shared, *(b[0] for b in model.blocks)))
    blocks = fp.diagnose(model, data, granularity="block")
    assert [layer.name for layer in blocks.layers] == ["blocks.0", "blocks.1"]
    for layer, block in zip(blocks.layers, model.blocks, strict=True):
        weights = [block[0].weight, block[2].weight]
        assert layer.theta_norm == pytest.approx(sum(weight.square().sum().item() for weight in weights))


def test_bad_arguments():
    with pytest.raises(TypeError, match="diagnose does not take sparsity=: it takes model, data, loss, "):
        fp.diagnose(cases.mlp(), CASES["mlp"].batch(4), sparsity=0.5)
    with pytest.raises(ValueError, match="has no parameter 'nope'"):
        fp.diagnose(cases.mlp(), CASES["mlp"].batch(4), masks={"nope": torch.ones(1).bool()})


def test_table_and_dict():
    found = fp.diagnose(cases.cnn(), CASES["cnn"].batches((4, 3)), granularity="filter", method="grasp", include="3")
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["name"] == "3.weight"
    header, row, total = found.table().splitlines()
    assert (header.split()[0], row.split()[0], total.split()[0]) == ("parameter", "3.weight", "total")
    assert str(found).startswith(
        f"loss {found.loss:.4g} over 7 samples; zeros and stability are of the gradient_norm_increase scores\n"
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=20))
def test_spearman_is_scipys(pairs):
    stats = pytest.importorskip("scipy.stats")
    one, other = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    found = spearman(one, other)
    if one.unique().numel() == 1 or other.unique().numel() == 1:
        assert found != found
    else:
        assert found == pytest.approx(stats.spearmanr(one.numpy(), other.numpy()).statistic, abs=1e-9)
