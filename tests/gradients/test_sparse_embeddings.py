"""Embeddings that are set to sparse gradients, and sums of them, give what dense ones give, in every way of running."""

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp
from torch_flowprune.gradients.operators import twice_differentiable

NEEDS = ("g", "g2", "g2_sample", "Hg")
WAYS = {
    "plainly": {},
    "sums on the host": {"offload": True},
    "within a budget": {"max_memory": "1MB"},
    "checked": {"check": True},
    "train mode": {"mode": "train"},
}


class Net(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(9, 4, sparse=sparse)
        self.bags = nn.EmbeddingBag(9, 4, sparse=sparse, mode="sum")
        self.out = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.out((self.rows(x).mean(1) * self.bags(x)).tanh())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [(5,), (4, 3)], ids=["one batch", "two"])
def test_sparse_gradients_are_dense_ones(sizes, way):
    torch.manual_seed(1)
    data = [(torch.randint(9, (size, 5)), torch.randint(3, (size,))) for size in sizes]
    model = Net(sparse=True)
    found, expected = (fp.flow(one, data, needs=NEEDS, **WAYS[way]) for one in (model, Net(sparse=False)))
    for kind in NEEDS:
        oracles.assert_named_close(getattr(found, kind), getattr(expected, kind), 1e-12)
    assert model.rows.sparse is model.bags.sparse is True


def test_they_are_sparse_again_after_an_error():
    model = Net(sparse=True)
    with pytest.raises(ZeroDivisionError):
        fp.flow(model, (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2)), loss=lambda o, t: 1 / 0)
    assert model.rows.sparse is model.bags.sparse is True


IDS = torch.tensor([1, 2, 4, 5, 4, 3, 2, 8])
BAGS = {
    "rows": {"input": IDS.view(2, 4)},
    "offsets": {"input": IDS, "offsets": torch.tensor([0, 3, 3, 5])},
    "the last offset too": {"input": IDS, "offsets": torch.tensor([0, 3, 5, 8]), "include_last_offset": True},
    "int32": {"input": IDS.int(), "offsets": torch.tensor([0, 4], dtype=torch.int32)},
    "weights": {"input": IDS.view(4, 2), "per_sample_weights": torch.rand(4, 2, dtype=torch.float64), "mode": "sum"},
}


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("name", BAGS)
def test_sums_of_embeddings(name, mode):
    words = {"mode": mode, **BAGS[name]}
    table = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)

    def bag(weight):
        with twice_differentiable():
            return F.embedding_bag(weight=weight, **words)

    torch.testing.assert_close(bag(table), F.embedding_bag(weight=table, **words))
    assert torch.autograd.gradgradcheck(lambda weight: bag(weight).tanh(), (table,))


@pytest.mark.parametrize("words", [{"mode": "max"}, {"padding_idx": 2}, {"max_norm": 1.0}], ids=str)
def test_other_sums_are_torchs(words):
    table = torch.randn(9, 3, dtype=torch.float64)
    with twice_differentiable():
        found = F.embedding_bag(IDS.view(2, 4), table.clone(), **words)
    torch.testing.assert_close(found, F.embedding_bag(IDS.view(2, 4), table.clone(), **words))
