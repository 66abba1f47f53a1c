"""A language model with experts: pruned by weight and by channel while it learns, saved as its library saves it."""

import pytest
import torch

import torch_flowprune as fp

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
from torch_flowprune.integrations.transformers import from_pretrained, save_pretrained  # noqa: E402

WORDS, LENGTH = 32, 24
CONFIG = transformers.MixtralConfig(
    vocab_size=WORDS, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    router_aux_loss_coef=0.02, output_router_logits=True,
)  # fmt: skip


def sentences(count, seed):
    """Each goes up by a step of its own, which is to be learnt from the first words."""
    source = torch.Generator().manual_seed(seed)
    first = torch.randint(WORDS, (count, 1), generator=source)
    step = torch.randint(1, 5, (count, 1), generator=source)
    ids = (first + step * torch.arange(LENGTH)) % WORDS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def batches(count, seed):
    return [sentences(32, seed * 1000 + i) for i in range(count)]


def language_model():
    return transformers.MixtralForCausalLM(CONFIG)


def loss_of(model, batch):
    return model(**batch).loss


def train(model, optimizer, data):
    model.train()
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


@torch.no_grad()
def known(model, batch):
    """The share of words that are foretold, from the third on."""
    logits = model.eval()(batch["input_ids"]).logits
    return (logits[:, 2:-1].argmax(-1) == batch["input_ids"][:, 3:]).float().mean().item()


def test_experts_are_pruned_trained_and_saved(tmp_path):
    torch.manual_seed(0)
    model, held_out = language_model(), sentences(64, 7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, optimizer, batches(250, 1))
    before = known(model, held_out)
    assert before > 0.9

    experts = [name for name, p in model.named_parameters() if "experts" in name]
    data = batches(4, 3)
    # guide: language_models
    options = dict(include=["*.self_attn.*", "*.experts.*"], closure=loss_of)
    # end
    options["reduction"] = "mean"  # what balances the experts is of a whole batch
    pruner = fp.Pruner(model, "loss_preservation", 0.6, rounds=2, **options)
    fp.keep_zeros(model, optimizer)
    first = pruner.step(data)
    assert {layer.name for layer in first.layers} >= set(experts)
    train(model, optimizer, batches(30, 4))

    # killed between the rounds
    torch.save({"model": fp.state_dict(model), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()},
               tmp_path / "run.pt")  # fmt: skip
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = language_model()
    fp.load_state_dict(resumed, state["model"])
    its_optimizer = torch.optim.AdamW(resumed.parameters(), lr=3e-3)
    its_optimizer.load_state_dict(state["optimizer"])
    fp.keep_zeros(resumed, its_optimizer)
    its = fp.Pruner(resumed, "loss_preservation", 0.6, rounds=2, **options)
    its.load_state_dict(state["pruner"])
    for one, own, its_own in ((model, pruner, optimizer), (resumed, its, its_optimizer)):
        report = own.step(data)
        train(one, its_own, batches(60, 5))
    assert all(torch.equal(value, fp.state_dict(resumed)[name]) for name, value in fp.state_dict(model).items())
    assert report.sparsity == pytest.approx(0.6, abs=1e-4)
    assert all(0 < layer.sparsity < 1 for layer in report.layers)
    assert known(resumed, held_out) > 0.9
    shares = [float((~fp.masks(resumed)[name]).float().mean()) for name in experts]
    assert min(shares) > 0.2

    # as transformers saves and reads it: dense weights, and masks for those who ask
    resumed.save_pretrained(tmp_path / "pruned")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    again = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "pruned")
    ids = held_out["input_ids"]
    assert torch.equal(plain.eval()(ids).logits, resumed.eval()(ids).logits)
    assert fp.report(again).sparsity == fp.report(resumed).sparsity
    generated = [one.generate(ids[:2, :4], attention_mask=torch.ones(2, 4, dtype=torch.long), max_new_tokens=8,
                              do_sample=False, pad_token_id=0) for one in (plain, again)]  # fmt: skip
    assert torch.equal(*generated)
    assert (generated[0][:, 4:] == ids[:2, 4:12]).float().mean() > 0.7
    size = (tmp_path / "pruned" / "model.safetensors").stat().st_size
    fp.save_pruned(resumed, tmp_path / "kept.safetensors", kept_only=True)
    assert (tmp_path / "kept.safetensors").stat().st_size < 0.6 * size

    # a head of the keys goes, with the queries that read it; the masks of what stays are cut to size
    example = {word: held_out[word][:2] for word in ("input_ids", "attention_mask")}
    fp.global_prune(resumed, "taylor", 0.25, granularity="channel", include="*.self_attn.*", data=data, closure=loss_of,
                    reduction="mean", example_inputs=example)  # fmt: skip
    small = fp.shrink(resumed, example, optimizer=its_optimizer)
    heads = [layer.self_attn.k_proj.out_features // 12 for layer in small.model.layers]
    assert sorted(heads) == [1, 2] and fp.replaced_modules(small) == {}
    masks = {name: mask.clone() for name, mask in fp.masks(small).items()}
    dense = fp.state_dict(small, dense=True)
    assert all(mask.shape == dense[name].shape for name, mask in masks.items())
    train(small, its_optimizer, batches(60, 6))
    zeros = fp.state_dict(small, dense=True)
    assert all(not zeros[name][~mask].any() for name, mask in masks.items())
    assert known(small, held_out) > 0.85
    save_pretrained(small, tmp_path / "small")
    read = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "small")
    assert torch.equal(read.eval()(ids).logits, small.eval()(ids).logits)
    assert all(torch.equal(mask, masks[name]) for name, mask in fp.masks(read).items())
    with torch.no_grad():
        print(before, known(resumed, held_out), known(read, held_out))
