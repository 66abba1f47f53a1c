"""The recipes of the guide's page on frameworks: accelerate, timm, PEFT, skorch and fastai as their users call them."""

import argparse
import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import torch_flowprune as fp

pytestmark = pytest.mark.filterwarnings("default")  # the frameworks warn of their own future

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = (X.sum(-1) > 0).long()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def same_state(one, other):
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


# -- accelerate ------------------------------------------

ACCELERATED = """
import os, signal, sys
import torch
from accelerate import Accelerator
from torch import nn
import torch_flowprune as fp

granularity, folder, act = sys.argv[1:]
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = (X.sum(-1) > 0).long()
torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

pruner = fp.Pruner(
    model, "loss_preservation", 0.6, rounds=3, granularity=granularity, example_inputs=X[:2]
)
fp.keep_zeros(model, optimizer)
accelerator.register_for_checkpointing(pruner)
start = 0
if act == "resume":
    fp.accept_masks(model)
    accelerator.load_state(folder)
    start = 3
for epoch in range(start, 6):
    for x, y in loader:
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        pruner.track()
        optimizer.step()
        optimizer.zero_grad()
    if epoch % 2 == 0 and not pruner.done:
        pruner.step()
    if epoch == 2 and act == "kill":
        accelerator.save_state(folder)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save(fp.state_dict(model), folder + "/" + act + ".pt")
"""


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_a_run_of_accelerate_that_is_killed_and_resumed_ends_the_same(granularity, tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "run.py").write_text(ACCELERATED, encoding="utf-8")

    def run(act):
        call = [sys.executable, tmp_path / "run.py", granularity, str(tmp_path), act]
        return subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)

    assert run("whole").returncode == 0
    assert run("kill").returncode == -9
    resumed = run("resume")
    assert resumed.returncode == 0, resumed.stderr
    one, other = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "resume"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(not value.all() for name, value in one.items() if name.endswith("_mask"))


# -- timm ------------------------------------------------


@pytest.mark.parametrize("average", ["ModelEmaV2", "ModelEmaV3"])
def test_timms_saver_resumes_a_pruned_model_and_its_average(average, tmp_path):
    timm = pytest.importorskip("timm")
    from timm import models, utils

    def make():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=3)
        return model, torch.optim.AdamW(model.parameters(), 1e-3)

    x = torch.randn(2, 3, 32, 32)
    model, optimizer = make()
    ema = getattr(utils, average)(model, decay=0.5)
    fp.global_prune(model, "magnitude", 0.5)
    fp.sync_masks(model, ema.module)
    fp.keep_zeros(model, optimizer)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    folder = str(tmp_path)
    saver = utils.CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="test_resnet"),
        model_ema=ema,
        checkpoint_dir=folder,
        recovery_dir=folder,
    )
    saver.save_checkpoint(0, metric=0.5)
    (path,) = tmp_path.glob("last*")

    resumed, other = make()
    fp.accept_masks(resumed)
    assert models.resume_checkpoint(resumed, str(path), other) == 1
    assert same_state(model, resumed)
    moments = optimizer.state_dict()["state"]
    assert all(torch.equal(kept["exp_avg"], moments[k]["exp_avg"]) for k, kept in other.state_dict()["state"].items())

    averaged, _ = make()
    fp.accept_masks(averaged)
    models.load_checkpoint(averaged, str(path), use_ema=True)
    assert same_state(ema.module, averaged)
    assert fp.report(averaged).sparsity == pytest.approx(0.5, abs=1e-3)


def test_timm_makes_a_model_of_a_pruned_file(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=3)
    fp.global_prune(model, "magnitude", 0.5)
    fp.save_pruned(model, tmp_path / "pruned.safetensors")
    made = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(tmp_path / "pruned.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(made.eval()(x), model.eval()(x))


# -- PEFT ------------------------------------------------


def adapted(base):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))


class Wide(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))


def test_adapters_are_pruned_only_where_they_are_asked_for():
    model = adapted(Wide())
    report = fp.global_prune(model, "magnitude", 0.5)
    named = {layer.name.removeprefix("base_model.model.") for layer in report.layers}
    assert named == {"0.base_layer.weight", "2.base_layer.weight", "4.weight"}
    asked = fp.global_prune(adapted(Wide()), "magnitude", 0.5, include="*lora_A*")
    assert {layer.name.split(".")[-3] for layer in asked.layers} == {"lora_A"}


def test_an_adapter_is_trained_over_a_pruned_model_and_merged_into_its_mask():
    base = Wide()
    fp.global_prune(base, "magnitude", 0.5)
    before = copy.deepcopy(base)
    gone = {name: ~mask for name, mask in fp.masks(base).items()}
    model = adapted(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(5):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    update = model.get_submodule("base_model.model.0").get_delta_weight("default")
    merged = model.merge_and_unload()
    assert fp.masks(merged).keys() == gone.keys()
    assert all(bool((merged[int(name[0])].weight[where] == 0).all()) for name, where in gone.items())
    expected = torch.where(gone["0.weight"], 0, before[0].weight + update)
    torch.testing.assert_close(merged[0].weight, expected)


# -- skorch ----------------------------------------------


def test_skorch_prunes_while_it_fits_and_reads_its_files(tmp_path):
    skorch = pytest.importorskip("skorch")
    from skorch.callbacks import Callback

    class Pruning(Callback):
        def on_train_begin(self, net, **_):
            self.pruner_ = fp.Pruner(net.module_, "snip", 0.6, rounds=3)
            fp.keep_zeros(net.module_, net.optimizer_)

        def on_grad_computed(self, net, named_parameters, **_):
            self.pruner_.track()

        def on_epoch_end(self, net, **_):
            if not self.pruner_.done:
                self.pruner_.step()

    words = {"criterion": nn.CrossEntropyLoss, "max_epochs": 4, "lr": 0.1, "verbose": 0, "train_split": None}
    fitted = skorch.NeuralNetClassifier(Wide, callbacks=[Pruning()], **words).fit(X.numpy(), Y.numpy())
    assert fp.report(fitted.module_).sparsity == pytest.approx(0.6, abs=0.01)
    fitted.save_params(f_params=tmp_path / "params.pt")
    fresh = skorch.NeuralNetClassifier(Wide, **words).initialize()
    fp.accept_masks(fresh.module_)
    fresh.load_params(f_params=tmp_path / "params.pt")
    assert same_state(fitted.module_, fresh.module_)
    assert (fresh.predict(X.numpy()) == fitted.predict(X.numpy())).all()


# -- fastai ----------------------------------------------


def test_fastai_prunes_while_it_fits_and_reads_its_files(tmp_path):
    """Not in the extra, whose other packages are few: run where fastai is."""
    pytest.importorskip("fastai")
    import fastai.callback.progress  # noqa: F401 - gives a learner its no_bar
    from fastai.data.core import DataLoaders
    from fastai.learner import Callback, Learner

    class Pruning(Callback):
        def before_fit(self):
            self.pruner = fp.Pruner(self.learn.model, "snip", 0.6, rounds=3)
            self.zeros = fp.keep_zeros(self.learn.model, self.learn.opt)

        def after_backward(self):
            self.pruner.track()

        def after_epoch(self):
            if not self.pruner.done:
                self.pruner.step()

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8)
    words = {"loss_func": nn.functional.cross_entropy, "path": tmp_path}
    learner = Learner(DataLoaders(loader, loader), net(), cbs=[Pruning()], **words)
    with learner.no_bar(), learner.no_logging():
        learner.fit(4, 1e-2)
    assert fp.report(learner.model).sparsity == pytest.approx(0.6, abs=0.01)
    learner.save("kept")
    other = Learner(DataLoaders(loader, loader), net(), **words)
    fp.accept_masks(other.model)
    other.load("kept")
    assert same_state(learner.model, other.model)


def test_the_recipes_need_no_framework():
    code = textwrap.dedent(
        """
        import sys
        import torch_flowprune
        wanted = {"accelerate", "timm", "peft", "skorch", "fastai", "lightning", "transformers"}
        assert not wanted & set(sys.modules), wanted & set(sys.modules)
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
