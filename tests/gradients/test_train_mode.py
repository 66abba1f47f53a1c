"""mode="train": what a model does by itself is the same in both sweeps, and samples alone are no batch."""

import cases
import oracles
import pytest
import torch
from cases import CASES
from torch import nn
from torch.utils.data import DataLoader, Dataset

import torch_flowprune as fp


def normed():
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


def test_power_iteration_starts_again_for_the_second_sweep():
    """H is that of the weights that g was taken at."""
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 4))
    nn.utils.parametrizations.spectral_norm(model[0], n_power_iterations=1)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.detach().sum().item()))
    fp.flow(model, batches, mode="train")
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert len(set(seen)) == 2


class Noisy(Dataset):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.randn(4, dtype=torch.float64, generator=self.generator), index % 3


def test_other_data_are_told_in_train_mode_too():
    with pytest.raises(ValueError, match=r"the loss of batch 0 was .* on the first sweep, .* on the second"):
        fp.flow(normed(), DataLoader(Noisy(), batch_size=4), mode="train")


def test_draws_for_single_samples_do_not_move_the_second_sweep():
    model, batches = cases.mlp(), CASES["mlp"].batches((4, 4))
    model = nn.Sequential(model, nn.Dropout(0.5))
    torch.manual_seed(3)
    expected = fp.flow(model, batches, mode="train").Hg
    torch.manual_seed(3)
    found = fp.flow(model, batches, mode="train", needs=("Hg", "g2_sample")).Hg
    oracles.assert_named_close(found, expected, 1e-14)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_samples_have_no_statistics_of_a_batch(mode):
    model = normed()
    if mode == "eval":
        model[1] = nn.BatchNorm1d(6, track_running_stats=False).double()
    with pytest.raises(ValueError, match=r"g2_sample runs each sample alone, and '1' takes its statistics over"):
        fp.scores(model, "fisher_sample", CASES["mlp"].batches((4, 4)), mode=mode)
    fp.scores(model, "fisher", CASES["mlp"].batches((4, 4)), mode=mode)


def test_frozen_statistics_are_those_of_samples():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    model, batches = normed(), CASES["mlp"].batches((4, 4))
    model[1] = Frozen(6).double()
    expected = fp.flow(model, batches, needs=("g2_sample",)).g2_sample
    oracles.assert_named_close(fp.flow(model, batches, needs=("g2_sample",), mode="train").g2_sample, expected)


def test_synflow_has_no_batch_to_take_statistics_of():
    model, batches = normed(), CASES["mlp"].batches((4, 4))
    expected = fp.scores(model, "synflow", batches)
    assert fp.scores(model, "synflow", batches, mode="train") == expected


def test_complex_parameters_are_not_left_out_in_silence():
    model = cases.mlp()
    model.phase = nn.Parameter(torch.randn(2, dtype=torch.complex128))
    with pytest.raises(
        ValueError, match=r"phase: derivatives are of real numbers, not torch.complex128; .*as a constant"
    ):
        fp.flow(model, CASES["mlp"].batches())
    assert fp.scores(model, "magnitude", include="0")
    fp.flow(model.requires_grad_(True), CASES["mlp"].batches(), needs=("theta",))
    model.phase.requires_grad_(False)
    assert "phase" not in fp.flow(model, CASES["mlp"].batches()).g


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.second(torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=True))


@pytest.mark.parametrize("needs", ["g", "Hg"])
def test_a_reentrant_first_block_is_told(needs):
    with pytest.raises(RuntimeError, match="the model checkpoints activations with use_reentrant=True"):
        fp.flow(Checkpointed(), CASES["mlp"].batches(), needs=(needs,))
