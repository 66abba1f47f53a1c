"""theta, g, g2 and H·g against the whole Hessian, on every tiny net and from every kind of data."""

import contextlib
import copy

import cases
import oracles
import pytest
import torch
from cases import CASES, every_case
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import torch_flowprune as fp

UNEVEN = (5, 2, 1, 3)


@every_case
@pytest.mark.parametrize("sizes", [(6,), (4, 4), UNEVEN], ids=["one batch", "even", "uneven"])
def test_g_and_Hg_are_the_dense_ones(case, sizes):
    model, batches = case.model(), case.batches(sizes)
    expected = oracles.dense(model, batches)
    found = fp.flow(model, batches, loss=F.cross_entropy)
    assert found.samples == sum(sizes)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    oracles.assert_named_close(found.theta, oracles.trainable(model), 1e-15)
    oracles.assert_named_close(found.g, expected.g, case.tolerance)
    oracles.assert_named_close(found.Hg, expected.Hg, case.tolerance)


@every_case
def test_squared_gradients(case):
    model, batches = case.model(), case.batches(UNEVEN)
    found = fp.flow(model, batches, needs=("g2", "g2_sample"))
    assert found.g is None
    assert found.Hg is None
    oracles.assert_named_close(found.g2, oracles.squared_gradients(model, batches), case.tolerance)
    single = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(y))]
    oracles.assert_named_close(found.g2_sample, oracles.squared_gradients(model, single), case.tolerance)


def test_squared_gradients_come_with_a_single_graph_too():
    model, batch = cases.cnn(), CASES["cnn"].batch(4)
    found = fp.flow(model, batch, needs=("g2", "g2_sample", "Hg"))
    oracles.assert_named_close(found.g2, oracles.squared_gradients(model, [batch]))
    single = [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(4)]
    oracles.assert_named_close(found.g2_sample, oracles.squared_gradients(model, single))
    oracles.assert_named_close(found.Hg, oracles.dense(model, [batch]).Hg)


@pytest.mark.parametrize("sizes", [(6,), (5, 4, 3)])
def test_train_mode_takes_batch_statistics(sizes):
    model, batches = cases.cnn(), CASES["cnn"].batches(sizes)
    found = fp.flow(model, batches, mode="train")
    expected = oracles.dense(copy.deepcopy(model).train(), batches)
    oracles.assert_named_close(found.g, expected.g)
    oracles.assert_named_close(found.Hg, expected.Hg)
    assert (found.g["0.weight"] - oracles.dense(model, batches).g["0.weight"]).abs().max() > 1e-3, (
        "train and eval must differ here"
    )


def test_eval_mode_also_for_a_model_left_in_train_mode():
    model, batches = cases.cnn(), CASES["cnn"].batches((4, 3))
    expected = oracles.dense(model, batches)
    oracles.assert_named_close(fp.flow(model.train(), batches).Hg, expected.Hg)


def test_dropout_is_the_same_for_g_and_H_in_train_mode():
    """The second sweep sees the masks of the first: with one dropout mask a batch, H·g is that of a fixed function."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    batches = CASES["mlp"].batches((4, 4, 4))
    torch.manual_seed(5)
    losses, seen = [], []

    def closure(model, batch):
        seen.append(torch.get_rng_state())
        losses.append(F.cross_entropy(model(batch[0]), batch[1]))
        return losses[-1]

    fp.flow(model, batches, closure=closure, mode="train")
    assert len(losses) == 6
    assert torch.stack(losses[:3]).tolist() == torch.stack(losses[3:]).tolist()
    assert losses[0] != losses[1]


@pytest.mark.parametrize("temperature", [0.5, 5.0, 200.0])
def test_temperature_divides_the_logits(temperature):
    model, batches = cases.mlp(), CASES["mlp"].batches()
    expected = oracles.dense(model, batches, lambda x, y: F.cross_entropy(x / temperature, y))
    found = fp.flow(model, batches, temperature=temperature)
    oracles.assert_named_close(found.g, expected.g)
    oracles.assert_named_close(found.Hg, expected.Hg)


@pytest.mark.parametrize("count", [1, 4, 5, 6, 10, 11, 99])
def test_max_samples_is_exact(count):
    model, batches = cases.mlp(), CASES["mlp"].batches((5, 5, 1))
    x, y = (torch.cat(parts)[:count] for parts in zip(*batches, strict=True))
    larger = pytest.warns(UserWarning, match="max_samples=99, and the data has 11: all of them were read")
    with larger if count > 11 else contextlib.nullcontext():
        found = fp.flow(model, batches, max_samples=count)
    assert found.samples == len(y) == min(count, 11)
    expected = oracles.dense(model, [(x, y)])
    oracles.assert_named_close(found.g, expected.g)
    oracles.assert_named_close(found.Hg, expected.Hg)


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "3"])
def test_max_samples_must_be_a_positive_whole_number(count):
    with pytest.raises(
        ValueError, match="max_samples should be a whole number of at least 1, or None for all the data, got"
    ):
        fp.flow(cases.mlp(), CASES["mlp"].batches(), max_samples=count)


def test_own_loss_and_closure():
    model, (x, y) = cases.mlp(), CASES["mlp"].batch(6)
    onehot = F.one_hot(y, 3).double()
    expected = oracles.dense(model, [(x, onehot)], lambda out, t: F.mse_loss(out, t) + 0.1 * out.square().mean())
    by_loss = fp.flow(model, (x, onehot), loss=lambda out, t: F.mse_loss(out, t) + 0.1 * out.square().mean())
    by_closure = fp.flow(
        model,
        [{"x": x, "t": onehot}],
        closure=lambda m, b: F.mse_loss(out := m(b["x"]), b["t"]) + 0.1 * out.square().mean(),
    )
    for found in (by_loss, by_closure):
        oracles.assert_named_close(found.g, expected.g)
        oracles.assert_named_close(found.Hg, expected.Hg)


class HuggingFace(nn.Module):
    """A model called with keywords, that returns its own loss when it is given labels."""

    def __init__(self, output):
        super().__init__()
        self.net, self.output = cases.mlp(), output

    def forward(self, features, attention_mask=None, labels=None):
        logits = self.net(features)
        return self.output(None if labels is None else F.cross_entropy(logits, labels), logits)


class Output:
    def __init__(self, loss, logits):
        self.loss, self.logits = loss, logits


OUTPUTS = {"object": Output, "dict": lambda loss, logits: {"loss": loss, "logits": logits}}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("options", [{}, {"loss": F.cross_entropy}], ids=["the model's loss", "a loss"])
def test_dict_batches(output, options):
    batches = CASES["mlp"].batches((4, 2))
    expected = oracles.dense(cases.mlp(), batches)
    found = fp.flow(HuggingFace(output), [{"features": x, "labels": y} for x, y in batches], **options)
    oracles.assert_named_close({name.removeprefix("net."): value for name, value in found.g.items()}, expected.g)
    oracles.assert_named_close({name.removeprefix("net."): value for name, value in found.Hg.items()}, expected.Hg)
    assert found.samples == 6


def test_dict_batches_with_a_temperature_do_not_take_the_models_loss():
    batches = CASES["mlp"].batches((4, 2))
    expected = oracles.dense(cases.mlp(), batches, lambda x, y: F.cross_entropy(x / 5, y))
    found = fp.flow(HuggingFace(Output), [{"features": x, "label": y} for x, y in batches], temperature=5.0)
    oracles.assert_named_close({name.removeprefix("net."): value for name, value in found.Hg.items()}, expected.Hg)


def test_a_dict_batch_may_be_the_data():
    x, y = CASES["mlp"].batch(4)
    assert fp.flow(HuggingFace(Output), {"features": x, "labels": y}).samples == 4


def test_several_inputs_are_the_models_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = cases.mlp()

        def forward(self, a, b):
            return self.net(a - b)

    x, y = CASES["mlp"].batch(5)
    other = torch.ones_like(x)
    expected = oracles.dense(cases.mlp(), [(x - other, y)])
    found = fp.flow(Two(), [((x, other), y)])
    oracles.assert_named_close({name.removeprefix("net."): value for name, value in found.g.items()}, expected.g)


def test_a_loss_of_shape_one_is_one_number():
    model, batch = cases.mlp(), CASES["mlp"].batch(4)
    found = fp.flow(model, batch, loss=lambda x, y: F.cross_entropy(x, y).reshape(1, 1))
    oracles.assert_named_close(found.Hg, oracles.dense(model, [batch]).Hg)


# Which parameters


def test_a_frozen_parameter_takes_part_only_when_it_is_named():
    model, batches = cases.mlp(), CASES["mlp"].batches()
    model[0].requires_grad_(False)
    rest = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = oracles.dense(model, batches, names=rest)
    found = fp.flow(model, batches)
    oracles.assert_named_close(found.Hg, expected.Hg)
    assert "0.weight" not in found.g

    named = fp.flow(model, batches, parameters=["0.weight"])
    expected = oracles.dense(model, batches, names=["0.weight", *rest])
    oracles.assert_named_close(named.Hg, expected.Hg)
    assert [p.requires_grad for p in model[0].parameters()] == [False, False]


def test_a_wholly_frozen_model_can_be_scored():
    model, batches = cases.mlp(), CASES["mlp"].batches()
    weights = [name for name, _ in model.named_parameters() if "weight" in name]
    expected = oracles.dense(model, batches, names=weights)
    model.requires_grad_(False)
    oracles.assert_named_close(fp.flow(model, batches, parameters=weights).Hg, expected.Hg)


def test_nothing_to_differentiate_is_an_error():
    model = cases.mlp().requires_grad_(False)
    with pytest.raises(
        ValueError,
        match="no parameter of this model requires a gradient: unfreeze some, or name those to score in parameters=",
    ):
        fp.flow(model, CASES["mlp"].batches())


def test_no_such_parameter():
    with pytest.raises(ValueError, match="no such parameter: 0.wieght"):
        fp.flow(cases.mlp(), CASES["mlp"].batches(), parameters=["0.wieght"])


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_unreached_parameters_are_zero_and_named(sizes):
    model, batches = Unreached(), CASES["mlp"].batches(sizes)
    with pytest.warns(
        UserWarning, match=r"the loss does not reach spare\.weight, spare\.bias: their gradient counts as 0"
    ):
        found = fp.flow(model, batches)
    assert not found.g["spare.weight"].any()
    assert not found.Hg["spare.weight"].any()
    expected = oracles.dense(model.used, batches)
    torch.testing.assert_close(found.Hg["used.weight"], expected.Hg["weight"], rtol=1e-10, atol=0)


def test_a_parameter_reached_by_one_batch_only_is_no_surprise(recwarn):
    model = Unreached()
    model.forward = lambda x: model.used(x) if len(x) == 2 else model.spare(x)
    found = fp.flow(model, CASES["mlp"].batches((2, 3)))
    assert not [w for w in recwarn if "does not reach" in str(w.message)]
    assert found.g["spare.weight"].any()


def test_a_linear_objective_has_no_curvature():
    model = nn.Linear(4, 2).double()
    found = fp.flow(model, CASES["mlp"].batches((2, 2)), closure=lambda m, b: m(b[0]).mean())
    assert found.g["weight"].any()
    assert not found.Hg["weight"].any()


# theta0


def test_theta0_from_a_state_dict():
    model, initial = cases.mlp(), CASES["mlp"].model(seed=7).state_dict()
    found = fp.flow(model, needs=(), theta0=initial)
    assert list(found.theta0) == list(found.theta)
    assert all(torch.equal(found.theta0[name], initial[name]) for name in found.theta)


def test_theta0_of_a_model_pruned_since():
    model = cases.mlp()
    initial = copy.deepcopy(model.state_dict())
    fp.global_prune(model, sparsity=0.5)
    assert torch.equal(fp.flow(model, needs=(), theta0=initial).theta0["0.weight"], initial["0.weight"])


def test_theta0_with_an_entry_missing_or_misshapen():
    initial = cases.mlp().state_dict()
    with pytest.raises(ValueError, match=r"theta0\['0.weight'\] has shape \(2, 2\), the parameter \(5, 4\)"):
        fp.flow(cases.mlp(), needs=(), theta0={**initial, "0.weight": torch.zeros(2, 2)})
    del initial["2.bias"]
    with pytest.raises(ValueError, match="theta0 has no entry for '2.bias': pass a state dict of this model"):
        fp.flow(cases.mlp(), needs=(), theta0=initial)


# The data


def test_a_one_shot_iterator_serves_one_sweep():
    model, batches = cases.mlp(), CASES["mlp"].batches((3, 3))
    oracles.assert_named_close(fp.flow(model, iter(batches), needs=("g",)).g, oracles.dense(model, batches).g)
    oracles.assert_named_close(fp.flow(model, iter(batches[:1])).Hg, oracles.dense(model, batches[:1]).Hg)


def test_a_one_shot_iterator_cannot_serve_two():
    with pytest.raises(
        ValueError,
        match="two sweeps over the data, and this iterator can be read only once: pass a list or a DataLoader",
    ):
        fp.flow(cases.mlp(), (batch for batch in CASES["mlp"].batches((3, 3))))


def test_data_that_shrink_between_the_sweeps():
    class Shrinking:
        reads = 0

        def __iter__(self):
            Shrinking.reads += 1
            return iter(CASES["mlp"].batches((3, 3, 3) if Shrinking.reads < 2 else (3,)))

    with pytest.raises(
        ValueError, match="the data gave 9 samples on the first sweep, .* on the second: g and H need the same data"
    ):
        fp.flow(cases.mlp(), Shrinking())


@pytest.mark.parametrize("data", [[], iter(()), DataLoader([])], ids=["list", "iterator", "loader"])
@pytest.mark.parametrize("needs", [("g",), ("Hg",)])
def test_empty_data(data, needs):
    with pytest.raises(ValueError, match="the data is empty: at least one batch is needed"):
        fp.flow(cases.mlp(), data, needs=needs)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (None, ValueError, "this needs data: pass data="),
        (3, TypeError, "data= takes a DataLoader, any iterable of batches, or one batch, got int: 3"),
        ("train", TypeError, "data= takes a DataLoader, .* got str: 'train'"),
        (
            TensorDataset(torch.zeros(3, 4), torch.zeros(3)),
            TypeError,
            r"data= is a dataset \(TensorDataset\), .* wrap it in a torch.utils.data.DataLoader",
        ),
        (
            [torch.zeros(2, 4)],
            ValueError,
            r"a batch should be \(input, target\) or a dict, got a list of 1; for anything else pass closure=",
        ),
        (
            torch.zeros(2, 4),
            ValueError,
            r"a batch should be \(input, target\) or a dict, got one tensor of shape \(2, 4\)",
        ),
        (
            {"net_input": torch.zeros(2, 4)},
            ValueError,
            r"the keys of a dict batch should be what the model takes \(input\)",
        ),
    ],
)
def test_data_of_another_kind(data, error, text):
    with pytest.raises(error, match=text):
        fp.flow(cases.mlp(), data)


def test_an_output_that_is_no_logits():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = cases.mlp()

        def forward(self, x):
            return self.net(x), x

    with pytest.raises(
        TypeError, match=r"the model returned a tuple of 2, not logits: pass loss= a function of your own"
    ):
        fp.flow(Pair(), CASES["mlp"].batch(3))


# The loss


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (
            lambda x, y: F.cross_entropy(x, y, reduction="none"),
            r"the loss should be one number, got a tensor of shape \(4,\); use reduction='mean'",
        ),
        (lambda x, y: {"a": x.mean(), "b": y.sum()}, r"got a dict of a, b; add them up in a closure: sum\("),
        (lambda x, y: 3.0, "the loss should be one number, got a float; return the tensor that you call backward"),
        (lambda x, y: F.cross_entropy(x.detach(), y), "the loss does not depend on any parameter: it has no gradient"),
    ],
)
@pytest.mark.parametrize("needs", [("g",), ("Hg",)])
def test_a_loss_that_is_no_number(loss, text, needs):
    with pytest.raises(ValueError, match=text):
        fp.flow(cases.mlp(), CASES["mlp"].batch(4), loss=loss, needs=needs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sizes", [(4,), (4, 4)])
def test_a_loss_that_is_not_finite_names_its_batch(value, sizes):
    last = len(sizes) - 1
    batches = CASES["mlp"].batches(sizes)
    batches[last][0][0] = float("nan")
    loss = lambda x, y: F.cross_entropy(x, y) if x.isfinite().all() else x.nan_to_num().sum() * 0 + value
    with pytest.raises(ValueError, match=f"the loss of batch {last} is {value}: scores would mean nothing"):
        fp.flow(cases.mlp(), batches, loss=loss)


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_a_bad_temperature(temperature):
    with pytest.raises(ValueError, match="temperature should be above 0"):
        fp.flow(cases.mlp(), CASES["mlp"].batch(4), temperature=temperature)


@pytest.mark.parametrize("options", [{"loss": F.cross_entropy}, {"temperature": 2.0}])
def test_a_closure_stands_alone(options):
    with pytest.raises(ValueError, match="closure= computes the whole loss: give it alone"):
        fp.flow(cases.mlp(), CASES["mlp"].batch(4), closure=lambda model, batch: model(batch[0]).sum(), **options)


@pytest.mark.parametrize(
    ("name", "form"), [("loss", r"loss\(output, target\)"), ("closure", r"closure\(model, batch\)")]
)
def test_a_loss_by_its_name_is_refused(name, form):
    with pytest.raises(TypeError, match=rf"{name} should be a function, called as {form}, such as .*; got 'ce'"):
        fp.flow(cases.mlp(), CASES["mlp"].batch(4), **{name: "ce"})


def test_other_bad_arguments():
    model, batch = cases.mlp(), CASES["mlp"].batch(4)
    with pytest.raises(ValueError, match="mode should be 'eval' or 'train'"):
        fp.flow(model, batch, mode="test")
    with pytest.raises(ValueError, match="needs= names 'H', 'hg'; a flow has g, g2, g2_sample, Hg, gR"):
        fp.flow(model, batch, needs=("hg", "H"))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got function"):
        fp.flow(lambda x: x, batch)


def test_an_operator_without_a_second_derivative_says_so():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = cases.mlp()

        def forward(self, x):
            return torch.ops.aten.hardsigmoid(self.net(x))

    with pytest.raises(
        RuntimeError,
        match=r"H·g needs second derivatives, .* use a measure that reads only g \(torch says: derivative for "
        r"aten::hardsigmoid",
    ):
        fp.flow(Net(), CASES["mlp"].batch(4))
    assert fp.flow(Net(), CASES["mlp"].batch(4), needs=("g",)).g["net.0.weight"].any()


def test_asking_a_flow_for_what_it_has_not():
    point = fp.flow(cases.mlp(), needs=())
    with pytest.raises(ValueError, match=r"this flow has no 'Hg': compute it with needs=\('Hg',\)"):
        point.tensors("Hg")


def test_no_data_are_read_where_none_are_needed():
    point = fp.flow(cases.mlp(), iter([1 / 1]), needs=("theta",))
    assert point.loss is None
    assert point.samples == 0


# g and H over the same samples


def test_shuffled_data_are_the_same_for_g_and_H():
    """The second sweep sees the samples of the first, though the loader shuffles and max_samples takes only some."""
    x, y = CASES["mlp"].batch(30)
    loaders = {
        "global": DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
        "own": DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    }
    for loader in loaders.values():
        check_same_samples(loader)


class Augmented(Dataset):
    """Samples that carry fresh noise whenever they are read."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.randn(4, dtype=torch.float64) + i, i % 3


def test_augmented_data_are_the_same_for_g_and_H():
    check_same_samples(DataLoader(Augmented(), batch_size=4, shuffle=True))


def test_data_augmented_by_workers_are_the_same_for_g_and_H():
    check_same_samples(DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=1))


def test_augmented_data_are_the_same_for_g_and_H_under_dropout():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    check_same_samples(DataLoader(Augmented(), batch_size=4, shuffle=True), model, mode="train")


def check_same_samples(loader, model=None, **options):
    model, seen = model or cases.mlp(), []

    def closure(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        seen.append((batch[0].clone(), loss.item()))
        return loss

    fp.flow(model, loader, closure=closure, max_samples=14, reduction="mean", **options)
    half = len(seen) // 2
    assert half == 4
    for (x1, l1), (x2, l2) in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(x1, x2)
        assert l1 == l2


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_in_float32(dtype):
    model, batches = cases.mlp(dtype), CASES["mlp"].batches((4, 4), dtype)
    found = fp.flow(model, batches, needs=("g", "g2", "Hg"))
    for kind in ("theta", "g", "g2", "Hg"):
        assert {value.dtype for value in getattr(found, kind).values()} == {torch.float32}
    expected = oracles.dense(model.double(), [(x.double(), y) for x, y in batches])
    oracles.assert_named_close({name: value.double() for name, value in found.g.items()}, expected.g, 0.05)
    oracles.assert_named_close({name: value.double() for name, value in found.Hg.items()}, expected.Hg, 0.2)


# class_balanced


def test_class_balanced_is_exact():
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 0, 2, 1, 1])
    data = TensorDataset(torch.arange(10), labels)
    assert fp.class_balanced(data, 3).indices == [1, 4, 6, 2, 3, 8, 0, 5, 7]
    drawn = fp.class_balanced(data, 2, generator=torch.Generator().manual_seed(0))
    assert labels[drawn.indices].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(drawn.indices)) == 6
    assert drawn.indices == fp.class_balanced(data, 2, generator=torch.Generator().manual_seed(0)).indices
    assert (
        len({tuple(fp.class_balanced(data, 2, generator=torch.Generator().manual_seed(s)).indices) for s in range(9)})
        > 1
    )


def test_class_balanced_takes_all_of_a_class_that_has_just_enough():
    """The paper's code needs one sample more than it takes."""
    data = TensorDataset(torch.arange(4), torch.tensor([0, 1, 1, 0]))
    assert fp.class_balanced(data, 2).indices == [0, 3, 1, 2]
    with pytest.raises(ValueError, match="class 0 has 2 samples, per_class=3 asks for more"):
        fp.class_balanced(data, 3)
    with pytest.raises(ValueError, match="per_class should be at least 1, got 0"):
        fp.class_balanced(data, 0)


def test_class_balanced_reads_targets_without_reading_samples():
    class Images(Dataset):
        targets = [0, 1, 0, 1]

        def __len__(self):
            return 4

        def __getitem__(self, i):
            raise AssertionError("no sample need be read")

    assert fp.class_balanced(Images(), 1).indices == [0, 1]
    assert fp.class_balanced(Images(), 1, targets=[1, 1, 0, 0]).indices == [2, 0]


def test_the_papers_protocol():
    """Mean over classes of the class gradients, and of H_c ḡ: one batch a class of a balanced set."""
    model = cases.mlp()
    x, y = CASES["mlp"].batch(40)
    batches = list(DataLoader(fp.class_balanced(TensorDataset(x, y), 4), batch_size=4))
    assert [set(labels.tolist()) for _, labels in batches] == [{0}, {1}, {2}]
    each = [oracles.dense(model, [batch], lambda a, b: F.cross_entropy(a / 200, b)) for batch in batches]
    mean = sum(oracles.flatten(one.g) for one in each) / 3
    product = sum(one.H @ mean for one in each) / 3
    found = fp.flow(model, batches, temperature=200.0)
    assert (oracles.flatten(found.Hg) - product).norm() / product.norm() < 1e-10


@pytest.mark.parametrize("kind", ["g2", "g2_sample"])
def test_squares_of_sparse_gradients(kind):
    """Rows that a batch names twice are summed before they are squared."""

    def net(sparse):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))

    data = [
        (torch.tensor([[0, 0, 1], [2, 1, 1]]), torch.tensor([0, 2])),
        (torch.tensor([[4, 4, 4]]), torch.tensor([1])),
    ]
    found, expected = (getattr(fp.flow(net(sparse), data, needs=(kind,)), kind) for sparse in (True, False))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
