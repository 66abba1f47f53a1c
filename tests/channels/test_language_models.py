"""Language models as they come: the inputs are a tokenizer's, the cache is on, and text is generated afterwards."""

import inspect

import pytest
import torch
from language_models import ALL, CAUSAL, TWO_STACKS, build, generated, inputs, logits
from torch import nn

import torch_flowprune as fp

OFTEN = ("Llama", "GPT2", "T5", "Bert", "CLIP")
AS_GRAPHS = {"Olmo2": "*v_proj"}
"""A norm over all heads holds these; parts of the values' heads would go by a graph, which knows no cache."""


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_pruned_shrunk_and_asked_for_text(name):
    model, given = build(name), inputs(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    units = {"granularity": "channel", "example_inputs": given, "exclude": AS_GRAPHS.get(name)}
    report = fp.global_prune(model, "magnitude", 0.3, **units)
    assert report.pruned == round(0.3 * report.units)
    small = fp.shrink(model, given)
    assert sum(parameter.numel() for parameter in small.parameters()) < before
    for samples, length in ((2, 7), (3, 9), (1, 6)):
        other = inputs(name, samples, length)
        assert (logits(small, other) - logits(model, other)).abs().max() < 1e-5
    if name in {**CAUSAL, **TWO_STACKS}:
        assert torch.equal(generated(small, given), generated(model, given))


@pytest.mark.parametrize(
    ("name", "layers"), [("GPT2", "*attn*"), ("Bloom", "*attention*"), ("Llama", "*_proj"), ("Gemma", "*v_proj")]
)
def test_half_of_what_attention_has(name, layers):
    """Heads of fewer channels, and fewer heads: projections that are fused, and sizes under names of their own."""
    model, given = build(name), inputs(name)
    words = {"granularity": "channel", "example_inputs": given, "include": layers}
    fp.global_prune(model, "random", 0.5, generator=torch.Generator().manual_seed(1), **words)
    small = fp.shrink(model, given)
    other = inputs(name, 3, 9)
    assert (logits(small, other) - logits(model, other)).abs().max() < 1e-5
    transposed = [module for module in small.modules() if hasattr(module, "nf")]
    assert bool(transposed) == (name == "GPT2")
    assert all((module.nx, module.nf) == tuple(module.weight.shape) for module in transposed)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_texts_in_training(attention):
    model = build("Llama", attn_implementation=attention).train()
    given = {**inputs("Llama"), "attention_mask": torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])}
    fp.global_prune(model, "magnitude", 0.3, granularity="channel", example_inputs=given)
    assert (logits(fp.shrink(model, given), given) - logits(model, given)).abs().max() < 1e-5


def test_a_batch_with_labels_is_an_example_too():
    model = build("Llama")
    given = inputs("Llama")
    batch = {**given, "labels": given["input_ids"]}
    report = fp.global_prune(model, "taylor", 0.3, granularity="channel", data=[batch])
    assert report.pruned == round(0.3 * report.units)


def test_keys_and_values_are_no_outputs():
    """Read with the cache on, a key's channel would be something that the model hands out, and stay."""
    model, given = build("Llama"), inputs("Llama")
    groups = [group.name for group in fp.couple(model, given).groups]
    assert [name for name in groups if "q_proj" in name] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    ]
    assert groups == [group.name for group in fp.couple(model, (given["input_ids"],)).groups]


def test_who_asks_for_the_cache_is_told():
    model = build("Llama")
    with pytest.raises(RuntimeError, match="the model gives a DynamicCache"):
        fp.couple(model, {**inputs("Llama"), "use_cache": True})


class Wrapper(nn.Module):
    """Hands on what it is given, as adapters of language models do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_wrapper_that_hands_on_what_it_is_given():
    model, given = Wrapper(Wrapper(build("Llama"))), inputs("Llama")
    fp.global_prune(model, "magnitude", 0.3, granularity="channel", example_inputs=given)
    small = fp.shrink(model, given)
    assert (logits(small, given) - logits(model, given)).abs().max() < 1e-5


@pytest.mark.parametrize("gone", [["model.layers.0.self_attn"], ["model.layers.0.self_attn", "model.layers.0.mlp"]])
def test_a_text_goes_on_with_the_cache_where_the_first_attention_is_gone(gone: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=32
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    ids = torch.randint(0, 32, (2, 8))
    coupling = fp.couple(model, {"input_ids": ids})
    scores = {one.name: torch.tensor([0.0 if one.name in gone else 1.0]) for one in coupling.branches}
    assert len(scores) == 6
    fp.global_prune(model, sparsity=len(gone) / 6, granularity="block", coupling=coupling, scores=scores)
    small = fp.shrink(model, {"input_ids": ids})

    def going_on(one: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            first = one(ids[:, :5], use_cache=True)
            word = "cache" if "cache" in inspect.signature(one.forward).parameters else "past_key_values"
            return one(ids[:, 5:], **{word: first.get(word, first.get("past_key_values"))}).logits

    assert torch.allclose(going_on(model), going_on(small), atol=1e-10, rtol=0)
    assert torch.allclose(going_on(small), small(ids).logits[:, 5:], atol=1e-10, rtol=0)
