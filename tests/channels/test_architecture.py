"""A shrunk model described, rebuilt, saved and loaded: with masks on, without, and from damaged files."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import torch_flowprune as fp

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import load_file, save_file


class Net(nn.Module):
    """A tied weight, a buffer in no state dict that goes with the channels, and numbers of both kinds."""

    def __init__(self, width=8):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)
        self.again = self.a
        self.register_buffer("table", torch.arange(1.0, width + 1), persistent=False)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))) * self.table)


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def shrunk(model=None, sparsity=0.5):
    """The natural route: the dense model goes on wearing its masks."""
    torch.manual_seed(0)
    model = (model or Net()).eval()
    fp.global_prune(model, "magnitude", sparsity, granularity="channel", example_inputs=X)
    return model, fp.shrink(model, X)


def test_the_natural_route():
    model, small = shrunk()
    text = json.dumps(fp.describe(model, small))
    assert json.loads(text)["attributes"]["a"] == {"out_features": 4}
    for dense in (Net(), model):  # newly built, or still with its masks
        again = fp.rebuild(dense, json.loads(text)).eval()
        again.load_state_dict(small.state_dict())
        assert torch.equal(again(X), small(X))  # the table too, which no state dict has
    assert again is model
    assert not fp.masks(model)


def test_a_file(tmp_path):
    _, small = shrunk()
    fp.save_pruned(small, tmp_path / "small.safetensors")
    again = fp.load_pruned(Net(), tmp_path / "small.safetensors")
    assert torch.equal(again.eval()(X), small(X))
    assert again.a.weight is again.again.weight
    assert (again.a.out_features, again.norm.num_features) == (4, 4)
    assert fp.describe(small, again) == fp.describe(small, small)


def test_masks_go_along(tmp_path):
    model, _ = shrunk()
    small = fp.shrink(model, X)
    fp.global_prune(small, "magnitude", 0.5)
    fp.save_pruned(small, tmp_path / "small.safetensors")
    again = fp.load_pruned(Net(), tmp_path / "small.safetensors").eval()
    assert torch.equal(again(X), small(X))
    assert {name: mask.tolist() for name, mask in fp.masks(again).items()} == {
        name: mask.tolist() for name, mask in fp.masks(small).items()
    }
    other = fp.load_pruned(fp.shrink(model, X), tmp_path / "small.safetensors").eval()  # of a smaller one, as well
    assert torch.equal(other(X), small(X))


def test_what_no_state_dict_has_is_saved_from_wherever_the_model_has_been(tmp_path):
    path = tmp_path / "small.safetensors"
    _, small = shrunk()
    expected = small(X)
    wrapped = nn.ModuleDict({"model": pickle.loads(pickle.dumps(copy.deepcopy(small)))})
    fp.save_pruned(wrapped, path)
    again = fp.load_pruned(nn.ModuleDict({"model": Net()}), path)["model"].eval()
    assert torch.equal(again(X), expected)
    fp.save_pruned(fp.shrink(pruned_more(again), X), path)
    twice = fp.load_pruned(Net(), path).eval()
    assert twice.table.shape == (2,) and torch.equal(twice(X), again(X))
    assert torch.equal(fp.load_pruned(twice, path)(X), again(X))  # into the one that it is of


def pruned_more(model):
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", example_inputs=X)
    return model


def test_of_a_model_that_kept_its_sizes_nothing_but_weights_and_masks_is_loaded(tmp_path):
    def net(p, width=8):
        return nn.Sequential(nn.Linear(3, width), nn.Dropout(p), nn.Linear(width, 2))

    model, path = net(0.1), tmp_path / "pruned.safetensors"
    fp.global_prune(model, "magnitude", 0.5)
    fp.save_pruned(model, path)
    assert fp.load_pruned(net(0.5), path)[1].p == 0.5
    again = fp.load_pruned(net(0.5, width=9), path)
    assert torch.equal(again.eval()(X), model.eval()(X))  # a larger one is made what the file has
    with pytest.raises(ValueError, match=r"is larger in 0.weight \(\[8, 3\] of \[7, 3\]\)"):
        fp.load_pruned(net(0.5, width=7), path)
    fp.save_pruned(net(0.5), path)
    assert not fp.masks(fp.load_pruned(model, path))


def test_a_tied_weight_is_written_once_where_this_package_alone_reads(tmp_path):
    _, small = shrunk()
    sizes = []
    for kept_only in (False, True):
        fp.save_pruned(small, tmp_path / "a.safetensors", kept_only=kept_only)
        sizes.append(len(load_file(tmp_path / "a.safetensors")))
        assert torch.equal(fp.load_pruned(Net(), tmp_path / "a.safetensors").eval()(X), small(X))
    assert sizes[0] == sizes[1] + 2  # again.weight and again.bias


def test_a_branch_that_is_gone(tmp_path):
    dense, small = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    fp.save_pruned(small, tmp_path / "small.safetensors")
    assert fp.describe(dense, small)["identities"] == ["0"]
    again = fp.load_pruned(dense, tmp_path / "small.safetensors")
    assert torch.equal(again(X), small(X))


def test_another_model_is_refused_and_left_as_it_was(tmp_path):
    _, small = shrunk()
    fp.save_pruned(small, tmp_path / "small.safetensors")
    for other in (nn.Linear(3, 2), Net(3), nn.Sequential(nn.Linear(3, 2))):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(ValueError, match="of another model|expected at most"):
            fp.load_pruned(other, tmp_path / "small.safetensors")
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(fp.ShrinkError, match="pass the model that it was shrunk from"):
        fp.describe(nn.Sequential(nn.Linear(3, 2)), small)


def damaged(path, change):
    """The file with its own words about itself changed."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    metadata["torch_flowprune"] = change(metadata["torch_flowprune"])
    if metadata["torch_flowprune"] is None:
        del metadata["torch_flowprune"]
    save_file(tensors, path, metadata)


def forged(path, change):
    """The same, and the digest of it too."""
    damaged(path, change)
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if "sha256" not in key}
    tensors = load_file(path)
    save_file(tensors, path, metadata)


def with_part(text, part):
    """What a file says, with another part of its architecture."""
    words = json.loads(text)
    return json.dumps({**words, "architecture": {**words["architecture"], **part}})


CHANGES = {
    "none": lambda text: None,
    "no JSON": lambda text: text[:-3],
    "a list": lambda text: "[1]",
    "nothing": lambda text: "null",
    "another size": lambda text: text.replace('"out_features": 4', '"out_features": 5'),
    "another name": lambda text: text.replace('"attributes"', '"attribute"'),
}
FORGED = {
    "no JSON": lambda text: text[:-3],
    "a word for a number": lambda text: text.replace('"out_features": 4', '"out_features": "four"'),
    "no module": lambda text: text.replace('"norm"', '"nrm"'),
    "a word for attributes": lambda text: with_part(text, {"attributes": {"a": 3}}),
    "attributes in a list": lambda text: with_part(text, {"attributes": []}),
    "an identity of none": lambda text: with_part(text, {"identities": ["c"]}),
    "identities that are numbers": lambda text: with_part(text, {"identities": [3]}),
    "buffers that are none": lambda text: with_part(text, {"beside": [{}]}),
}


@pytest.mark.parametrize("harm", [damaged, forged])
@pytest.mark.parametrize("change", {**CHANGES, **FORGED})
def test_a_damaged_file_is_a_value_error(tmp_path, change, harm):
    path = tmp_path / "small.safetensors"
    fp.save_pruned(shrunk()[1], path)
    harm(path, {**CHANGES, **FORGED}[change])
    model = Net()
    if harm is forged and change == "another size":
        pytest.skip("a whole number in place of another, and nothing that tells of it")
    with pytest.raises(ValueError, match=r"small\.safetensors|the description|does not fit the model"):
        fp.load_pruned(model, path)
    assert model.a.weight.shape == (8, 3)


@pytest.mark.parametrize("kind", ["text", "half a file", "other tensors"])
def test_no_such_file(tmp_path, kind):
    path = tmp_path / "small.safetensors"
    fp.save_pruned(shrunk()[1], path)
    match kind:
        case "text":
            path.write_text("hello")
        case "half a file":
            path.write_bytes(path.read_bytes()[:100])
        case "other tensors":
            save_file({"a.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is damaged, or no safetensors file|does not fit the model"):
        fp.load_pruned(Net(), path)


DESCRIPTIONS = {
    "no mapping": [],
    "a part is missing": {"shapes": {}},
    "a part too many": {"shapes": {}, "attributes": {}, "code": "x"},
    "shapes in a list": {"shapes": [], "attributes": {}},
    "no such tensor": {"shapes": {"c.weight": [1]}, "attributes": {}},
    "larger": {"shapes": {"a.weight": [9, 3]}, "attributes": {}},
    "another number of axes": {"shapes": {"a.weight": [4]}, "attributes": {}},
    "no shape": {"shapes": {"a.weight": "4, 3"}, "attributes": {}},
    "no module": {"shapes": {}, "attributes": {"c": {"out_features": 3}}},
    "a method": {"shapes": {}, "attributes": {"a": {"forward": 3}}},
    "the class": {"shapes": {}, "attributes": {"a": {"__class__": 3}}},
    "a flag": {"shapes": {}, "attributes": {"a": {"training": 0}}},
    "of another kind": {"shapes": {}, "attributes": {"a": {"out_features": [3]}}},
    "values without a shape": {"shapes": {}, "attributes": {}, "values": {"table": [1.0]}},
    "too few values": {"shapes": {"table": [4]}, "attributes": {}, "values": {"table": [1.0]}},
    "values of words": {"shapes": {"table": [1]}, "attributes": {}, "values": {"table": ["one"]}},
    "an identity of none": {"shapes": {}, "attributes": {}, "identities": ["c"]},
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_damaged_description_is_a_value_error(case):
    model = Net()
    with pytest.raises(ValueError, match="the description|a description should hold"):
        fp.rebuild(model, DESCRIPTIONS[case])
    assert model.a.weight.shape == (8, 3)
    assert model.a.out_features == 8
