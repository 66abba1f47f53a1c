"""Two batches as one."""

import pytest
import torch

from torch_flowprune.inputs import as_one, first, parts
from torch_flowprune.inputs.data.joined_batches import ApartError

X, Y, SHARED = torch.arange(12.0).view(6, 2), torch.arange(6), torch.ones(5, 5)
BATCHES = {
    "a pair": ((X, Y), 0),
    "a list": ([X, Y], 0),
    "a dict": ({"x": X, "labels": Y, "epoch": 3}, 0),
    "a shared mask": (((X, SHARED), Y), 0),
    "samples along the second axis": ((X.mT, Y), (1, 0)),
    "lists of samples": (([*X], [{"boxes": x} for x in X]), 0),
    "numbers in a list": ((X, [0, 1, 2, 3, 4, 5]), 0),
}


@pytest.mark.parametrize("name", BATCHES)
def test_parts_joined_are_the_whole(name):
    batch, along = BATCHES[name]
    (one, size), (other, its_size) = parts(batch, 6, 4, along)
    whole = as_one(one, other, (size, its_size), along)
    torch.testing.assert_close(whole, batch, rtol=0, atol=0)


APART = {
    "sequences of other lengths": lambda x: (torch.zeros(3, len(x)), Y[: len(x)]),
    "what samples share": lambda x: ((x, torch.full((5,), float(len(x)))), Y[: len(x)]),
    "a number": lambda x: {"x": x, "labels": Y[: len(x)], "epoch": len(x)},
    "nested tensors": lambda x: (torch.nested.nested_tensor([*x], layout=torch.jagged), Y[: len(x)]),
}


@pytest.mark.parametrize("name", APART)
def test_what_differs_is_not_joined(name):
    one, other = APART[name](X[:2]), APART[name](X[:4])
    with pytest.raises(ApartError):
        as_one(one, other, (2, 4))


def test_the_first_samples_of_two_batches():
    one, other = first((X, Y), 6, 2), first((X.flip(0), Y.flip(0)), 6, 2)
    assert as_one(one, other, (2, 2))[1].tolist() == [0, 1, 5, 4]
