"""E[x²] at each weight against hooks and unfolded inputs, and against what it is for: the error of an output."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp

CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "strided, padded, dilated": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "one place": nn.Conv2d(4, 6, 1, bias=False),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
}


def errors(layer, inputs):
    """By removing each weight alone: the mean square of the change of each output, summed over outputs, over θ²."""
    weight, found = layer.weight, torch.zeros_like(layer.weight)
    with torch.no_grad():
        for index in range(weight.numel()):
            value = weight.view(-1)[index].item()
            change = total = count = 0
            for x in inputs:
                before = layer(x)
                weight.view(-1)[index] = 0
                change = layer(x) - before
                weight.view(-1)[index] = value
                total += change.square().sum().item()
                count += change.numel() // change.shape[1]
            found.view(-1)[index] = total / count / value**2
    return found


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    torch.manual_seed(0)
    layer = copy.deepcopy(CONVOLUTIONS[name]).double()
    inputs = [torch.randn(size, 4, 7, 6, dtype=torch.float64) for size in (3, 2)]
    found = fp.flow(layer, [(x, None) for x in inputs], needs=("x2",)).x2["weight"]
    torch.testing.assert_close(found.expand_as(layer.weight), errors(layer, inputs).detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_linear_layers_in_a_sequence_by_a_hook(masked):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).double()
    if masked:
        fp.global_prune(model, "magnitude", 0.4)
    data, seen = [torch.randn(size, 7, 5, dtype=torch.float64) for size in (4, 2)], []
    handle = model[2].register_forward_hook(lambda module, args, output: seen.append(args[0].detach().flatten(0, -2)))
    for x in data:
        model(x)
    handle.remove()
    found = fp.flow(model, [(x,) for x in data], needs=("x2",))
    assert found.samples == 6
    assert found.loss is None
    torch.testing.assert_close(found.x2["2.weight"], torch.cat(seen).square().mean(0).expand(3, 6), rtol=1e-13, atol=0)
    assert set(found.x2) == {"0.weight", "2.weight"}


def attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.out = nn.Linear(6, 4)

        def forward(self, x):
            return self.out(self.attention(x, x.flip(1), x.flip(1), need_weights=False)[0].mean(1))

    return Net().double()


def test_parts_of_one_parameter():
    """Attention's projection of queries, keys and values, of inputs that differ."""
    torch.manual_seed(0)
    model, x = attention(), torch.randn(3, 5, 6, dtype=torch.float64)
    found = fp.flow(model, x, needs=("x2",)).x2
    of_inputs = x.flatten(0, 1).square().mean(0)
    torch.testing.assert_close(found["attention.in_proj_weight"], of_inputs.expand(18, 6), rtol=1e-13, atol=0)
    assert {"attention.out_proj.weight", "out.weight"} < set(found)


def test_a_weight_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x)[:, :1].expand(-1, 4))

    model, x = Twice().double(), torch.randn(3, 4, dtype=torch.float64)
    first, second = x, model.layer(x)[:, :1].expand(-1, 4).detach()
    expected = torch.cat([first, second]).square().mean(0)
    found = fp.flow(model, (x, torch.tensor([0, 1, 2])), needs=("x2",)).x2["layer.weight"]
    torch.testing.assert_close(found, expected.expand(4, 4), rtol=1e-13, atol=0)


def test_beside_other_derivatives_and_in_every_way_of_running():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, 3)
    )
    model.double()
    data = [(torch.randn(n, 2, 6, 6, dtype=torch.float64), torch.randint(3, (n,))) for n in (3, 5, 2)]
    alone = fp.flow(model, data, needs=("x2",)).x2
    for options in ({}, {"max_memory": "1GB"}, {"offload": True}, {"mode": "train"}):
        found = fp.flow(model, data, needs=("x2", "Hg", "g2"), **options)
        expected = fp.flow(model, data, needs=("Hg",), **options)
        torch.testing.assert_close(dict(found.Hg), dict(expected.Hg), rtol=1e-12, atol=1e-15)
        if "mode" not in options:
            torch.testing.assert_close(found.x2, alone, rtol=1e-13, atol=0)
    single = fp.flow(model, data[0], needs=("x2", "Hg"))
    assert single.x2.keys() == alone.keys()


def test_the_published_method():
    """Wanda compares the weights of each output by |θ|·‖x‖."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 5).double(), torch.randn(20, 8, dtype=torch.float64)
    fp.global_prune(model, "wanda", 0.5, allocation="row", data=x)
    scores = (model.weight_orig.abs() * x.norm(dim=0)).detach()
    expected = torch.ones(5, 8, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :4], False)
    assert torch.equal(model.weight_mask.bool(), expected)


def test_what_no_product_has_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens = torch.randint(7, (5, 3))
    assert fp.scores(model, "wanda", tokens)["2.weight"].shape == (36,)
    with pytest.raises(ValueError, match=r"x2 of 0.weight: on this data the model uses them in no product"):
        fp.scores(model, "wanda", tokens, include=["0", "2"])


def test_nothing_is_left_behind():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)), torch.randn(6, 4)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    fp.scores(model, "reconstruction", x, mode="train")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_half_precision_is_squared_in_float32():
    model, x = nn.Linear(4, 2).half(), torch.full((3, 4), 1e-4).half()
    found = fp.flow(model, x, needs=("x2",)).x2["weight"]
    torch.testing.assert_close(found, x.float().square().mean(0).expand(2, 4))
    F.linear(x, model.weight)


# -- how large inputs are, and how often they are anything ------------------------------------------

AS_SQUARES = {"x1": lambda x: x.abs().sqrt(), "x0": lambda x: (x != 0).double()}
"""What to feed a layer so that its E[x²] is the moment of the inputs themselves."""


@pytest.mark.parametrize("kind", AS_SQUARES)
@pytest.mark.parametrize("name", [*CONVOLUTIONS, "linear"])
def test_other_moments_are_squares_of_other_inputs(name, kind):
    torch.manual_seed(0)
    layer = copy.deepcopy(CONVOLUTIONS.get(name, nn.Linear(6, 5))).double()
    inputs = [torch.relu(torch.randn(size, 4, 7, 6, dtype=torch.float64)) for size in (3, 2)]
    found = getattr(fp.flow(layer, [(x, None) for x in inputs], needs=(kind,)), kind)["weight"]
    expected = fp.flow(layer, [(AS_SQUARES[kind](x), None) for x in inputs], needs=("x2",)).x2["weight"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_all_moments_come_from_the_same_forwards():
    torch.manual_seed(0)
    model, calls = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), []
    model.register_forward_hook(lambda *_: calls.append(1))
    data = [(torch.randn(4, 5),), (torch.randn(3, 5),)]
    found = fp.flow(model, data, needs=("x2", "x1", "x0"))
    assert len(calls) == 2
    hidden = torch.relu(model[0](torch.cat([x for (x,) in data]))).detach()
    for kind, values in (("x2", hidden.square()), ("x1", hidden.abs()), ("x0", (hidden != 0).float())):
        torch.testing.assert_close(getattr(found, kind)["2.weight"], values.mean(0).expand(3, 6))


def activity(x0):
    return x0.mean(-1)


def mean_activation(x1):
    return x1.mean(-1)


class Normed(nn.Module):
    """Eight channels through a norm with a bias, of which some are seldom or never above zero."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.reads = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        with torch.no_grad():
            self.norm.bias.copy_(torch.tensor([2.0, -9, 0, -9, 1, 0, -1, 2]))

    def forward(self, x):
        return self.reads(torch.relu(self.norm(self.conv(x))))


@pytest.mark.parametrize("measure", [activity, mean_activation])
def test_channels_that_are_seldom_active_go_first(measure):
    torch.manual_seed(0)
    model, x = Normed().eval(), torch.randn(6, 3, 8, 8)
    seen = torch.relu(model.norm(model.conv(x))).detach()
    scores = fp.scores(model, measure, x, granularity="channel", scored_by="consumer")["conv.weight"]
    # a kernel of three meets the corners once, what is inside nine times
    weight = nn.functional.conv_transpose2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3))[0, 0] / (16 * 9)
    values = (seen != 0).float() if measure is activity else seen
    torch.testing.assert_close(scores, (values.mean(0) * weight).sum((1, 2)))
    report = fp.global_prune(model, measure, 0.25, data=x, granularity="channel", scored_by="consumer")
    assert report.pruned == 2
    assert (~fp.masks(model)["conv.weight"].flatten(1).any(1)).nonzero().flatten().tolist() == [1, 3]
    with torch.no_grad():
        torch.testing.assert_close(model.reads(torch.relu(model.norm(model.conv(x)))), model.reads(seen))


def test_wanda_scores_channels_whose_norms_no_product_reads():
    """The norm's parameters belong to a channel, and are not what a measure of producers reads."""
    model, x = Normed().eval(), torch.randn(6, 3, 8, 8)
    assert fp.global_prune(model, "wanda", 0.5, data=x, granularity="channel").pruned == 4
    with pytest.raises(
        ValueError, match=r"x2 of norm\.weight, norm\.bias: on this data the model uses them in no product"
    ):
        fp.scores(Normed().eval(), "wanda", x, granularity="channel", scored_by="norm")


def test_channels_that_no_weight_reads_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 4, bias=False)).eval()
    coupling = fp.couple(model, torch.randn(2, 3, 2, 2))
    (group,) = coupling.groups
    alone = fp.Coupling((fp.Group(group.name, tuple(one for one in group.slices if one.role != "consumer")),))
    with pytest.raises(ValueError, match="scored_by='consumer': no weight reads the channels of '0.weight'"):
        fp.scores(model, "magnitude", granularity="channel", coupling=alone, scored_by="consumer")


class Decoding(nn.Module):
    """As models with a decoder: it reads the labels, and does not run without."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 7)

    def forward(self, input_ids, labels=None):
        if labels is None:
            raise ValueError("the decoder is given nothing")
        h = self.norm(self.embed(input_ids).mean(1) + self.embed(labels).mean(1))
        return {"loss": self.out(h).square().mean()}


def test_models_that_read_their_labels_are_given_them():
    ids = torch.randint(7, (6, 3))
    data = [{"input_ids": ids[:4], "labels": ids[:4].flip(1)}, {"input_ids": ids[4:], "labels": ids[4:].flip(1)}]
    model = Decoding()
    fp.recalibrate(model, data)
    model.eval()
    assert fp.flow(model, data, needs=("x2",)).x2["out.weight"].shape == (7, 4)
    fp.global_prune(model, "wanda", 0.5, data=data, include="out")
    assert [layer.name for layer in fp.reconstruct(model, data).layers] == ["out.weight"]
