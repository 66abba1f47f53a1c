"""Rows 2 of docs/explanation/host.md: weights read without calling their owner, so that no cached product is fresh."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hosts import assert_in_force, hooks_of, pruned, snapshot, train
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import torch_flowprune as fp
from torch_flowprune.inputs.named_parameters.parameters import parameters_of

ROWS = {
    "2.1": (
        (
            "`MultiheadAttention.out_proj`: crashes on the second step, stale after loading, frozen if pruned under"
            " `no_grad`"
        ),
        "handled",
        "trains, also under data parallelism",
    ),
    "2.2": (
        "`in_proj_weight`, and the fast path of attention (no fault)",
        "handled",
        "eval and train agree",
    ),
    "2.3": (
        "`TransformerEncoderLayer` leaves its fast path when pruned",
        "documented",
        (
            "torch leaves the fast path wherever there is a hook. The outputs agree, and `fp.remove` restores the "
            "fast path"
        ),
    ),
    "2.4": (
        (
            "timm's eva02, beit, beitv2, swinv2 (`qkv`) and coatnet (position bias): crash on the second step, "
            "stale in eval"
        ),
        "handled",
        "the mask is in the weights that the forward reads",
    ),
    "2.5": (
        "`F.linear(x, layer.weight)`, `layer.forward(x)`, `forward_features()`",
        "handled",
        "as 2.4",
    ),
    "2.6": (
        "recurrent layers keep an old dtype in `_flat_weights`",
        "handled",
        "the list is computed when it is read. cuDNN was not tested (it needs a GPU)",
    ),
    "2.7": (
        "edits of `.weight` are lost at the next forward",
        "handled",
        (
            "methods that write (`weight.data.mul_`, `weight.data += adapter`, `nn.init`, `reset_parameters()`, "
            "also on slices and views) write to `weight_orig`. Functions that write (`torch.relu_(weight.data)`, "
            "`out=` as in `nn.init.eye_`) reach it, where the mask keeps it, when their tensor is dropped; a "
            "warning says so if the parameter had changed in between. `layer.weight = nn.Parameter(...)` and "
            "`layer.weight.data = ...` replace the values under the mask. Values that cannot carry it (another "
            "shape, quantised, sparse, meta) are refused. Assigning anything else is a `TypeError`, also a tensor "
            "of equal values"
        ),
    ),
    "2.8": (
        "a root hook that refreshes all weights misses `forward_features()`",
        "handled",
        "there is nothing to refresh",
    ),
}

TOKENS = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def out_proj_pruned():
    return pruned(Attention(), include="*out_proj.weight")


def test_row_2_1_out_proj_trains():
    model = out_proj_pruned()
    before = model.attention.out_proj.weight_orig.clone()
    train(model, TOKENS, steps=3)
    kept = model.attention.out_proj.weight_mask
    assert not torch.equal(model.attention.out_proj.weight_orig[kept], before[kept])
    assert_in_force(model, lambda: model(TOKENS))


def test_row_2_1_out_proj_pruned_under_no_grad_trains():
    with torch.no_grad():
        model = out_proj_pruned()
    model(TOKENS).sum().backward()
    assert model.attention.out_proj.weight_orig.grad is not None


def test_row_2_1_out_proj_after_load_and_double():
    model, other = out_proj_pruned(), out_proj_pruned()
    model(TOKENS)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(TOKENS), other(TOKENS))
    model.double()
    assert model(TOKENS.double()).dtype is torch.float64
    expected = model(TOKENS.double())
    torch.testing.assert_close(fp.remove(model)(TOKENS.double()), expected)


def test_row_2_2_in_proj():
    model = pruned(Attention())
    assert "attention.in_proj_weight" in fp.masks(model)
    train(model, TOKENS)
    assert_in_force(model, lambda: model(TOKENS))


def test_row_2_2_attention_fast_path():
    model = pruned(Attention()).requires_grad_(False)
    slow = model.train()(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(TOKENS), slow)


def test_row_2_3_encoder_layer_eval_and_train_agree_and_remove_gives_the_fast_path_back(monkeypatch):
    layer = pruned(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), include="*weight")
    train(layer, TOKENS)
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args))
    with torch.no_grad():
        expected = layer.train()(TOKENS)
        torch.testing.assert_close(layer.eval()(TOKENS), expected)
        assert not calls, "torch leaves the fast path wherever a hook is"
        torch.testing.assert_close(fp.remove(layer)(TOKENS), expected)
        assert calls


TIMM = {
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
    "beit_base_patch16_224": {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2},
    "beitv2_base_patch16_224": {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2},
    "swinv2_tiny_window8_256": {
        "img_size": 64,
        "window_size": 4,
        "depths": (1, 1),
        "embed_dim": 24,
        "num_heads": (2, 2),
    },
    "coatnet_pico_rw_224": {"img_size": 64, "embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.filterwarnings("ignore:Overwriting")
def test_row_2_4_weights_that_timm_reads_itself(name):
    timm = pytest.importorskip("timm")
    options = TIMM[name]
    model = timm.create_model(name, num_classes=10, **options)
    images = torch.randn(2, 3, options["img_size"], options["img_size"])
    pruned(model, include=["*", "*"], min_keep=0.3)
    hard = [name for name in fp.masks(model) if name.endswith(("qkv.weight", "relative_position_bias_table"))]
    assert hard
    train(model, images)
    assert all(parameters_of(model)[name].parameter.grad is not None for name in hard)
    model.eval()
    assert_in_force(model, lambda: model(images))
    before = model(images)
    with torch.no_grad():
        for name in hard:
            parameters_of(model)[name].parameter.mul_(3)
    assert not torch.equal(model(images), before), "eval mode does not see new values"


class Reader(nn.Module):
    """Reads its layer's weight in every way but calling the layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.position = nn.Parameter(torch.randn(3, 8))

    def features(self, x):
        return self.layer.forward(functional.linear(x + self.position, self.layer.weight))

    forward = features


def test_row_2_5_and_2_8_weights_read_directly():
    model = pruned(Reader(), include=["layer.weight", "position"])
    assert set(fp.masks(model)) == {"layer.weight", "position"}
    train(model, TOKENS)
    assert_in_force(model, lambda: model(TOKENS))
    assert_in_force(model, lambda: model.features(TOKENS))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_row_2_6_recurrent_layers(kind):
    layer = kind(8, 8)
    inputs = TOKENS[0] if kind is nn.LSTMCell else TOKENS
    pruned(layer, include="weight*")
    train(layer, inputs)
    assert_in_force(layer, lambda: layer(inputs)[0])
    expected = layer(inputs)[0]
    assert torch.equal(copy.deepcopy(layer)(inputs)[0], expected)
    layer.double()
    if kind is not nn.LSTMCell:
        assert {weight.dtype for weight in layer._flat_weights} == {torch.float64}
    torch.testing.assert_close(fp.remove(layer).float()(inputs)[0], expected)
    if kind is not nn.LSTMCell:
        assert all(isinstance(weight, nn.Parameter) for weight in layer._flat_weights)


def merged(layer):
    """As adapters do it: peft, loralib."""
    layer.weight.data += torch.ones(8, 8)


def added_under_no_grad(layer):
    with torch.no_grad():
        layer.weight += 1


def assigned(layer):
    layer.weight.data = layer.weight.data.clone() + 1


def cleared_in_part(layer):
    layer.weight.data[1:3].zero_()
    layer.weight.data[:, [1, 2]] = 4
    layer.weight.data.view(-1)[:4].fill_(5)
    layer.weight.data.T[7].mul_(3)
    layer.weight.data.chunk(2)[1].add_(1)
    layer.weight.detach().unbind()[3].neg_()


WRITES = {
    "mul_": lambda layer: layer.weight.data.mul_(2),
    "chained": lambda layer: layer.weight.data.mul_(2).add_(1).clamp_(-1, 1),
    "copy_": lambda layer: layer.weight.data.copy_(torch.arange(64).view(8, 8)),
    "merged": merged,
    "under no_grad": added_under_no_grad,
    "assigned": assigned,
    "in part": cleared_in_part,
    "reset": lambda layer: layer.reset_parameters(),
    **{name: lambda layer, name=name: getattr(nn.init, name)(layer.weight)
       for name in ("normal_", "kaiming_uniform_", "xavier_normal_", "orthogonal_", "zeros_")},
    "sparse_": lambda layer: nn.init.sparse_(layer.weight, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("how", WRITES)
def test_row_2_7_writes_reach_the_parameter_under_the_mask(how):
    """What a dense layer would have, masked: the oracle is that layer."""
    layer = pruned(nn.Linear(8, 8))
    mask = layer.weight_mask
    dense = nn.Linear(8, 8)
    with torch.no_grad():
        dense.weight.copy_(layer.weight_orig)
    for one in (layer, dense):
        torch.manual_seed(1)
        WRITES[how](one)
    assert torch.equal(layer.weight, dense.weight * mask)
    assert layer.weight_mask is mask
    if how != "assigned":  # of what was read, which has zeros
        assert torch.equal(layer.weight_orig, dense.weight)


def test_row_2_7_what_was_written_to_shows_it():
    layer = pruned(nn.Linear(8, 8))
    weight = layer.weight
    with torch.no_grad():
        assert weight.fill_(2) is weight
    assert torch.equal(weight, layer.weight)
    assert torch.equal(weight, 2.0 * layer.weight_mask)


def test_row_2_7_a_write_under_autograd_is_an_error_as_of_a_dense_weight():
    layer = pruned(nn.Linear(8, 8))
    before = layer.weight_orig.clone()
    for weight in (layer.weight, nn.Linear(8, 8).weight):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            weight.mul_(2)
    loss = layer(TOKENS).sum() + (used := layer.weight).square().sum()
    with torch.no_grad():
        used.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert torch.equal(layer.weight_orig, 2 * before)


def test_row_2_7_data_of_another_shape_is_refused():
    layer = pruned(nn.Linear(8, 8))
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"should have its mask's shape \(8, 8\), got shape \(8, 1\)"):
        layer.weight.data = torch.ones(8, 1)
    assert snapshot(layer) == before


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize(
    "value",
    [
        lambda: torch.ones(8, 8, device="meta"),
        lambda: torch.eye(8).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8),
    ],
    ids=["meta", "sparse", "quantised"],
)
def test_row_2_7_data_that_carries_no_mask_is_refused(value):
    layer = pruned(nn.Linear(8, 8))
    before = snapshot(layer)
    with pytest.raises(ValueError, match="this weight is pruned, and a"):
        layer.weight.data = value()
    assert snapshot(layer) == before


def test_row_2_7_data_of_another_dtype_is_that_of_the_parameter():
    layer = pruned(nn.Linear(8, 8))
    weight = layer.weight
    weight.data = weight.data.double() + 1
    assert layer.weight_orig.dtype is layer.weight.dtype is weight.dtype is torch.float64
    assert torch.equal(layer.weight, weight)


def test_row_2_7_a_part_that_is_laid_out_otherwise_is_refused():
    layer = pruned(nn.Linear(8, 8))
    with torch.no_grad():
        layer.weight_orig.data = layer.weight_orig.repeat(1, 2)[:, :8]  # the product has no gaps
        with pytest.raises(RuntimeError, match="this part of a pruned weight cannot be written to"):
            layer.weight.data.reshape(-1).zero_()
        layer.weight.data.zero_()
    assert not layer.weight_orig.any()


def test_row_2_7_what_is_computed_from_a_masked_weight_is_plain():
    layer = pruned(nn.Linear(8, 8))
    weight = layer.weight
    for value in (weight * 2, weight.clone(), weight.detach().clone(), copy.deepcopy(weight.detach())):
        assert type(value) is torch.Tensor
    stored = io.BytesIO()
    torch.save(weight.detach(), stored)
    stored.seek(0)
    assert type(torch.load(stored, weights_only=True)) is torch.Tensor
    assert type(weight[:, [0]]) is torch.Tensor, "a copy: nothing to write to"


FUNCTIONS = {
    "out=, in nn.init.eye_": nn.init.eye_,
    "out=": lambda weight: torch.mul(weight.detach(), 2, out=weight.data),
    "out= of a part": lambda weight: torch.add(torch.ones(8), 1, out=weight.data[0]),
    "a function's underscore": lambda weight: torch.relu_(weight.detach()),
    "many at once": lambda weight: torch._foreach_mul_([weight.detach()], 3.0),
    "then a method": lambda weight: torch.relu_(weight.detach()).add_(1),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_row_2_7_what_functions_write_reaches_the_parameter(kind):
    layer = pruned(nn.Linear(8, 8))
    dense, under = nn.Linear(8, 8), layer.weight_orig.detach().clone()
    dense.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    with torch.no_grad():
        FUNCTIONS[kind](layer.weight)
        FUNCTIONS[kind](dense.weight)
    expected = torch.where(layer.weight_mask, dense.weight, 0)
    assert torch.equal(layer.weight, expected)
    if kind != "then a method":
        assert torch.equal(layer.weight_orig[~layer.weight_mask], under[~layer.weight_mask])


def test_row_2_7_embeddings_that_bound_their_norm_do_so_in_the_parameter():
    layer, dense = nn.Embedding(5, 4, max_norm=1.0), nn.Embedding(5, 4, max_norm=1.0)
    with torch.no_grad():
        layer.weight.mul_(5)
        dense.weight.copy_(layer.weight)
    fp.apply_masks(layer, {"weight": torch.ones(5, 4, dtype=torch.bool)})
    assert torch.equal(layer(torch.arange(3)), dense(torch.arange(3)))
    assert torch.equal(layer.weight_orig, dense.weight)


def test_row_2_7_a_function_that_writes_to_what_is_old_warns():
    layer = pruned(nn.Linear(8, 8))
    old = layer.weight.detach()
    with torch.no_grad():
        layer.weight_orig.add_(1)
    before = layer.weight_orig.detach().clone()
    torch.relu_(old)
    with pytest.warns(
        UserWarning, match="a function has written to a pruned weight .* its values are lost; write to weight_o"
    ):
        del old
    assert torch.equal(layer.weight_orig, before)


def test_row_2_7_under_inference_mode_writes_are_not_counted():
    with torch.inference_mode():
        inside = pruned(nn.Linear(8, 8))
        torch.relu_(inside.weight)
    layer = pruned(nn.Linear(8, 8))
    with torch.inference_mode():
        layer(torch.ones(2, 8))
        torch.relu_(layer.weight)
    assert (layer.weight_orig < 0).any()


def test_row_2_7_assigning_a_parameter_replaces_the_values_under_the_mask():
    layer = pruned(nn.Linear(8, 8))
    layer.weight = nn.Parameter(torch.ones(8, 8))
    assert list(layer._parameters) == ["weight_orig", "bias"]
    assert torch.equal(layer.weight, layer.weight_mask.float())


class Opaque(torch.Tensor):
    """As quantised subclasses are: a tensor that does only what it is made for."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.where:
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


UNFIT = {
    "shape that would be spread": (
        lambda: torch.ones(1, 1),
        r"should have its mask's shape \(8, 8\), got shape \(1, 1\)",
    ),
    "transposed": (lambda: torch.ones(8, 9), r"got shape \(8, 9\): fp.remove first"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8),
        "'weight' is pruned, and a quantised tensor cannot carry its mask",
    ),
    "sparse": (lambda: torch.eye(8).to_sparse_csr(), "a Tensor of layout torch.sparse_csr cannot carry its mask"),
    "COO": (lambda: torch.eye(8).to_sparse(), "a Tensor of layout torch.sparse_coo cannot carry its mask"),
    "meta": (lambda: torch.ones(8, 8, device="meta"), "a tensor on the meta device has no values for its mask"),
    "subclass": (lambda: torch.ones(8, 8).as_subclass(Opaque), "cannot carry its mask: fp.remove first"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:.*quantiz")
@pytest.mark.parametrize("kind", UNFIT)
def test_row_2_7_assigning_what_does_not_fit_the_mask_is_refused(kind):
    layer = pruned(nn.Linear(8, 8))
    value, text = UNFIT[kind]
    before = snapshot(layer)
    with pytest.raises(ValueError, match=text):
        layer.weight = nn.Parameter(value(), requires_grad=False)
    with pytest.raises(ValueError, match="should have its mask's shape"):
        layer.register_parameter("weight", None)
    assert snapshot(layer) == before


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_row_2_7_a_sparse_weight_is_refused(convert):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(convert(layer.weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match="'weight' is a sparse tensor"):
        fp.global_prune(layer, sparsity=0.5)
    assert not prune.is_pruned(layer)


def test_row_2_7_assigning_a_tensor_is_refused():
    layer = pruned(nn.Linear(8, 8))
    others = (pruned(nn.Linear(8, 8)).weight, layer.weight.detach().clone(), layer.weight.detach(), layer.weight.t())
    for value in (torch.ones(8, 8), torch.ones(8, 8, device="meta"), torch.eye(8).to_sparse(), None, *others):
        with pytest.raises(TypeError, match="set weight_orig instead"):
            layer.weight = value
    with pytest.raises(TypeError, match="set weight_orig instead"):
        torch.vmap(lambda weight: setattr(layer, "weight", weight))(torch.ones(2, 8, 8))
    layer.weight = layer.weight  # what `layer.weight += 1` does
    assert len(hooks_of(layer)) == 1
