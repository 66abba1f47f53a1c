"""Folders of shards pruned as global_prune prunes the model that they hold, bit for bit."""

import json
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.checkpoints import local_choices, pruned_copy

safetensors = pytest.importorskip("safetensors.torch")
HALF = torch.bfloat16


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, 8, bias=False)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(4, 8, 3)


def net(dtype=HALF, seed=0, width=16):
    torch.manual_seed(seed)
    model = nn.Module()
    model.embed = nn.Embedding(11, width)
    model.blocks = nn.ModuleList([Block(width) for _ in range(12)])
    model.head = nn.Linear(width, 5)
    return model.to(dtype)


def saved(model, folder, shards=3, order=None, **more):
    """The folder that downloads have: shards, index, configuration."""
    folder.mkdir()
    tensors = {**model.state_dict(), **more}
    names = list(tensors)
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        own = {name: tensors[name].contiguous() for name in names if where[name] == file}
        safetensors.save_file(own, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: where[name] for name in order or names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a")
    return folder


def loaded(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.load_file(path)
    return found


def same_zeros(model, folder, **words):
    """What global_prune leaves of the model is what the folder holds."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fp.global_prune(model, "magnitude", **words)
    fp.remove(model)
    found = loaded(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name
        kept = found[name] != 0
        assert torch.equal(found[name][kept], before[name][kept])
    return report


def quietly(call, *args, **words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (fp.TiedScoresWarning, fp.LayerCollapseWarning))
        return call(*args, **words)


WORDS = {
    "global": {"sparsity": 0.5},
    "most": {"sparsity": 0.97},
    "none": {"sparsity": 0.0},
    "all": {"sparsity": 1.0},
    "layer": {"sparsity": 0.6, "allocation": "layer"},
    "row": {"sparsity": 0.6, "allocation": "row"},
    "erk": {"sparsity": 0.6, "allocation": "erk"},
    "given": {"sparsity": 0.5, "allocation": {"*.query": 0.9, "head": 0.1}},
    "floors": {"sparsity": 0.8, "min_keep": 0.15},
    "caps": {"sparsity": 0.6, "max_sparsity": {"*.key": 0.2, "*.conv": 0.55}},
    "2:4": {"granularity": "2:4"},
    "4:16": {"granularity": "4:16", "exclude": "*.conv"},
    "some": {"sparsity": 0.5, "include": ["*.query", "head"], "exclude": "blocks.3.*"},
}


@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_zeros_are_those_of_global_prune(tmp_path, dtype, words):
    model = net(dtype)
    source = saved(model, tmp_path / "dense")
    report = quietly(fp.prune_checkpoint, source, tmp_path / "pruned", **words)
    ours = quietly(same_zeros, model, tmp_path / "pruned", **words)
    assert (report.pruned, report.units) == (ours.pruned, ours.units)
    assert report.threshold is None or report.tied == ours.tied
    assert [layer.name for layer in report.layers] == [layer.name for layer in ours.layers]
    assert [layer.why for layer in report.layers] == [layer.why for layer in ours.layers]
    assert report.threshold == ours.threshold
    assert report.model_weights == ours.model_weights


def test_parts_smaller_than_tensors(tmp_path, monkeypatch):
    """Ties that a part's border cuts, and rows that do not fit one part."""
    for module in (local_choices, pruned_copy, sys.modules["torch_flowprune.checkpoints.key_counts"]):
        monkeypatch.setattr(module, "PART", 7, raising=False)
    for name in ("global", "row", "2:4"):
        model = net()
        source = saved(model, tmp_path / f"dense {name.replace(':', '')}")
        quietly(fp.prune_checkpoint, source, tmp_path / f"out {name.replace(':', '')}", **WORDS[name])
        quietly(same_zeros, model, tmp_path / f"out {name.replace(':', '')}", **WORDS[name])


def test_many_ties_and_zeros_of_both_signs(tmp_path):
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 40).round() / 4)
            parameter.view(-1)[::3] = -0.0
    source = saved(model, tmp_path / "dense")
    report = quietly(fp.prune_checkpoint, source, tmp_path / "out", sparsity=0.55)
    assert report.tied
    quietly(same_zeros, model, tmp_path / "out", sparsity=0.55)


def test_shards_of_several_dtypes(tmp_path):
    model = net(torch.float32)
    model.blocks[:4].to(torch.float16)
    model.blocks[4:8].to(HALF)
    source = saved(model, tmp_path / "dense")
    quietly(fp.prune_checkpoint, source, tmp_path / "out", sparsity=0.5)
    quietly(same_zeros, model, tmp_path / "out", sparsity=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float64], ids=str)
@pytest.mark.parametrize("words", [WORDS[name] for name in ("global", "layer", "row", "2:4")], ids=str)
def test_scores_of_another_measure(tmp_path, dtype, words):
    """Signed, some of them infinite."""
    model = net()
    source = saved(model, tmp_path / "dense")
    torch.manual_seed(1)
    prunable = [name for name, value in model.state_dict().items() if value.dim() > 1 and "embed" not in name]
    scores = {name: torch.randn(model.state_dict()[name].shape).to(dtype) for name in prunable}
    scores["head.weight"][0, :2] = torch.tensor([torch.inf, -torch.inf])
    (tmp_path / "scores").mkdir()
    safetensors.save_file(scores, tmp_path / "scores" / "scores.safetensors")
    quietly(fp.prune_checkpoint, source, tmp_path / "out", "grasp", scores=tmp_path / "scores", **words)
    quietly(fp.global_prune, model, scores=scores, **words)
    fp.remove(model)
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_scores_that_fp_scores_has_saved(tmp_path):
    model = net(torch.float32)
    source = saved(model, tmp_path / "dense")
    (tmp_path / "scores").mkdir()
    fp.scores(model, "magnitude").save(tmp_path / "scores" / "all.safetensors")
    quietly(fp.prune_checkpoint, source, tmp_path / "out", scores=tmp_path / "scores", sparsity=0.5)
    quietly(same_zeros, model, tmp_path / "out", sparsity=0.5)


def test_all_else_is_carried_over(tmp_path):
    more = {"steps": torch.arange(6).view(2, 3), "scale": torch.ones(3)}
    source = saved(net(), tmp_path / "dense", **more)
    (source / ".cache").mkdir()
    (source / ".cache" / "lock").write_text("")
    (source / "original.pth").write_bytes(b"dense")
    with pytest.warns(UserWarning, match="original.pth hold weights and are not part of this checkpoint"):
        quietly_reported = fp.prune_checkpoint(source, tmp_path / "out", sparsity=0.1)
    assert quietly_reported.pruned
    out = tmp_path / "out"
    for path in source.rglob("*"):
        inside = out / path.relative_to(source)
        assert inside.exists() == (".cache" not in path.parts and path.suffix != ".pth"), path
        if path.suffix == ".safetensors":
            assert inside.stat().st_size == path.stat().st_size
            with safetensors.safe_open(inside, "pt") as new, safetensors.safe_open(path, "pt") as old:
                assert new.metadata() == old.metadata()
        elif inside.is_file():
            assert inside.read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("*.unfinished"))
    found, dense = loaded(out), loaded(source)
    assert all(torch.equal(found[name], dense[name]) for name in ("steps", "scale", "embed.weight"))


def test_an_index_sorted_by_name_and_the_order_of_the_model(tmp_path):
    """Equal weights everywhere: which go is the order's word alone."""
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    source = saved(model, tmp_path / "dense", order=sorted(model.state_dict()))
    quietly(fp.prune_checkpoint, source, tmp_path / "out", sparsity=0.5, order=model)
    names = [name for name, _ in model.named_parameters()]
    quietly(fp.prune_checkpoint, source, tmp_path / "named", sparsity=0.5, order=names)
    quietly(same_zeros, model, tmp_path / "out", sparsity=0.5)
    assert all(torch.equal(loaded(tmp_path / "named")[name], value) for name, value in model.state_dict().items())


def test_a_model_of_transformers_as_it_saves_itself(tmp_path):
    """Its index is sorted; the model that config.json names gives the order of equal weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=11,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(HALF)
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    report = quietly(fp.prune_checkpoint, tmp_path / "dense", tmp_path / "out", sparsity=0.5)
    assert [layer.name for layer in report.layers if layer.pruned == 0] == []
    assert not any("embed" in layer.name or "norm" in layer.name for layer in report.layers)
    quietly(fp.global_prune, model, sparsity=0.5)
    fp.remove(model)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=HALF)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_killed_run_goes_on(tmp_path):
    """Killed at the second shard that it writes, and started again: what is finished is not written again."""
    model = net()
    source = saved(model, tmp_path / "dense", shards=5)
    program = f"""
import sys, os, signal
import torch_flowprune as fp
from torch_flowprune.checkpoints import prune_checkpoint as route
import importlib
module = importlib.import_module("torch_flowprune.checkpoints.prune_checkpoint")
write, written = module.write_pruned, []
def stopped(source, out, *rest):
    written.append(source)
    if len(written) == 3:
        out.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(source, out, *rest)
module.write_pruned = stopped
fp.prune_checkpoint({str(source)!r}, {str(tmp_path / "out")!r}, sparsity=0.5, threads=1)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.unfinished").rglob("*.safetensors")}
    assert len(finished) == 2
    with pytest.raises(ValueError, match="interrupted run with another source or other arguments"):
        fp.prune_checkpoint(source, tmp_path / "out", sparsity=0.6)
    quietly(fp.prune_checkpoint, source, tmp_path / "out", sparsity=0.5)
    for path, when in finished.items():
        assert (tmp_path / "out" / path.name).stat().st_mtime_ns == when
    assert not list(tmp_path.glob("*.unfinished"))
    assert not list((tmp_path / "out").rglob("*.half"))
    quietly(same_zeros, model, tmp_path / "out", sparsity=0.5)


def index_of(folder):
    return folder / "model.safetensors.index.json"


def rewritten(change):
    """The index with another map."""

    def make(folder):
        known = json.loads(index_of(folder).read_text())
        change(known["weight_map"])
        index_of(folder).write_text(json.dumps(known))

    return make


def shard(folder):
    return min(folder.glob("*.safetensors"))


def elsewhere(known):
    known["head.weight"] = min(set(known.values()) - {known["head.weight"]})


DAMAGE = {
    "is no index of a checkpoint, or damaged": lambda folder: index_of(folder).write_text("{"),
    "is no index of a checkpoint, or damage": lambda folder: index_of(folder).write_text("[]"),
    "weight_map should map names of tensors": rewritten(
        lambda known: known.update({"head.weight": "../a.safetensors"})
    ),
    "and it is not: the index is damaged": rewritten(elsewhere),
    "holds 'head.weight', of which": rewritten(lambda known: known.pop("head.weight")),
    "names 1 shards that are not there: model-00001-of-00003": lambda folder: shard(folder).unlink(),
    "was cut short; download it again": lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-10]),
    "is no safetensors file, or damaged": lambda folder: shard(folder).write_bytes(b"\x00" * 40),
    "no safetensors file, or damaged": lambda folder: shard(folder).write_bytes((1 << 60).to_bytes(8, "little")),
    "holds 3 .safetensors files and no": lambda folder: index_of(folder).unlink(),
    "holds 2 checkpoints": lambda folder: (folder / "b.safetensors.index.json").write_text("{}"),
}


@pytest.mark.parametrize("text", DAMAGE)
def test_damage_is_told_before_anything_is_made(tmp_path, text):
    source = saved(net(), tmp_path / "dense")
    DAMAGE[text](source)
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        fp.prune_checkpoint(source, tmp_path / "out", sparsity=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_other_refusals(tmp_path):
    source = saved(net(), tmp_path / "dense")
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    file = min(source.glob("*.safetensors"))
    out = tmp_path / "out"
    calls = [
        (lambda: fp.prune_checkpoint(source, there, sparsity=0.5), FileExistsError, "is already there"),
        (lambda: fp.prune_checkpoint(source, tmp_path / "a" / "b", sparsity=0.5), FileNotFoundError, "make it first"),
        (
            lambda: fp.prune_checkpoint(tmp_path / "pickled", out, sparsity=0.5),
            ValueError,
            "pytorch_model.bin, a pickle",
        ),
        (lambda: fp.prune_checkpoint(tmp_path / "empty", out, sparsity=0.5), ValueError, "found none"),
        (lambda: fp.prune_checkpoint(tmp_path, out, sparsity=0.5), ValueError, "there are some in dense"),
        (lambda: fp.prune_checkpoint(file, out, sparsity=0.5), NotADirectoryError, "is a file: expected a folder"),
        (lambda: fp.prune_checkpoint(tmp_path / "no", out, sparsity=0.5), FileNotFoundError, "there is no such folder"),
        (lambda: fp.prune_checkpoint(source, out, "taylor", 0.5), ValueError, "reads more than the weights"),
        (lambda: fp.prune_checkpoint(source, out, granularity="filter"), ValueError, "granularity should be"),
        (lambda: fp.prune_checkpoint(source, out, sparsity=0.5, allocation="lamp"), ValueError, "needs a model"),
        (lambda: fp.prune_checkpoint(source, out), ValueError, "give sparsity="),
        (lambda: fp.prune_checkpoint(source, out, sparsity=0.5, include="x*"), ValueError, "matches no parameter"),
        (lambda: fp.prune_checkpoint(source, out, sparsity=0.5, scores=tmp_path / "no"), FileNotFoundError, "scores"),
    ]
    for call, error, text in calls:
        with pytest.raises(error, match=text):
            call()
    assert not out.exists()
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("words", [WORDS[name] for name in ("global", "row", "2:4")], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(tmp_path, words, value):
    model = net()
    with torch.no_grad():
        model.blocks[7].query.weight[3, 5] = value
    source = saved(model, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"some weights of 'blocks.7.query.weight' are infinite or nan"):
        fp.prune_checkpoint(source, tmp_path / "out", **words)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_quantised_weights_and_masks_are_refused(tmp_path):
    folder = tmp_path / "int8"
    folder.mkdir()
    safetensors.save_file({"a.weight": torch.ones(4, 4, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="'a.weight' is stored as I8, quantised"):
        fp.prune_checkpoint(folder, tmp_path / "out", sparsity=0.5)
    model = net()
    quietly(fp.global_prune, model, sparsity=0.5)
    source = saved(model, tmp_path / "masked")
    with pytest.raises(ValueError, match="has a mask beside it: fp.remove the masks"):
        fp.prune_checkpoint(source, tmp_path / "out", sparsity=0.5)


def test_a_disk_without_room(tmp_path, monkeypatch):
    source = saved(net(), tmp_path / "dense")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match="GB are free: make room"):
        fp.prune_checkpoint(source, tmp_path / "out", sparsity=0.5)


def test_one_file_without_an_index(tmp_path):
    model = net()
    (tmp_path / "one").mkdir()
    safetensors.save_file(model.state_dict(), tmp_path / "one" / "model.safetensors")
    quietly(fp.prune_checkpoint, tmp_path / "one", tmp_path / "out", sparsity=0.5, order=model)
    quietly(same_zeros, model, tmp_path / "out", sparsity=0.5)


def test_memory_does_not_grow_with_the_files(tmp_path):
    """128 MB of weights, of which never more than a few parts are held."""
    (tmp_path / "large").mkdir()
    weights = {f"layers.{i}.weight": torch.randn(4096, 4096).to(HALF) for i in range(4)}
    safetensors.save_file(weights, tmp_path / "large" / "model.safetensors")
    program = f"""
import resource
import torch_flowprune as fp
import torch._dynamo  # what the first call imports of torch is none of the weights
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
fp.prune_checkpoint({str(tmp_path / "large")!r}, {str(tmp_path / "out")!r}, sparsity=0.5)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 64
