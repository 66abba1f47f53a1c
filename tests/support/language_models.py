"""Transformers' stock models at two layers, with random weights that are nowhere at a default of zero or one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

WORDS = 64
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
_PLAIN = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, **_LAYERS}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_GPT = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_PIXELS = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, **_LAYERS}
_TWO_STACKS = {
    "vocab_size": WORDS,
    "d_model": 32,
    **{f"{part}_{word}": n for part in ("encoder", "decoder") for word, n in (("layers", 2), ("attention_heads", 4))},
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_AUDIO = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40, "begin_suppress_tokens": None}
_T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", _GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "Mistral": ("MistralForCausalLM", _GROUPED),
    "Gemma": ("GemmaForCausalLM", {**_PLAIN, "num_key_value_heads": 1, "head_dim": 8}),
    "Phi3": ("Phi3ForCausalLM", {**_GROUPED, "pad_token_id": 0}),
    "Olmo2": ("Olmo2ForCausalLM", _GROUPED),
    "GPTNeoX": ("GPTNeoXForCausalLM", _PLAIN),
    "GPT2": ("GPT2LMHeadModel", _GPT),
    "OPT": ("OPTForCausalLM", {"vocab_size": WORDS, "hidden_size": 32, "ffn_dim": 48, **_LAYERS}),
    "Bloom": ("BloomForCausalLM", {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": ("FalconForCausalLM", {"vocab_size": WORDS, "hidden_size": 32, **_LAYERS}),
}
TWO_STACKS = {
    "T5": ("T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}),
    "Bart": ("BartForConditionalGeneration", {**_TWO_STACKS, "max_position_embeddings": 64}),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {**_TWO_STACKS, **_AUDIO, **_TOKENS, "decoder_start_token_id": 1, "suppress_tokens": None},
    ),
}
ENCODERS = {
    "Bert": ("BertForMaskedLM", _PLAIN),
    "Roberta": ("RobertaForMaskedLM", _PLAIN),
    "DistilBert": (
        "DistilBertForMaskedLM",
        {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    "ViT": ("ViTForImageClassification", _PIXELS),
    "DeiT": ("DeiTForImageClassification", _PIXELS),
    "CLIP": (
        "CLIPModel",
        {
            "text_config": {**_PLAIN, **_TOKENS, "max_position_embeddings": 20},
            "vision_config": _PIXELS,
            "projection_dim": 16,
        },
    ),
}
ALL = {**CAUSAL, **TWO_STACKS, **ENCODERS}


def build(name: str, **words: Any) -> nn.Module:
    """The model of a name, in eval mode; ``words`` are of its config."""
    kind, options = ALL[name]
    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**options, **words})).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, float((parameter == 1).all()), 0.1)
    return model


def inputs(name: str, samples: int = 2, length: int = 7) -> dict[str, Tensor]:
    """What users call it with."""
    source = torch.Generator().manual_seed(1)
    words = torch.randint(3, WORDS, (samples, length), generator=source)
    words[:, -1] = 2  # where CLIP looks for the end of a text
    pixels = torch.randn(samples, 3, 16, 16, generator=source)
    match name:
        case "Whisper":
            sound = torch.randn(samples, 8, 40, generator=source)
            return {"input_features": sound, "decoder_input_ids": words}
        case "T5" | "Bart":
            return {"input_ids": words, "decoder_input_ids": words[:, :5]}
        case "ViT" | "DeiT":
            return {"pixel_values": pixels}
        case "CLIP":
            return {"input_ids": words, "pixel_values": pixels}
    return {"input_ids": words}


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The first thing that the model gives."""
    with torch.no_grad():
        return model(**given)[0]


def generated(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Six tokens more, greedily."""
    given = {key: value for key, value in given.items() if key != "decoder_input_ids"}
    if len(given) == 1 and "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    return model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)
