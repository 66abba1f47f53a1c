"""Numbers as tensors and numpy have them are numbers wherever a share or a count is taken."""

import numpy as np
import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.selection import fraction, to_prune

SHARES = [torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), np.float32(0.3), np.float64(0.3), np.array(0.3)]


@pytest.mark.parametrize("number", SHARES, ids=repr)
def test_a_share(number):
    assert fraction(number) == 0.3
    assert fp.global_prune(nn.Linear(10, 10), sparsity=number).pruned == 30


@pytest.mark.parametrize("number", [torch.tensor(3), np.int64(3), np.array(3)])
def test_a_count(number):
    assert to_prune(number, 8) == 3


@pytest.mark.parametrize(
    "value", [torch.tensor([0.3]), np.array([0.3, 0.5]), torch.tensor(True), np.bool_(True), "0.3"]
)
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="should be a number"):
        fraction(value)
