"""The second sweep is held against the first by each batch's loss."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import torch_flowprune as fp
from torch_flowprune.gradients.batches.same_data import _first_difference


class Augmented(Dataset):
    """Images with noise from a generator of the data set's own, or from torch's."""

    def __init__(self, own):
        self.x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        self.generator = np.random.default_rng(0) if own else None

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.as_tensor(self.generator.normal(size=4)).float() if self.generator else torch.randn(4)
        return self.x[index] + noise, index % 3


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def test_a_generator_of_the_data_sets_own():
    with pytest.raises(
        ValueError, match=r"loss of batch 0 was \d.* on the first sweep, \d.* on the second: .*in a list"
    ):
        fp.flow(model(), DataLoader(Augmented(own=True), batch_size=4))


@pytest.mark.parametrize("budget", [{}, {"max_memory": 100_000}])
def test_torchs_own_randomness_is_put_back(budget):
    loader = DataLoader(Augmented(own=False), batch_size=4, shuffle=True)
    assert fp.flow(model(), loader, **budget).samples == 12


def test_workers_that_persist():
    loader = DataLoader(Augmented(own=False), batch_size=4, num_workers=1, persistent_workers=True)
    list(loader)
    with pytest.raises(ValueError, match=r"the loss of batch \d was .*persistent workers"):
        fp.flow(model(), loader)


def losses(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


@pytest.mark.parametrize(
    ("first", "second", "dtype", "expected"),
    [
        ((1.0, 2.0), (1.0, 2.00001), torch.float32, -1),
        ((1.0, 2.0), (1.0, 2.00001), torch.float64, 1),
        ((1.0, 2.0), (1.0, 2.01), torch.float32, 1),
        ((1.0, 2.0), (1.0, 2.01), torch.bfloat16, -1),
        ((1.0, 1e-9), (1.0, 2e-9), torch.float32, -1),
        ((1.0, 2.0), (1.0, float("nan")), torch.float32, 1),
        ((1.0, 2.0), (1.0,), torch.float32, -1),
        ((), (), torch.float32, -1),
    ],
)
def test_more_than_rounding(first, second, dtype, expected):
    assert _first_difference(losses(*first), losses(*second), dtype)[0] == expected
