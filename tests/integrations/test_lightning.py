"""Pruning while Lightning trains; a run that is killed and resumed ends as the one that was not."""

import pytest
import torch
from torch import nn

import torch_flowprune as fp

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from torch_flowprune.integrations.lightning import FlowPruning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # Lightning warns of loaders, devices and loggers

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
BATCHES = list(zip(X.split(8), (X.sum(-1) > 0).long().split(8), strict=True))


class Net(lightning.LightningModule):
    def __init__(self, momentum=0.9):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        self.example_input_array = torch.ones(2, 6)
        self.momentum = momentum

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(list(zip(X, (X.sum(-1) > 0).long(), strict=True)), 8)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(list(zip(X, (X.sum(-1) > 0).long(), strict=True)), 16)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=self.momentum)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Killed(lightning.Callback):
    """Stops the run as a kill would: with an exception, after so many epochs."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise SystemError("killed")


def trainer(tmp_path, *callbacks, epochs=5, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    options = {"logger": False, "enable_checkpointing": False, **quiet, **options}
    return lightning.Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=list(callbacks), **options)


KINDS = {
    "magnitude": {"method": "magnitude"},
    "tracked": {"method": "loss_preservation"},
    "swept": {"method": "gradient_norm_preservation", "data": "train"},
    "loader": {"method": "fisher", "data": BATCHES},
    "channels": {"method": "taylor", "granularity": "channel"},
    "own loss": {"method": "snip", "data": BATCHES, "loss": nn.functional.cross_entropy},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("validates", [True, False], ids=["saved in validation", "saved after the epoch"])
def test_a_run_that_is_killed_and_resumed_ends_the_same(kind, validates, tmp_path):
    make = lambda: FlowPruning(sparsity=0.6, rounds=3, **KINDS[kind])
    limit = {} if validates else {"limit_val_batches": 0}
    whole = Net()
    trainer(tmp_path, make(), **limit).fit(whole)

    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=not validates)
    with pytest.raises(SystemError):
        trainer(tmp_path, make(), saving, Killed(3), enable_checkpointing=True, **limit).fit(Net())
    resumed, callback = Net(), make()
    trainer(tmp_path, callback, **limit).fit(resumed, ckpt_path=tmp_path / "epoch=2.ckpt")

    assert callback.pruner.done
    assert fp.masks(whole).keys() == fp.masks(resumed).keys() != set()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_scores_of_the_training_are_those_of_its_gradients(tmp_path):
    """One minibatch an epoch: what is tracked is that batch's gradient."""
    model = Net(momentum=0)
    trainer(tmp_path, FlowPruning("snip", 0.5), epochs=2, limit_train_batches=1).fit(model)
    other = Net(momentum=0)
    x, y = BATCHES[0]
    other.train()
    nn.functional.cross_entropy(other(x), y).backward()
    pruner = fp.Pruner(other, "snip", 0.5)
    pruner.track()
    pruner.step()
    assert all(torch.equal(mask, fp.masks(other)[name]) for name, mask in fp.masks(model).items())


def test_sparsities_are_logged_and_a_sweep_logs_nothing(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = FlowPruning("snip", sparsity=0.5, rounds=2, data="train")
    trainer(tmp_path, callback, epochs=3, logger=logger).fit(Net())
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    header, *rows = [line.split(",") for line in text.splitlines()]
    logged = [float(row[header.index("sparsity")]) for row in rows if row[header.index("sparsity")]]
    assert logged == sorted(logged)
    assert logged[-1] == pytest.approx(0.5, abs=0.01)
    assert "sparsity/net.0.weight" in header
    losses = [row for row in rows if row[header.index("train_loss")]]
    assert len(losses) == 3 * len(BATCHES)
    assert [round(report.sparsity, 2) for report in callback.reports][-1] == 0.5


@pytest.mark.parametrize("callback_first", [True, False])
def test_weight_averaging_is_in_step_and_resumes(callback_first, tmp_path):
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")

    def callbacks():
        pair = [FlowPruning("magnitude", 0.6, rounds=3), averaging.EMAWeightAveraging(decay=0.9)]
        return pair if callback_first else pair[::-1]

    whole = Net()
    trainer(tmp_path, *callbacks()).fit(whole)
    masks = fp.masks(whole)
    weights = dict(whole.named_modules())
    for name, mask in masks.items():
        value = weights[name.rpartition(".")[0]].weight
        assert bool((value[~mask] == 0).all())
        assert bool((value[mask] != 0).all())
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    with pytest.raises(SystemError):
        trainer(tmp_path, *callbacks(), saving, Killed(3), enable_checkpointing=True).fit(Net())
    resumed = Net()
    trainer(tmp_path, *callbacks()).fit(resumed, ckpt_path=tmp_path / "epoch=2.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_at_end(tmp_path):
    kept, removed, small = Net(), Net(), Net()
    trainer(tmp_path, FlowPruning(sparsity=0.5), epochs=2).fit(kept)
    trainer(tmp_path, FlowPruning(sparsity=0.5, at_end="remove"), epochs=2).fit(removed)
    assert fp.masks(kept)
    assert not fp.masks(removed)
    assert torch.equal(kept(X), removed(X))
    trainer(tmp_path, FlowPruning(sparsity=0.5, granularity="channel", at_end="shrink"), epochs=2).fit(small)
    assert small.net[0].out_features == 8
    assert small(X).shape == (32, 2)


def test_blocks_go_at_the_end(tmp_path):
    class Residual(Net):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(4))

        def forward(self, x):
            for branch in self.branches:
                x = x + branch(x)
            return self.net(x)

    net = Residual()
    trainer(tmp_path, FlowPruning(sparsity=0.5, granularity="block", at_end="shrink"), epochs=2).fit(net)
    assert sum(isinstance(branch, nn.Sequential) for branch in net.branches) == 2
    assert net(X).shape == (32, 2)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"every_n_epoch": 2}, "FlowPruning does not take every_n_epoch=: did you mean every_n_epochs="),
        ({"min_kept": 2}, "FlowPruning does not take min_kept=: did you mean min_keep="),
        ({"sparsity": 50}, "for 50 percent write 0.5"),
        ({"granularity": "chanel"}, "did you mean 'channel'"),
        ({"rounds": 0}, "rounds should be a whole number of at least 1"),
        ({"normalize": "maen"}, "normalize should be"),
    ],
)
def test_mistakes_are_told_before_there_is_a_model(words, text):
    with pytest.raises((ValueError, TypeError), match=text):
        FlowPruning(**{"sparsity": 0.5, **words})


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"at_end": "drop"}, "at_end should be one of keep, remove, shrink"),
        ({"every_n_epochs": 0}, "every_n_epochs should be"),
        ({"at_end": "shrink"}, "should be with granularity='channel' or granularity='block'"),
        ({"data": "test"}, "data should be 'train', a loader or None"),
        ({"method": "grasp"}, "'grasp' reads Hg, which training does not compute"),
        ({"rounds": 5}, "5 rounds, one every 1 epochs, should have 6 epochs"),
    ],
)
def test_what_cannot_be_is_told_first(words, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        trainer(tmp_path, FlowPruning(**{"sparsity": 0.5, **words}), epochs=5).fit(Net())


def test_training_that_ends_early_is_told(tmp_path):
    callback = FlowPruning(sparsity=0.5, rounds=2)
    with pytest.warns(UserWarning, match="training ended after 1 of 2 rounds"):
        trainer(tmp_path, callback, epochs=-1, max_steps=2 * len(BATCHES)).fit(Net())
