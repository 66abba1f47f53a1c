"""Modules written for sizes that a class cannot state: they do what the class does that they stand in for."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_flowprune as fp
from torch_flowprune.channels import ShrinkError, register
from torch_flowprune.channels.shrinking.surgery import Surgery
from torch_flowprune.channels.shrinking.written.narrow_attention import NarrowAttention
from torch_flowprune.channels.shrinking.written.written_modules import written

HEADS = 4
HALF = torch.tensor([True, True, False, False] * 2)


def pair(rows: Tensor = HALF, heads: int = HEADS, **options: Any) -> tuple[nn.MultiheadAttention, NarrowAttention]:
    """Attention with some of its heads' rows at zero, and the one without them."""
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(8, heads, **options).double().eval()
    keep = {"out_proj.weight": {1: rows}}
    for name, p in dense.named_parameters():
        nn.init.normal_(p)
        if name.startswith("in_proj"):
            keep[name] = {0: rows.repeat(3)}
        elif "_proj_weight" in name:
            keep[name] = {0: rows}
        elif name in ("bias_k", "bias_v"):
            keep[name] = {2: rows}
    surgery = Surgery(keep, {})
    with torch.no_grad():
        for name, p in dense.named_parameters():
            for axis, left in keep.get(name, {}).items():
                p.index_fill_(axis, (~left).nonzero().flatten(), 0)
    cut = copy.deepcopy(dense)
    for name, p in dense.named_parameters():
        path, _, leaf = name.rpartition(".")
        cut.get_submodule(path)._parameters[leaf] = nn.Parameter(surgery.cut(name, p.detach()).clone())
    small = written(cut, surgery)
    assert isinstance(small, NarrowAttention)
    return dense, small


LAYOUTS = [{}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}]
LAYOUTS += [{"kdim": 3, "vdim": 5, "batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True, "kdim": 3}]
FLOATS = torch.linspace(-2, 2, 15, dtype=torch.float64).view(3, 5)
PADDINGS = [None, torch.tensor([[False] * 4 + [True], [False] * 3 + [True] * 2])]
PADDINGS += [torch.linspace(-1, 0, 10, dtype=torch.float64).view(2, 5)]


def inputs(module: nn.MultiheadAttention, batched: bool) -> list[Tensor]:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, module.kdim), torch.randn(2, 5, module.vdim)
    found = [x.double() if module.batch_first else x.double().transpose(0, 1) for x in (q, k, v)]
    return found if batched else [(x if module.batch_first else x.transpose(0, 1))[0] for x in found]


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: ", ".join(layout) or "plain")
@pytest.mark.parametrize("batched", [True, False])
def test_it_computes_what_torchs_own_does(layout: dict[str, Any], batched: bool) -> None:
    dense, small = pair(**layout)
    given = inputs(dense, batched)
    by_head = torch.stack([FLOATS * n for n in range(2 * HEADS if batched else HEADS)])
    for mask, padding, need in product([None, FLOATS, FLOATS > 1, by_head], PADDINGS, (True, False)):
        words: dict[str, Any] = {"attn_mask": mask, "need_weights": need, "average_attn_weights": False}
        words["key_padding_mask"] = padding if batched or padding is None else padding[0]
        expected, weights = dense(*given, **words)
        found, own = small(*given, **words)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        if weights is None:
            assert own is None
        else:
            torch.testing.assert_close(own, weights.index_select(-3, torch.tensor([0, 2])), rtol=1e-10, atol=1e-12)


def test_what_it_says_of_causal_masks_weights_and_dropout() -> None:
    dense, small = pair(batch_first=True, dropout=0.5)
    x = inputs(dense, True)[0]
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    words = {"attn_mask": causal, "is_causal": True, "need_weights": False}
    torch.testing.assert_close(small(x, x, x, **words)[0], dense(x, x, x, **words)[0])
    with pytest.raises(RuntimeError, match="expected attn_mask too, got None"):
        small(x, x, x, is_causal=True)
    assert small(x, x, x)[1].shape == (2, 3, 3)
    small.train()
    assert not torch.equal(small(x, x, x)[0], small(x, x, x)[0])


def test_narrower_heads_keep_the_scale_of_the_dense_ones() -> None:
    dense, small = pair(torch.tensor([True, True, False, True] * 2), heads=2, batch_first=True)
    x = inputs(dense, True)[0]
    torch.testing.assert_close(small(x, x, x)[0], dense(x, x, x)[0])
    assert (small.num_heads, small.head_dim, small.value_dim, small.scale) == (2, 3, 3, 0.5)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([True, True, True, False] * 3, r"left with widths \[2, 1\]: expected one width"),
        ([True, True, False, False] * 2 + [False, False, True, True], "keep different heads"),
    ],
)
def test_what_no_attention_can_be_is_refused(rows: list[bool], text: str) -> None:
    with pytest.raises(ShrinkError, match=text):
        NarrowAttention.of(nn.MultiheadAttention(4, 2), {"in_proj_weight": {0: torch.tensor(rows)}})


# -- in models ------------------------------------------


class Encodes(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
        self.e = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.i, self.o = nn.Linear(8, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.o(self.e(self.i(x), src_key_padding_mask=padding).mean(1))


class Decodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.t, self.o = nn.Transformer(16, 4, 1, 1, 32, batch_first=True), nn.Linear(16, 3)
        self.t.encoder.use_nested_tensor = False

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.o(self.t(x, x, tgt_mask=causal, tgt_is_causal=True, src_key_padding_mask=padding))


MODELS = {
    "encoder": (Encodes, torch.randn(4, 6, 8)),
    "norm first": (lambda: Encodes(norm_first=True), torch.randn(4, 6, 8)),
    "encoder and decoder": (Decodes, torch.randn(4, 6, 16)),
}


def shrunk(name: str) -> tuple[nn.Module, nn.Module]:
    make, x = MODELS[name]
    model = make().eval()
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", scope="layer", example_inputs=x)
    return model, fp.shrink(model, x)


@pytest.mark.parametrize("name", MODELS)
def test_torchs_transformers_stay_themselves(name: str) -> None:
    """Other batches, other lengths, padding or none, with gradients and without."""
    model, small = shrunk(name)
    assert type(small) is type(model)
    assert sum(isinstance(module, NarrowAttention) for module in small.modules()) >= 2
    for batch, length in ((4, 6), (1, 6), (3, 9)):
        x = torch.randn(batch, length, MODELS[name][1].shape[-1])
        padding = torch.zeros(batch, length, dtype=torch.bool)
        padding[0, -2:] = True
        for mask in (None, padding):
            torch.testing.assert_close(small(x, mask), model(x, mask), rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(small(x, mask), model(x, mask), rtol=1e-4, atol=1e-5)
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_first_layer_of_torchs_own_does_not_pack_what_a_later_one_cannot_take() -> None:
    make, x = MODELS["encoder"]
    model = make().eval()
    model.e.enable_nested_tensor = model.e.use_nested_tensor = True
    words = {"scope": "layer", "example_inputs": x, "include": ["e.layers.1.self_attn*"]}
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", **words)
    small = fp.shrink(model, x)
    assert [isinstance(layer.self_attn, NarrowAttention) for layer in small.e.layers] == [False, True]
    x, padding = torch.randn(4, 6, 8), torch.zeros(4, 6, dtype=torch.bool)
    padding[:, -2:] = True
    with torch.no_grad():
        model.e.use_nested_tensor = False
        torch.testing.assert_close(small(x, padding), model(x, padding), rtol=1e-4, atol=1e-5)


def test_nor_does_a_model_that_was_saved(tmp_path: Any) -> None:
    make, x = MODELS["encoder"]
    model, small = shrunk("encoder")
    fp.save_pruned(small, tmp_path / "small.safetensors")
    dense = make().eval()
    dense.e.enable_nested_tensor = dense.e.use_nested_tensor = True
    back = fp.load_pruned(dense, tmp_path / "small.safetensors")
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[:, -2:] = True
    with torch.no_grad():
        torch.testing.assert_close(back(x, padding), model(x, padding), rtol=1e-4, atol=1e-5)


def test_it_is_copied_pickled_described_saved_masked_and_shrunk_again(tmp_path: Any) -> None:
    model, small = shrunk("encoder")
    x = MODELS["encoder"][1]
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        torch.testing.assert_close(again(x), small(x))
    description = json.loads(json.dumps(fp.describe(model, small)))
    rebuilt = fp.rebuild(Encodes().eval(), description)
    rebuilt.load_state_dict(small.state_dict())
    torch.testing.assert_close(rebuilt(x), small(x))
    pytest.importorskip("safetensors")
    fp.save_pruned(small, tmp_path / "small.safetensors")
    loaded = fp.load_pruned(Encodes(), tmp_path / "small.safetensors").eval()
    torch.testing.assert_close(loaded(x), small(x))
    assert loaded.e.layers[0].self_attn.kept_heads == small.e.layers[0].self_attn.kept_heads
    fp.global_prune(small, "magnitude", 0.5, granularity="channel", scope="layer", example_inputs=x)
    least = fp.shrink(small, x)
    assert least.e.layers[0].self_attn.num_heads == 1
    torch.testing.assert_close(least(x), small(x), rtol=1e-4, atol=1e-5)


def test_in_place_all_but_the_model_itself_can_be_another_class() -> None:
    make, x = MODELS["encoder"]
    model = make().eval()
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", scope="layer", example_inputs=x)
    before = model(x)
    assert fp.shrink(model, x, inplace=True) is model
    assert isinstance(model.e.layers[0].self_attn, NarrowAttention)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


# -- of users' classes ------------------------------------------


class Heads(nn.Module):
    """A size in a place that is no attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.split = nn.Linear(4, 8), nn.Linear(8, 2), {"heads": 4}

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).unflatten(-1, (self.split["heads"], -1))
        return self.b((h * torch.arange(1, 1 + h.shape[-1])).flatten(-2))


def narrower(module: Heads, kept: Any) -> Heads:
    module.split = {"heads": int(kept["b.weight"][1].view(module.split["heads"], -1).any(-1).sum())}
    return module


@pytest.fixture
def registered() -> Iterator[None]:
    register(Heads, narrower)
    yield
    register(Heads, None)


def net_of_heads() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), Heads()).eval(), torch.randn(5, 3)
    fp.global_prune(model, "magnitude", 0.5, granularity="channel", scope="layer", example_inputs=x)
    return model, x


@pytest.mark.usefixtures("registered")
def test_a_writer_of_a_users_class_is_asked() -> None:
    model, x = net_of_heads()
    small = fp.shrink(model, x)
    assert small[1].split == {"heads": 2}
    assert model[1].split == {"heads": 4}
    torch.testing.assert_close(small(x), model(x))


def test_what_a_writer_gives_is_proved(registered: None) -> None:
    def narrowed_and_moved(module: Heads, kept: Any) -> Heads:
        module.b.bias.data += 1
        return narrower(module, kept)

    register(Heads, narrowed_and_moved)
    model, x = net_of_heads()
    with pytest.raises(ShrinkError, match="differs from the masked model's"):
        fp.shrink(model, x)


class Stale(Heads):
    """Computes with what its weights were, and has their gradients all the same."""

    def forward(self, x: Tensor) -> Tensor:
        now = self.b.bias
        return super().forward(x) - now.detach() + self.was


class Forgetful(Heads):
    """Takes another state than it is given."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[f"{prefix}a.weight"] = 2 * state[f"{prefix}a.weight"]
        super()._load_from_state_dict(state, prefix, *rest)


class Refusing(Heads):
    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        raise RuntimeError("not this one")


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Stale, "output after a step of an optimizer differs from the masked model's"),
        (Forgetful, "parameters change when it loads its own state dict"),
        (Refusing, "does not load its own state dict: not this one"),
    ],
)
def test_what_learns_otherwise_or_does_not_load_is_found(registered: None, cls: type[Heads], text: str) -> None:
    def writer(module: Heads, kept: Any) -> Heads:
        module = narrower(module, kept)
        module.__class__, module.was = cls, module.b.bias.detach().clone()
        return module

    register(Heads, writer)
    model, x = net_of_heads()
    with pytest.raises(ShrinkError, match=text):
        fp.shrink(model, x)


def test_only_classes_of_modules_are_registered() -> None:
    with pytest.raises(TypeError, match="cls should be a class of modules, got 'Heads'"):
        register("Heads", narrower)  # type: ignore[arg-type]
