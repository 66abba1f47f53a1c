"""What batches come in besides tensors, and what is said of those that cannot be counted, moved or cut."""

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import torch_flowprune as fp

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 0, 1, 2])


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Graph:
    """As graph libraries have them: of a class of its own, moved by its own method."""

    def __init__(self, x, y):
        self.x, self.y, self.device = x, y, None

    def to(self, device):
        self.device = device
        return self


def of_graph(model, graph):
    assert graph.device == torch.device("cpu")
    return F.cross_entropy(model(graph.x), graph.y)


GRAPHS = [Graph(X[:4], Y[:4]), Graph(X[4:], Y[4:])]
COUNTED = {"closure": of_graph, "batch_size": lambda graph: len(graph.y)}


def test_objects_are_moved_by_their_own_method_and_counted_as_told():
    model = mlp()
    found = fp.flow(model, GRAPHS, **COUNTED)
    expected = oracles.dense(model, [(X, Y)])
    assert found.samples == 6
    oracles.assert_named_close(found.g, expected.g)
    oracles.assert_named_close(found.Hg, expected.Hg)


def test_an_object_with_keys_that_moves_itself_is_one_batch():
    class Whole(Graph):
        def keys(self):
            return ["x", "y"]

        def __iter__(self):
            return iter((key, getattr(self, key)) for key in self.keys())

    model = mlp()
    found = fp.flow(model, Whole(X, Y), closure=of_graph, batch_size=6)
    oracles.assert_named_close(found.g, oracles.dense(model, [(X, Y)]).g)


@pytest.mark.parametrize(
    "words", [{"needs": ("g2_sample",)}, {"max_samples": 3}, {"max_memory": 2_000}], ids=lambda words: next(iter(words))
)
def test_what_cannot_be_cut_is_not_counted_whole_for_each_part(words):
    with pytest.raises(ValueError, match="got a Graph, which nothing here can cut"):
        fp.flow(mlp(), GRAPHS, **COUNTED, **words)


def test_one_dataclass_is_a_batch():
    @dataclass
    class Both:
        x: torch.Tensor
        y: torch.Tensor

    model = mlp()
    found = fp.flow(model, Both(X, Y), closure=lambda net, batch: F.cross_entropy(net(batch.x), batch.y), needs=("g",))
    oracles.assert_named_close(found.g, oracles.dense(model, [(X, Y)]).g)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class OfPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, pair):
        return self.net(pair.first + pair.second)


class OfTwo(OfPair):
    def forward(self, first, second):
        return self.net(first + second)


@pytest.mark.parametrize("kind", [OfPair, OfTwo])
def test_a_named_tuple_is_one_argument_unless_the_model_takes_several(kind):
    model = kind()
    found = fp.flow(model, [(Pair(X, X), Y)], needs=("g",))
    expected = oracles.dense(model.net, [(2 * X, Y)]).g
    oracles.assert_named_close({name.removeprefix("net."): value for name, value in found.g.items()}, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_samples_of_nested_tensors(layout):
    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, sequences):
            return self.head(torch.stack([one.tanh().mean(0) for one in self.embed(sequences).unbind()]))

    def nested(a, b):
        return torch.nested.nested_tensor([X[: 1 + i] for i in range(a, b)], layout=layout)

    model = Means()
    found = fp.flow(model, [(nested(0, 4), Y[:4]), (nested(4, 6), Y[4:])], needs=("g", "g2_sample"))
    total = F.cross_entropy(model(nested(0, 6)), Y)
    expected = dict(zip(found.g, torch.autograd.grad(total, list(model.parameters())), strict=True))
    oracles.assert_named_close(found.g, expected)
    squares = [
        torch.autograd.grad(F.cross_entropy(model(nested(i, i + 1)), Y[i : i + 1]), list(model.parameters()))
        for i in range(6)
    ]
    means = {name: torch.stack([s[k] ** 2 for s in squares]).mean(0) for k, name in enumerate(found.g)}
    oracles.assert_named_close(found.g2_sample, means)


class Flat(nn.Module):
    """Reads the values of nested tensors side by side, as kernels of attention over several lengths do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, sequences):
        offsets = sequences.offsets()
        rows = self.head(self.embed(sequences).tanh().values())
        return torch.stack([rows[a:b].mean(0) for a, b in pairwise(offsets.tolist())])


class Unbound(Flat):
    def forward(self, sequences):
        return torch.stack([one.mean(0) for one in self.head(self.embed(sequences)).unbind()])


def nested_samples(a, b, layout=torch.jagged):
    return torch.nested.nested_tensor([X[: 1 + i] for i in range(a, b)], layout=layout)


def test_second_derivatives_of_nested_tensors_where_torch_has_them():
    model = Flat()
    found = fp.flow(model, [(nested_samples(0, 4), Y[:4]), (nested_samples(4, 6), Y[4:])])
    total = F.cross_entropy(model(nested_samples(0, 6)), Y)
    parameters = list(model.parameters())
    g = torch.autograd.grad(total, parameters, create_graph=True)
    product = torch.autograd.grad(g, parameters, [value.detach() for value in g])
    oracles.assert_named_close(found.g, dict(zip(found.g, g, strict=True)))
    oracles.assert_named_close(found.Hg, dict(zip(found.g, product, strict=True)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_second_derivatives_of_nested_tensors_that_torch_has_not_are_refused(layout):
    model, data = Unbound(), (nested_samples(0, 6, layout), Y)
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    calls = (
        lambda: fp.flow(model, [data, data]),
        lambda: fp.flow(model, data, needs=("diagH",), probes=2),
        lambda: fp.hessian_vector(model, data, ones),
        lambda: fp.global_prune(model, "grasp", 0.5, data=data),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="torch lacks for some operators of nested tensors: pass padded"):
            call()
        assert not torch.nn.utils.prune.is_pruned(model)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_inputs_of_layers_and_synflow_on_nested_tensors(layout):
    """As for the samples one after the other, and one of ones."""
    model, data = Unbound(), [(nested_samples(0, 4, layout), Y[:4]), (nested_samples(4, 6, layout), Y[4:])]
    rows = torch.cat([X[: 1 + i] for i in range(6)])
    found = fp.flow(model, data, needs=("x2", "gR"))
    for name, x in (("embed.weight", rows), ("head.weight", model.embed(rows))):
        expected = x.detach().square().mean(0).expand_as(found.x2[name])
        torch.testing.assert_close(found.x2[name], expected, rtol=1e-12, atol=0)
    theta = {name: p.detach().abs().requires_grad_() for name, p in model.named_parameters()}
    R = torch.func.functional_call(model, theta, (torch.nested.nested_tensor([torch.ones_like(X[:1])]),)).sum()
    oracles.assert_named_close(found.gR, dict(zip(theta, torch.autograd.grad(R, [*theta.values()]), strict=True)))
    assert fp.global_prune(model, "wanda", 0.4, data=data).sparsity == pytest.approx(0.4)


class Keeping(dict):
    """As a TensorDict: its tensors keep to its batch size, and it is indexed as they are."""

    batch_size = torch.Size([])

    def __init__(self, values, batch_size):
        super().__init__()
        self.batch_size = torch.Size(batch_size)
        self.update(values)

    def update(self, values):
        if any(value.shape[: len(self.batch_size)] != self.batch_size for value in values.values()):
            raise RuntimeError("batch dimension mismatch")
        super().update(values)

    def __copy__(self):
        return Keeping(dict(self), self.batch_size)

    def __getitem__(self, key):
        if isinstance(key, str):
            return super().__getitem__(key)
        values = {name: value[key] for name, value in self.items()}
        return Keeping(values, next(iter(values.values())).shape[:1])


@pytest.mark.parametrize("words", [{}, {"max_samples": 5}], ids=str)
def test_samples_of_mappings_that_keep_to_a_batch_size(words):
    model, end = mlp(), words.get("max_samples", 6)
    data = [Keeping({"x": X[a:b], "y": Y[a:b]}, (b - a,)) for a, b in ((0, 4), (4, 6))]
    closure = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])
    found = fp.flow(model, data, closure=closure, needs=("g", "Hg", "g2_sample"), **words)
    expected = fp.flow(model, (X[:end], Y[:end]), needs=("g", "Hg", "g2_sample"))
    assert found.samples == end
    for kind in ("g", "Hg", "g2_sample"):
        oracles.assert_named_close(getattr(found, kind), getattr(expected, kind))


def test_a_sorted_packed_sequence_stays_one_when_it_is_cut():
    net = nn.RNN(4, 3).double()
    packed = pack_sequence([X[:3], X[:2], X[:1]])
    closure = lambda model, batch: model(batch[0])[1].square().mean()
    found = fp.flow(net, [(packed, Y[:3])], closure=closure, needs=("g2_sample",))
    assert found.samples == 3


class Edges(nn.Module):
    """Nodes are samples, and edges are shared by all of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, nodes, edges):
        hidden = self.embed(nodes).tanh()
        return self.head(hidden.index_add(0, edges[1], hidden[edges[0]]))


EDGES = torch.tensor([[0, 1, 2, 5], [1, 2, 3, 0]])


def test_a_graph_that_is_cut_says_so():
    data = [((X, EDGES), Y)]
    for ask in (
        lambda: fp.flow(Edges(), data, needs=("g2_sample",)),
        lambda: fp.flow(Edges(), data, max_memory=4_000),
        lambda: fp.diagnose(Edges(), data),
    ):
        with pytest.raises(ValueError, match=r"cut a batch, and on a part of it .* None in batch_dim="):
            ask()


def test_synflow_of_a_graph_keeps_its_edges():
    model = Edges()
    found = fp.scores(model, "synflow", [((X, EDGES), Y)])["embed.weight"]
    absolute = Edges()
    with torch.no_grad():
        for p in absolute.parameters():
            p.abs_()
    absolute(torch.ones_like(X), EDGES).sum().backward()
    assert torch.allclose(found, (absolute.embed.weight * absolute.embed.weight.grad).abs().view_as(found))


HINTS = {
    "single samples": ([(X[0], torch.tensor(1))], "if this is a single sample, wrap the data in a DataLoader"),
    "arrays": ([(X.numpy(), Y.numpy())], "samples are counted in tensors"),
    "more parts than arguments": ([(X, Y, Y)], r"is called with the 3 parts .* takes \(input\)"),
}


@pytest.mark.parametrize("name", HINTS)
def test_other_forms_are_answered_with_a_way_out(name):
    data, text = HINTS[name]
    with pytest.raises(ValueError, match=text):
        fp.scores(mlp(), "wanda", data)


@dataclass
class Noted:
    x: torch.Tensor
    y: torch.Tensor


CLOSURES = {
    "three compared": ([(X, X + 1, -X)], lambda m, b: F.triplet_margin_loss(m(b[0]), m(b[1]), m(b[2]))),
    "a dict of other names": ([{"obs": X, "act": Y}], lambda m, b: F.cross_entropy(m(b["obs"]), b["act"])),
    "by keyword": ([{"obs": X, "act": Y}], lambda m, b: F.cross_entropy(m(input=b["obs"]), b["act"])),
    "a dataclass": ([Noted(X, Y)], lambda m, b: F.cross_entropy(m(b.x), b.y)),
}


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("words", [{"granularity": "channel"}, {"method": "synflow"}], ids=["channel", "synflow"])
def test_examples_are_what_a_closure_calls_the_model_with(name, words):
    data, closure = CLOSURES[name]
    model, expected = mlp(), mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.global_prune(model, data=data, closure=closure, sparsity=0.4, **words)
    fp.global_prune(expected, example_inputs=X, sparsity=0.4, **words)
    for name, mask in fp.masks(expected).items():
        assert torch.equal(fp.masks(model)[name], mask)
    assert not model._forward_pre_hooks


def test_a_closure_that_calls_a_part_of_the_model_leaves_the_batch_as_the_example():
    data = [(X, Y)]
    closure = lambda m, b: F.cross_entropy(m[2](m[1](m[0](b[0]))), b[1])
    report = fp.global_prune(mlp(), data=data, closure=closure, sparsity=0.4, granularity="channel")
    assert report.sparsity == pytest.approx(0.4)


def test_a_call_that_no_one_value_stands_for_leaves_the_batch_as_the_example():
    class Wrapped(nn.Module):
        """As adapters wrap models: it hands on whatever it is called with."""

        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, *args, scale=1.0, **words):
            return scale * self.inner(*args, **words)

    closure = lambda m, b: F.cross_entropy(m(b[0], scale=2.0), b[1])
    report = fp.global_prune(Wrapped(), data=[(X, Y)], closure=closure, sparsity=0.4, granularity="channel")
    assert report.sparsity == pytest.approx(0.4)


class Decoder(nn.Module):
    """Reads its target, as models of sequences do that are given the labels alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(5, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.double()

    def forward(self, ids, labels=None, decoder_ids=None):
        if labels is None and decoder_ids is None:
            raise ValueError("one of labels and decoder_ids")
        given = labels.roll(1, -1).clamp(min=0) if decoder_ids is None else decoder_ids
        logits = self.head(self.mix(self.embed(ids).mean(1, keepdim=True) + self.embed(given)).relu())
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("words", [{"granularity": "channel"}, {"method": "synflow"}], ids=["channel", "synflow"])
def test_a_decoder_that_reads_its_labels_has_them_in_the_example(words):
    batch = {"ids": torch.randint(5, (4, 3)), "labels": torch.randint(5, (4, 2))}
    report = fp.global_prune(Decoder(), data=[batch], sparsity=0.3, **words)
    assert report.sparsity == pytest.approx(0.3, abs=0.05)


class Heads(nn.Module):
    """Of several outputs, none of which is called logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.starts, self.ends = (nn.Linear(4, 4).double() for _ in range(3))

    def forward(self, x):
        body = self.body(x)
        return {"start_logits": self.starts(body), "end_logits": self.ends(body), "kept": None}


def test_synflow_sums_all_outputs():
    found = fp.scores(Heads(), "synflow", example_inputs=X)
    absolute = Heads()
    with torch.no_grad():
        for p in absolute.parameters():
            p.abs_()
    outputs = absolute(torch.ones(1, 4).double())
    (outputs["start_logits"].sum() + outputs["end_logits"].sum()).backward()
    for name, scores in found.items():
        weight = dict(absolute.named_parameters())[name]
        assert torch.allclose(scores, (weight * weight.grad).abs().view_as(scores)), name


class Picky(Heads):
    """Of inputs that ones are none of."""

    def forward(self, x):
        assert x.min() < 0, "boxes should have a positive height"
        return super().forward(x)


def test_synflow_of_a_model_that_takes_no_ones_says_so():
    with pytest.raises(ValueError, match=r"on inputs of ones, and on these it fails \(boxes should have"):
        fp.scores(Picky(), "synflow", example_inputs=X)
