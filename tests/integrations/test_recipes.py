"""The recipes of the guide's page on frameworks, as the users of these call them."""

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
    killed_and_resumed(ACCELERATED, tmp_path, granularity)


def killed_and_resumed(code, folder, *words):
    """Both ends are equal, bit for bit, and pruned."""
    (folder / "run.py").write_text(code, encoding="utf-8")

    def run(act):
        (kept := folder / ("whole" if act == "whole" else "stopped")).mkdir(exist_ok=True)
        call = [sys.executable, folder / "run.py", *words, str(kept), act]
        return subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)

    for act, code in (("whole", 0), ("kill", -9), ("resume", 0)):
        done = run(act)
        assert done.returncode == code, done.stderr
    one, other = torch.load(folder / "whole/whole.pt"), torch.load(folder / "stopped/resume.pt")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    packed = [value for name, value in one.items() if name.endswith("_mask")]
    assert any(not value.eq(255).all() for value in packed)


# -- Fabric ----------------------------------------------

FABRICATED = """
import os, signal, sys
import torch
from lightning.fabric import Fabric
from torch import nn
import torch_flowprune as fp

folder, act = sys.argv[1:]
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = (X.sum(-1) > 0).long()
torch.manual_seed(0)
fabric = Fabric(accelerator="cpu", devices=1)
model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), 0.05))
loader = fabric.setup_dataloaders(
    torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8)
)
pruner = fp.Pruner(model, "loss_preservation", 0.6, rounds=3)
fp.keep_zeros(model, optimizer)
state = {"model": model, "optimizer": optimizer, "pruner": pruner, "epoch": 0}
if act == "resume":
    fp.accept_masks(model)
    fabric.load(folder + "/last.ckpt", state)
for epoch in range(state["epoch"], 6):
    for x, y in loader:
        fabric.backward(nn.functional.cross_entropy(model(x), y))
        pruner.track()
        optimizer.step()
        optimizer.zero_grad()
    if epoch % 2 == 0:
        pruner.step()
    state["epoch"] = epoch + 1
    if epoch == 2 and act == "kill":
        fabric.save(folder + "/last.ckpt", state)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save(fp.state_dict(model), folder + "/" + act + ".pt")
"""


def test_a_run_of_fabric_that_is_killed_and_resumed_ends_the_same(tmp_path):
    pytest.importorskip("lightning.fabric")
    killed_and_resumed(FABRICATED, tmp_path)


@pytest.fixture
def fabric():
    return pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)


def test_fabrics_wrapper_has_the_names_of_its_state_dict(fabric, tmp_path):
    model, again = fabric.setup(net()), fabric.setup(net())
    fp.global_prune(model, "magnitude", 0.5)
    fp.load_state_dict(again, fp.state_dict(model))
    assert same_state(model, again)
    plain = net()
    fp.load_state_dict(plain, fp.state_dict(model))
    assert fp.report(plain).sparsity == 0.5
    pytest.importorskip("safetensors")
    fp.save_pruned(model, tmp_path / "pruned.safetensors")
    loaded, wrapped = net(), fabric.setup(net())
    for one in (loaded, wrapped):
        fp.load_pruned(one, tmp_path / "pruned.safetensors")
        assert fp.report(one).sparsity == 0.5


# -- Ignite ----------------------------------------------

IGNITED = """
import os, signal, sys
from pathlib import Path
import torch
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, EMAHandler
from torch import nn
import torch_flowprune as fp

folder, act = sys.argv[1:]
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = (X.sum(-1) > 0).long()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8)
trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
ema = EMAHandler(model, momentum=0.1)
ema.attach(trainer, name="momentum", event=Events.ITERATION_COMPLETED)
pruner = fp.Pruner(model, "loss_preservation", 0.6, rounds=3, averages=[ema.ema_model])
fp.keep_zeros(model, optimizer)
trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: pruner.track())
trainer.add_event_handler(Events.EPOCH_COMPLETED(every=2), lambda: pruner.step())
kept = {"trainer": trainer, "model": model, "optimizer": optimizer}
kept |= {"pruner": pruner, "ema": ema.ema_model}
saver = Checkpoint(kept, DiskSaver(folder, require_empty=False), n_saved=1)
trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
if act == "kill":
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=3), kill)
if act == "resume":
    fp.accept_masks(model)
    fp.accept_masks(ema.ema_model)
    (path,) = Path(folder).glob("checkpoint_*.pt")
    Checkpoint.load_objects(to_load=kept, checkpoint=torch.load(path))
trainer.run(loader, max_epochs=6)
both = fp.state_dict(model) | {"ema." + k: v for k, v in fp.state_dict(ema.ema_model).items()}
torch.save(both, folder + "/" + act + ".pt")
"""


def test_a_run_of_ignite_that_is_killed_and_resumed_ends_the_same(tmp_path):
    pytest.importorskip("ignite")
    killed_and_resumed(IGNITED, tmp_path)


# -- PyTorch Geometric -----------------------------------


def test_batches_of_graphs():
    pytest.importorskip("torch_geometric")
    from torch_geometric.data import Batch, Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.head = GCNConv(5, 8), GCNConv(8, 8), nn.Linear(8, 3)

        def forward(self, x, edges, batch):
            hidden = self.second(self.first(x, edges).tanh(), edges).tanh()
            return self.head(global_mean_pool(hidden, batch))

    def closure(model, batch):
        return nn.functional.cross_entropy(model(batch.x, batch.edge_index, batch.batch), batch.y)

    sizes = (4, 6, 3, 7, 5)
    graphs = [
        Data(x=torch.randn(n, 5), edge_index=torch.randint(n, (2, 3 * n)), y=torch.tensor([n % 3])) for n in sizes
    ]
    model, words = Net(), {"closure": closure, "batch_size": lambda batch: batch.num_graphs}
    found = fp.flow(model, DataLoader(graphs, 2), needs=("g",), **words)
    expected = torch.autograd.grad(closure(model, Batch.from_data_list(graphs)), list(model.parameters()))
    pairs = zip(found.g.values(), expected, strict=True)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)
    include = ["*", "*.lin.weight"]
    report = fp.global_prune(model, "fisher", 0.5, data=DataLoader(graphs, 2), include=include, **words)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert {layer.name for layer in report.layers} == {"first.lin.weight", "second.lin.weight", "head.weight"}


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
