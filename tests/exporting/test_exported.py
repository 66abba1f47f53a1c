"""What is exported is read back and computes what the model does; a file that does not is not kept."""

import copy
import hashlib
import json
import re

import pytest
import torch
from torch import nn

import torch_flowprune as fp
from torch_flowprune.exporting import PrunedFile, formats

pytest.importorskip("safetensors")


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 4)
    )


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def pruned(granularity="weight"):
    model = net()
    fp.global_prune(model, "magnitude", 0.5, granularity=granularity, example_inputs=X)
    return model


def onnx_packages():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx"])
@pytest.mark.parametrize(("granularity", "shrink"), [("weight", False), ("channel", False), ("channel", True)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_format_computes_what_the_model_does(suffix, granularity, shrink, tmp_path):
    if suffix == ".onnx":
        onnx_packages()
    model = pruned(granularity).train()
    before = copy.deepcopy(model.state_dict())
    found = fp.export(model, X, tmp_path / f"out{suffix}", shrink=shrink)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.file_bytes == (tmp_path / f"out{suffix}").stat().st_size
    assert found.dense_bytes == sum(value.nbytes for value in net().state_dict().values())
    whole = sum(value.numel() for value in net().parameters())
    assert (found.parameters < whole) is shrink
    if suffix != ".onnx":
        assert found.difference <= 1e-6
        assert "read back: outputs differ by up to" in str(found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_onnx_file_is_run(tmp_path):
    onnx_packages()
    runtime = pytest.importorskip("onnxruntime")
    model = pruned().eval()
    found = fp.export(model, X, tmp_path / "out.onnx")
    assert 0 <= found.difference < 1e-4
    session = runtime.InferenceSession(str(tmp_path / "out.onnx"))
    (theirs,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert torch.allclose(torch.from_numpy(theirs), model(X), atol=1e-5)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "out.safetensors"
    path.write_text("what was there")
    monkeypatch.setattr(formats, "load_pruned", lambda model, path: model)  # zeros, which nothing was loaded into
    with pytest.raises(ValueError, match="safetensors that was written does not compute what the model does"):
        fp.export(pruned(), X, path)
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "text"),
    [("out.pth", "expected a file name that ends in .onnx, .pt2, .safetensors"), ("no/x.onnx", "make it first")],
)
def test_a_path_that_cannot_be_is_told_first(name, text, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        fp.export(nn.Identity(), X, tmp_path / name)


def test_keywords_and_several_inputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x, y):
            return {"sum": self.a(x) + self.b(y), "both": (x, y)}

    model, example = Two(), {"y": torch.randn(2, 5), "x": torch.randn(2, 4)}
    fp.global_prune(model, "magnitude", 0.5)
    assert fp.export(model, example, tmp_path / "out.pt2").difference <= 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_language_model_is_exported_without_its_cache(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1},
    }
    config = {"gpt2": transformers.GPT2Config, "t5": transformers.T5Config}[kind](vocab_size=64, **sizes[kind])
    model = {"gpt2": transformers.GPT2LMHeadModel, "t5": transformers.T5ForConditionalGeneration}[kind](config).eval()
    ids = torch.randint(3, 64, (2, 7))
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}
    fp.global_prune(model, "magnitude", 0.5)
    assert fp.export(model, batch, tmp_path / "model.pt2").difference == 0
    assert model.config.use_cache
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(program(**batch).logits, model(**batch).logits)  # called as the model is


class Decoder(nn.Module):
    """Knows the keyword, and has no config."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, use_cache=True):
        y = self.layer(x)
        return (y, object()) if use_cache else (y,)


def test_a_cache_without_a_config_is_left_out_too(tmp_path):
    model = Decoder()
    fp.global_prune(model, "magnitude", 0.5)
    assert fp.export(model, torch.ones(2, 8), tmp_path / "model.pt2").difference == 0


# --- safetensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["weight", "filter", "2:4", "channel"])
def test_masks_come_back_as_they_were(granularity, tmp_path):
    model = net()
    with torch.no_grad():
        model[0].weight[0] = 0.0  # kept by some, and zero all the same
        model[1].weight[1] = 0.0
    fp.global_prune(
        model, "random", None if ":" in granularity else 0.5, granularity=granularity, example_inputs=X,
        exclude="0.weight" if ":" in granularity else None, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    fp.save_pruned(model, tmp_path / "a.safetensors", facts={"note": "mine"})
    again = fp.load_pruned(net(), tmp_path / "a.safetensors")
    assert fp.masks(model).keys() == fp.masks(again).keys()
    assert all(torch.equal(mask, fp.masks(again)[name]) for name, mask in fp.masks(model).items())
    assert torch.equal(again.eval()(X), model.eval()(X))
    assert PrunedFile.read(tmp_path / "a.safetensors").facts == {"note": "mine"}
    plain = net()
    plain.load_state_dict(PrunedFile.read(tmp_path / "a.safetensors").tensors)  # strict: any loader takes it
    assert torch.equal(plain.eval()(X), model(X))


@pytest.mark.parametrize("kept_only", [False, True])
def test_a_file_is_as_large_as_what_it_says(kept_only, tmp_path):
    model = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 64))
    fp.global_prune(model, "magnitude", 0.9, allocation="layer")
    with torch.no_grad():
        model[0].weight_orig[model[0].weight_mask.nonzero()[0].tolist()] = 0.0  # a kept value that is 0
    fp.save_pruned(model, tmp_path / "a.safetensors", kept_only=kept_only)
    dense = 4 * sum(value.numel() for value in model.parameters())
    expected = dense * (0.1 + 1 / 32) if kept_only else dense
    assert (tmp_path / "a.safetensors").stat().st_size == pytest.approx(expected, rel=0.05)
    new = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 64))
    again = fp.load_pruned(new, tmp_path / "a.safetensors")
    assert all(torch.equal(mask, fp.masks(again)[name]) for name, mask in fp.masks(model).items())
    assert torch.equal(again(torch.ones(2, 256)), model(torch.ones(2, 256)))


@pytest.mark.parametrize("fault", ["mask", "values", "shape"])
def test_damage_to_kept_values_is_a_value_error(fault, tmp_path):
    from safetensors.torch import load_file, save_file

    fp.save_pruned(pruned(), tmp_path / "a.safetensors", kept_only=True)
    tensors, known = load_file(tmp_path / "a.safetensors"), {"0.weight": list(net()[0].weight.shape)}
    if fault == "mask":
        del tensors["0.weight_mask"]
    elif fault == "values":
        tensors["0.weight_orig"] = tensors["0.weight_orig"][1:].clone()
    else:
        known["0.weight"] = [3]
    save_file(tensors, tmp_path / "b.safetensors", {"torch_flowprune": json.dumps({"kept": known})})
    with pytest.raises(ValueError, match="damaged"):
        fp.load_pruned(net(), tmp_path / "b.safetensors")


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_kept_values_of_a_shrunk_model_and_of_one_that_is_not(granularity, tmp_path):
    model = pruned(granularity)
    model = fp.shrink(model, X) if granularity == "channel" else model
    fp.save_pruned(model, tmp_path / "a.safetensors", kept_only=True)
    again = fp.load_pruned(net(), tmp_path / "a.safetensors").eval()
    assert torch.equal(again(X), model.eval()(X))


MISTAKES = {
    "a mistyped word": (lambda m, p: fp.save_pruned(m, p, kept_onyl=True), TypeError, "did you mean kept_only=?"),
    "another order": (
        lambda m, p: fp.save_pruned(p, m),
        TypeError,
        "path should be the path of a file, got Sequential",
    ),
    "no model": (lambda m, p: fp.save_pruned(m.state_dict(), p), TypeError, "expected a torch.nn.Module"),
    "no folder": (lambda m, p: fp.save_pruned(m, p / "no" / "a"), FileNotFoundError, "make it first"),
    "facts": (lambda m, p: fp.save_pruned(m, p, facts={"a": X}), TypeError, "facts should be plain values by name, wh"),
    "facts in a list": (
        lambda m, p: fp.save_pruned(m, p, facts=[1]),
        TypeError,
        "facts should be plain values by name",
    ),
    "load, another order": (lambda m, p: fp.load_pruned(p, m), TypeError, "expected a torch.nn.Module"),
    "load, no file": (lambda m, p: fp.load_pruned(m, p), FileNotFoundError, "there is no such file"),
    "load, a folder": (lambda m, p: fp.load_pruned(m, p.parent), FileNotFoundError, "there is no such file"),
    "load, torch's": (
        lambda m, p: fp.load_pruned(m, torch_file(p)),
        ValueError,
        "for a file of torch.save use torch.load and fp.load_state_dict",
    ),
    "export, another order": (
        lambda m, p: fp.export(m, p, X),
        TypeError,
        "path should be the path of a file, got Tensor",
    ),
    "export, other inputs": (lambda m, p: fp.export(m, X[:, :2], f"{p}.pt2"), RuntimeError, "to have 3 channels"),
    "export, tolerance": (lambda m, p: fp.export(m, X, f"{p}.pt2", tolerance="a"), ValueError, "tolerance should be a"),
}


def torch_file(path):
    torch.save(net().state_dict(), path)
    return path


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_answered_with_what_was_meant(case, tmp_path):
    call, kind, text = MISTAKES[case]
    path = tmp_path / "a.safetensors"
    with pytest.raises(kind, match=re.escape(text)):
        call(net(), path)
    assert path.exists() is (case == "load, torch's")


def test_a_module_without_parameters_is_exported(tmp_path):
    assert fp.export(nn.Identity(), X, tmp_path / "a.pt2").difference == 0


def test_the_same_model_gives_the_same_bytes(tmp_path):
    sums = set()
    for number in range(12):
        fp.save_pruned(pruned(), tmp_path / f"{number}.safetensors", facts={"method": "magnitude"})
        sums.add(hashlib.sha256((tmp_path / f"{number}.safetensors").read_bytes()).hexdigest())
    assert len(sums) == 1


def test_standardised_kernels_keep_their_masks_and_no_other_loader_takes_them(tmp_path):
    timm = pytest.importorskip("timm")
    layers = pytest.importorskip("timm.layers")
    make = lambda: nn.Sequential(layers.StdConv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(512, 4)).eval()
    assert timm
    model = make()
    fp.global_prune(model, "magnitude", 0.5)
    found = fp.export(model, X, tmp_path / "a.safetensors")
    assert found.difference == 0
    assert torch.equal(fp.load_pruned(make(), tmp_path / "a.safetensors")(X), model(X))
    assert PrunedFile.read(tmp_path / "a.safetensors").masks_apart
    with pytest.raises(RuntimeError, match="weight_orig"):
        make().load_state_dict(PrunedFile.read(tmp_path / "a.safetensors").tensors)


def damaged(tmp_path, change):
    from safetensors.torch import save_file

    made = fp.save_pruned(fp.shrink(pruned("channel"), X), tmp_path / "a.safetensors")
    known = {"masks": {}, "architecture": made.architecture, "facts": {}}
    change(known)
    save_file(made.tensors, tmp_path / "b.safetensors", {"torch_flowprune": json.dumps(known)})
    return tmp_path / "b.safetensors"


def _other(known, part, value):
    known["architecture"][part] = value


@pytest.mark.parametrize(
    "change",
    [
        lambda known: _other(known, "attributes", {"0": {"out_channels": "many"}}),
        lambda known: _other(known, "attributes", {"9": {"out_channels": 3}}),
        lambda known: _other(known, "attributes", {"0": 3}),
        lambda known: _other(known, "attributes", []),
        lambda known: _other(known, "beside", [{}]),
        lambda known: _other(known, "identities", ["9"]),
        lambda known: _other(known, "stand_ins", {"2": {"reads": 0}}),
        lambda known: _other(known, "written", ["0"]),
        lambda known: _other(known, "written", ["9"]),
        lambda known: _other(known, "code", {"0": [["no"]]}),
        lambda known: known.pop("architecture"),
        lambda known: known.update(architecture=[]),
        lambda known: known.update(architecture=None),
        lambda known: known.update(architecture={"attributes": {}}),
        lambda known: known.update(masks={"no": ""}),
        lambda known: known.update(masks={"0.weight": "?"}),
        lambda known: known.update(masks=3),
    ],
)
def test_damaged_metadata_are_a_value_error_and_change_nothing(change, tmp_path):
    path, model = damaged(tmp_path, change), net()
    before = str(model)
    with pytest.raises(ValueError, match=r"damaged|of another model|description|does not fit|no writer is"):
        fp.load_pruned(model, path)
    assert str(model) == before
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in net().state_dict().items()
    }


def test_a_file_that_is_none_and_models_that_take_one(tmp_path):
    (tmp_path / "a.safetensors").write_text("junk")
    with pytest.raises(ValueError, match="damaged"):
        fp.load_pruned(net(), tmp_path / "a.safetensors")
    path = damaged(tmp_path, lambda known: None)
    for model in (net(), pruned(), fp.shrink(pruned("channel"), X)):
        again = fp.load_pruned(model, path)
        assert again is model and again[0].out_channels < 8 and not fp.masks(again)
        assert torch.equal(again.eval()(X), fp.shrink(pruned("channel"), X).eval()(X))


def test_any_damage_of_scores_is_a_value_error(tmp_path):
    from safetensors.torch import save_file

    whole = {"names": ["w"], "method": "a", "granularity": "b"}
    lacking = [{key: value for key, value in whole.items() if key != one} for one in whole]
    others = [[], 3, None, {**whole, "names": 3}, {**whole, "names": ["no"]}, *lacking]
    for said in ("{", *map(json.dumps, others)):
        save_file({"w": torch.ones(2)}, tmp_path / "s.safetensors", {"torch_flowprune": said})
        with pytest.raises(ValueError, match="holds no scores"):
            fp.Scores.load(tmp_path / "s.safetensors")


# --- 2:4 --------------------------------------------------------------------------------------------------------------


def test_semi_structured_kernels_are_refused_on_a_cpu_with_the_reason():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="no linear layer is pruned to 2:4"):
        fp.to_semi_structured(model)
    fp.global_prune(model, granularity="2:4")
    with pytest.raises(ValueError, match=r"2 of 2 layers: 0.weight is on cpu.*on a CPU there are none"):
        fp.to_semi_structured(model)
    with pytest.raises(ValueError, match="on a CPU there are none"):
        fp.to_semi_structured(model, strict=False)
    assert list(fp.masks(model)) == ["0.weight", "2.weight"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's 2:4 kernels run on GPUs")
def test_semi_structured_kernels_compute_what_the_model_does():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128)).cuda().half().eval()
    fp.global_prune(model, granularity="2:4")
    x = torch.randn(64, 256, device="cuda", dtype=torch.half)
    assert torch.allclose(fp.to_semi_structured(model)(x), model(x), rtol=1e-2, atol=1e-2)
