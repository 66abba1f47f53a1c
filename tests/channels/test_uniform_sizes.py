"""Layers of repeated blocks that keep equally many channels, and what a model's class can be built with."""

import json
from itertools import product

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.channels import couple, is_as_built, uniform_sizes

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


class Config:
    """What a model is built from, as models of transformers have it: to a dict and back."""

    def __init__(self, width=12, hidden=8, layers=2, norm="rms", eps=1e-5, extra=None):
        self.width, self.hidden, self.layers, self.norm, self.eps, self.extra = width, hidden, layers, norm, eps, extra

    def to_dict(self):
        return dict(vars(self))

    @classmethod
    def from_dict(cls, said):
        return cls(**said)


class RMSNorm(nn.Module):
    """Written by hand, as language models have it."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(width).abs() + 0.5), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Block(nn.Module):
    """A residual branch behind a norm."""

    def __init__(self, config):
        super().__init__()
        kinds = {"rms": lambda: RMSNorm(config.width, config.eps), "layer": lambda: nn.LayerNorm(config.width)}
        self.norm = kinds[config.norm]()
        self.up, self.down = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    """Blocks of one class, by a config."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(5, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.sigmoid())


def stack(**words):
    torch.manual_seed(0)
    return Stack(Config(**words)).eval()


def without_config(**words):
    model = stack(**words)
    del model.config
    return model


def left_of(report):
    return {layer.name: layer.units - layer.pruned for layer in report.layers}


UNIFORM = {"granularity": "channel", "example_inputs": X, "uniform": True}


@pytest.mark.parametrize("make", [stack, without_config])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.66])
def test_layers_that_repeat_keep_equally_many_and_the_count_is_the_nearest(make, sparsity):
    model = make(layers=3)
    report = fp.global_prune(model, "magnitude", sparsity, **UNIFORM)
    left = left_of(report)
    hidden = {left[f"blocks.{i}.up.weight"] for i in range(3)}
    assert len(hidden) == 1
    asked = round(sparsity * report.units)
    nearest = min(abs(12 - width + 3 * (8 - n) - asked) for width, n in product(range(1, 13), range(1, 9)))
    assert abs(report.pruned - asked) == nearest
    assert report.asked == (None if nearest == 0 else asked)
    assert (f"{asked} were asked for" in str(report)) is (nearest > 0)
    assert all("uniform" in layer.why for layer in report.layers)
    x = torch.randn(7, 5)
    assert torch.allclose(fp.shrink(model, X)(x), model(x), atol=1e-6)


def test_of_each_layer_the_lowest_go():
    model, other = stack(), stack()
    scores = fp.scores(other, "magnitude", granularity="channel", example_inputs=X)
    fp.global_prune(model, "magnitude", 0.5, **UNIFORM)
    for name, values in scores.items():
        kept = fp.masks(model)[name].flatten(1).any(1)
        assert values[kept].min() >= values[~kept].max()


@pytest.mark.parametrize("epsilon", [1e-5, 0.3])
def test_a_shrunk_model_is_what_its_class_makes_of_the_config(epsilon):
    model = stack(eps=epsilon)
    fp.global_prune(model, "magnitude", 0.5, **UNIFORM)
    before = dict(vars(model.config))
    small = fp.shrink(model, X)
    assert is_as_built(small)
    assert vars(model.config) == before
    assert small.config.width < 12 and small.config.hidden < 8
    assert small.config.eps == pytest.approx(epsilon * 12 / small.config.width)
    said = Config.from_dict(json.loads(json.dumps(small.config.to_dict())))
    new = Stack(said)
    new.load_state_dict(small.state_dict())
    x = torch.randn(9, 5)
    assert type(small.blocks[0].norm) is RMSNorm
    assert torch.allclose(new(x), model(x), atol=1e-6)
    assert torch.equal(new(x), small(x))


class Scale(RMSNorm):
    """Called with two tensors."""

    def forward(self, x, by):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * by


class WithScale(Stack):
    """With a norm that has no plain form that could be tried."""

    def __init__(self, config):
        super().__init__(config)
        self.last = Scale(config.width, config.eps)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x, torch.ones(())))


class Odd(Config):
    """What is called as a config is, and is another thing."""

    def to_dict(self, spare):
        return {spare: self}


@pytest.mark.parametrize("make", [lambda: WithScale(Config()), lambda: Stack(Odd())])
def test_what_cannot_be_tried_is_shrunk_as_ever(make):
    torch.manual_seed(0)
    model = make().eval()
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=X, scope="layer")
    small = fp.shrink(model, X)
    x = torch.randn(9, 5)
    assert torch.allclose(small(x), model(x), atol=1e-6)
    assert not is_as_built(small)
    assert small.config.width == 12


def test_in_place_too():
    model = stack()
    fp.global_prune(model, "magnitude", 0.5, **UNIFORM)
    x = torch.randn(9, 5)
    expected = model(x)
    assert fp.shrink(model, X, inplace=True) is model
    assert is_as_built(model)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_what_a_layer_norm_reads_stays_whole():
    """Its mean is over all channels, and no plain layer norm of fewer has that."""
    model = stack(norm="layer")
    report = fp.global_prune(model, "magnitude", 0.4, **UNIFORM)
    assert left_of(report)["embed.weight"] == 12
    assert report.layers[0].why == "global, scores over their mean, uniform"
    small = fp.shrink(model, X)
    assert is_as_built(small)
    assert small.config.width == 12 and small.config.hidden < 8


def test_an_optimizer_goes_on_with_the_weights_that_it_has():
    """A norm's weight is rescaled for no optimizer: its state would be of another weight."""
    model = stack()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    fp.global_prune(model, "magnitude", 0.5, **UNIFORM)
    small = fp.shrink(model, X, optimizer=optimizer)
    assert not is_as_built(small) and small.config.width == 12
    report = fp.global_prune(small, "magnitude", 0.3, **UNIFORM)
    assert report.pruned
    assert is_as_built(fp.shrink(small, X))


def test_unequal_widths_are_no_config():
    model = stack()
    fp.global_prune(model, "magnitude", 0.4, granularity="channel", example_inputs=X, include=["blocks.1.up*"])
    small = fp.shrink(model, X)
    assert not is_as_built(small) and vars(small.config) == vars(Config())


def test_floors_caps_and_multiples_hold():
    model = stack(width=16, hidden=16)
    report = fp.global_prune(
        model, "magnitude", 0.4, **UNIFORM, round_to=4, min_keep={"embed*": 12}, max_sparsity={"blocks.1*": 0.7}
    )
    left = left_of(report)
    assert left["embed.weight"] >= 12
    assert left["blocks.0.up.weight"] == left["blocks.1.up.weight"] >= 8
    assert all(count % 4 == 0 for count in left.values())
    with pytest.raises(ValueError, match=r"of 32 units should be pruned, and at most .* can: .*uniform=True"):
        fp.global_prune(stack(norm="layer", width=16, hidden=8), "magnitude", 0.9, **UNIFORM)


def test_a_layer_that_is_left_out_holds_those_like_it():
    report = fp.global_prune(stack(), "magnitude", 0.2, **UNIFORM, exclude=["blocks.0.up*"])
    assert left_of(report)["blocks.1.up.weight"] == 8
    with pytest.raises(ValueError, match="none of the 1 groups of channels can become smaller: blocks.1.up.weight"):
        fp.global_prune(stack(), "magnitude", 0.2, **UNIFORM, include=["blocks.1.up*"])


def test_where_no_width_is_left_in_common():
    model = stack()
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=X, include=["blocks.1.up*"])
    kept = {name: mask.clone() for name, mask in fp.masks(model).items()}
    with pytest.raises(ValueError, match=r"no width in common that is left to all .*blocks.0.up.weight: 8 of 8"):
        fp.global_prune(model, "magnitude", 0.5, **UNIFORM, min_keep={"blocks.0.up*": 6})
    assert all(torch.equal(mask, kept[name]) for name, mask in fp.masks(model).items())
    fp.global_prune(model, "magnitude", 0.5, **UNIFORM)
    assert is_as_built(fp.shrink(model, X))


class Refusing(Stack):
    """Built in widths of which the hidden one is half."""

    def __init__(self, config):
        if config.hidden * 2 != config.width:
            raise ValueError("half")
        super().__init__(config)


def test_sizes_of_one_number_go_together():
    torch.manual_seed(0)
    model = Refusing(Config(16, 8)).eval()
    coupling = couple(model, X)
    found = uniform_sizes(model, coupling, X, [group.name for group in coupling.groups])
    assert not found.dials  # each alone would break the half, and one number is followed by its own alone
    with pytest.raises(ValueError, match="no other Refusing has this narrower and computes the same"):
        fp.global_prune(model, "magnitude", 0.3, **UNIFORM)


class Wide(Stack):
    """Built in widths of forty hidden units and more."""

    def __init__(self, config):
        if config.hidden < 40:
            raise ValueError("narrow")
        super().__init__(config)


def test_a_class_that_takes_none_of_the_widths_asked_for():
    model = Wide(Config(hidden=64)).eval()
    words = {**UNIFORM, "include": ["*.up*"]}
    with pytest.raises(ValueError, match=r"takes none of the widths nearest .*blocks.0.up.weight 13.0 of 64 steps"):
        fp.global_prune(model, "magnitude", 0.8, **words)
    assert not fp.masks(model)
    assert fp.global_prune(model, "magnitude", 0.3, **words).pruned == 2 * 19


def test_other_units_have_no_class_sizes():
    with pytest.raises(ValueError, match="uniform=True is for granularity='channel'"):
        fp.global_prune(stack(), "magnitude", 0.3, uniform=True)
    with pytest.raises(ValueError, match="uniform=True tries smaller sizes on an example input, and there is none"):
        fp.global_prune(stack(), granularity="channel", sparsity=0.3, coupling=couple(stack(), X), uniform=True)


def test_in_rounds_and_by_cost():
    model = stack(layers=3)
    pruner = fp.Pruner(model, "magnitude", 0.6, rounds=3, **UNIFORM)
    while not pruner.done:
        left = left_of(pruner.step())
        assert len({left[f"blocks.{i}.up.weight"] for i in range(3)}) == 1
    assert is_as_built(fp.shrink(model, X))
    model = stack(layers=3)
    report = fp.global_prune(model, "magnitude", 0.5, **UNIFORM, cost="parameters")
    assert report.left.parameters <= report.dense.parameters / 2
    small = fp.shrink(model, X)
    assert is_as_built(small) and sum(p.numel() for p in small.parameters()) == report.left.parameters


def test_ahead_of_a_prune():
    loss = {"data": [(X, torch.tensor([0, 1, 2]))], "loss": nn.functional.cross_entropy}
    compared = fp.compare(stack(), "magnitude", [0.2, 0.5], **UNIFORM, **loss)
    assert [outcome.sparsity for outcome in compared.outcomes] == pytest.approx([6 / 28, 14 / 28])
    assert fp.range(stack(norm="layer"), X, cost="units", uniform=True).least == 12 + 2
