"""Whole experts go with their rows of the router, and what is left is the model whose router never picks the others."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_flowprune as fp

EXPERTS = 6


class Mixture(nn.Module):
    """The usual loop over a list of experts."""

    def __init__(self, bias=True):
        super().__init__()
        self.gate = nn.Linear(8, EXPERTS, bias=bias)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)) for _ in range(EXPERTS)
        )

    def forward(self, x):
        shares, chosen = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            y = y.index_add(0, row, expert(x[row]) * shares[row, place, None])
        return y


class Fused(nn.Module):
    """Experts as rows of parameters with three axes, and a router that is a parameter."""

    def __init__(self):
        super().__init__()
        self.num_experts = EXPERTS
        self.up, self.down = nn.Parameter(torch.randn(EXPERTS, 12, 8)), nn.Parameter(torch.randn(EXPERTS, 8, 12))
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, 12))

    def forward(self, x, shares):
        assert shares.shape[1] == self.num_experts
        h = torch.einsum("nd,ehd->neh", x, self.up) + self.up_bias
        return torch.einsum("neh,edh,ne->nd", h.relu(), self.down, shares)


class Soft(nn.Module):
    def __init__(self):
        super().__init__()
        self.routing, self.experts = nn.Linear(8, EXPERTS), Fused()

    def forward(self, x):
        return self.experts(x, self.routing(x).softmax(-1))


def net(block):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), block(), nn.Linear(8, 3)).double()


torch.manual_seed(3)
X, Y = torch.randn(16, 6, dtype=torch.float64), torch.arange(16) % 3
BLOCKS = {"a list": Mixture, "without a bias": lambda: Mixture(bias=False), "fused, all used": Soft}
every_block = pytest.mark.parametrize("name", BLOCKS)


def router_of(model):
    return model[1].gate if hasattr(model[1], "gate") else model[1].routing


def never_picking(model, gone):
    """The oracle: a dense model whose router gives minus infinity."""

    def hide(module, inputs, logits):
        return logits.masked_fill(gone, float("-inf"))

    router_of(model).register_forward_hook(hide)
    return model


@every_block
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_what_is_left_is_the_model_whose_router_never_picks_the_others(name, sparsity):
    model = net(BLOCKS[name])
    dense = copy.deepcopy(model)
    removed = fp.remove_experts(model, "snip", sparsity, data=(X, Y))
    kept = removed.kept["1"]
    assert len(kept) == EXPERTS - round(sparsity * EXPERTS)
    gone = torch.tensor([number not in kept for number in range(EXPERTS)])
    other = X.flip(0) * 1.3
    torch.testing.assert_close(model(other), never_picking(dense, gone)(other), rtol=1e-10, atol=1e-10)
    assert router_of(model).weight.shape[0] == router_of(model).out_features == len(kept)
    F.cross_entropy(model(X), Y).backward()


@every_block
@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp", "fisher"])
def test_an_experts_score_is_the_measure_over_all_that_is_its_own(name, method):
    model = net(BLOCKS[name])
    point = fp.flow(model, (X, Y), needs=("g", "g2", "Hg"))
    removed = fp.remove_experts(copy.deepcopy(model), method, 0.5, data=(X, Y))
    expected = []
    for number in range(EXPERTS):
        rows = {}
        for kind in ("theta", "g", "g2", "Hg"):
            parts = []
            for key, value in point.tensors(kind).items():
                listed = key.startswith(f"1.experts.{number}.")
                row = key.startswith(("1.gate", "1.routing")) or (name.startswith("fused") and "experts" in key)
                parts += [value.flatten()] if listed else [value[number].flatten()] if row else []
            rows[kind] = torch.cat(parts)
        formulas = {
            "magnitude": lambda r: r["theta"].norm(),
            "snip": lambda r: (r["theta"] * r["g"]).abs().sum(),
            "grasp": lambda r: (r["theta"] * r["Hg"]).sum(),
            "fisher": lambda r: (r["theta"].square() * r["g2"]).sum(),
        }
        expected.append(formulas[method](rows).item())
    assert removed.scores["1"] == pytest.approx(tuple(expected), rel=1e-9)
    lowest = sorted(range(EXPERTS), key=lambda number: expected[number])[: EXPERTS // 2]
    assert set(removed.kept["1"]) == set(range(EXPERTS)) - set(lowest)


def test_numbers_of_ones_own_in_place_of_a_measure():
    model = net(Mixture)
    with torch.no_grad():
        often = router_of(model)(model[0](X)).topk(2, -1).indices.flatten().bincount(minlength=EXPERTS)
    removed = fp.remove_experts(model, scores={"1": often}, sparsity=0.5, example_inputs=X)
    assert set(removed.kept["1"]) == set(often.argsort(stable=True)[3:].tolist())
    assert "1: 3 of 6 experts left" in str(removed)
    with pytest.raises(ValueError, match="scores= should have a number for each of the 3 experts of '1'"):
        fp.remove_experts(model, scores={"1": often}, example_inputs=X)


class Layered(nn.Module):
    """As many layers as classes: nothing but a run tells them from experts."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def test_layers_are_not_taken_for_experts():
    model = Layered()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no block can be cut: : what is left"):
        fp.remove_experts(model, "magnitude", 0.5, example_inputs=torch.randn(3, 6))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Counting(Mixture):
    """Its code has the number of experts in it."""

    def forward(self, x):
        return super().forward(x) + self.gate(x).sigmoid()[:, EXPERTS - 1 :]


def test_a_block_that_does_not_run_without_them_stays():
    model = nn.Sequential(Mixture(), Counting()).double()
    x = torch.randn(16, 8, dtype=torch.float64)
    removed = fp.remove_experts(model, "magnitude", 0.5, example_inputs=x)
    assert list(removed.kept) == ["0"]
    assert removed.left["1"].startswith("what is left does not run")
    assert len(model[1].experts) == router_of(nn.Sequential(nn.Identity(), model[1])).out_features == EXPERTS


def test_only_those_named():
    model = nn.ModuleDict({"a": Mixture(), "b": Mixture()}).double()
    whole = nn.Sequential(model["a"], model["b"])
    removed = fp.remove_experts(whole, "magnitude", 0.5, include="1", example_inputs=torch.randn(9, 8).double())
    assert list(removed.kept) == ["1"]
    assert len(model["a"].experts) == EXPERTS


def test_what_is_asked_for_first():
    with pytest.raises(ValueError, match="no experts were found: they are looked for in a ModuleList"):
        fp.remove_experts(nn.Linear(3, 2), "magnitude", example_inputs=torch.randn(2, 3))
    model = net(Mixture)
    fp.global_prune(model, "magnitude", 0.3)
    with pytest.raises(ValueError, match="this model has masks: remove experts before you prune anything else"):
        fp.remove_experts(model, "magnitude", example_inputs=X)


LANGUAGE_MODELS = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "olmoe": {"num_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8},
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_language_models_are_saved_and_read_again(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.AutoConfig.for_model(kind, **small, **heads, num_experts_per_tok=2, **LANGUAGE_MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 60, (3, 8))
    removed = fp.remove_experts(model, "snip", 0.5, data={"input_ids": ids, "labels": ids})
    assert len(removed.kept) == 2
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    model.generate(ids, max_new_tokens=3, do_sample=False)
