"""transformers: models of text, from small configs."""

from __future__ import annotations

from typing import Any

from benchmarks.models.foreign.case import add, tokens, words

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
WIDE = {"hidden_size": 64, "intermediate_size": 96}  # rotary embeddings need heads of some width
D = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CAUSAL: dict[str, dict[str, Any]] = {
    "Llama": SMALL | GROUPED,
    "Qwen2": SMALL | GROUPED,
    "Qwen3": SMALL | GROUPED | {"head_dim": 8},
    "Mistral": SMALL | GROUPED,
    "Gemma": SMALL | GROUPED | {"head_dim": 8},
    "Gemma2": SMALL | GROUPED | {"head_dim": 8},
    "Phi": SMALL | WIDE,
    "Phi3": SMALL | GROUPED,
    "Olmo2": SMALL | GROUPED,
    "GPTNeoX": SMALL | WIDE,
    "GPT2": GPT,
    "GPTJ": GPT | {"rotary_dim": 8},
    "OPT": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": SMALL,
    "CodeGen": GPT | {"rotary_dim": 8, "n_ctx": 64, "n_positions": 64},
    "Mpt": {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "StableLm": SMALL | GROUPED | WIDE,
    "Starcoder2": SMALL | GROUPED,
    "Granite": SMALL | GROUPED,
    "Cohere": SMALL | GROUPED,
    "Mixtral": SMALL | GROUPED | {"num_local_experts": 4},
    "Qwen2Moe": SMALL | GROUPED | MOE,
    "Qwen3Moe": SMALL | GROUPED | MOE,
    "Mamba": {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
    "Mamba2": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "RecurrentGemma": SMALL
    | {"num_key_value_heads": 1, "lru_width": 32, "num_hidden_layers": 3, "head_dim": 8, "attention_window_size": 8},
    "XGLM": {"vocab_size": 99, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "CTRL": GPT | {"dff": 48},
    "BioGpt": SMALL,
    "Nemotron": SMALL | GROUPED,
    "Persimmon": SMALL | WIDE,
    "GPTNeo": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "GPTBigCode": GPT,
    "Glm": SMALL | GROUPED | {"head_dim": 8},
    "SmolLM3": SMALL | GROUPED,
    "OpenAIGPT": GPT,
}
MASKED: dict[str, dict[str, Any]] = {
    "Bert": SMALL,
    "Roberta": SMALL,
    "DistilBert": {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "Electra": SMALL | {"embedding_size": 16},
    "Albert": SMALL | {"embedding_size": 16, "num_hidden_groups": 1},
    "Deberta": SMALL | {"pos_att_type": ["p2c", "c2p"], "relative_attention": True},
    "DebertaV2": SMALL | {"pos_att_type": ["p2c", "c2p"], "relative_attention": True},
    "MPNet": SMALL,
    "Longformer": SMALL | {"attention_window": 4},
    "FNet": {k: v for k, v in SMALL.items() if k != "num_attention_heads"},
    "ModernBert": SMALL | {"cls_token_id": 1, "sep_token_id": 2},
    "Nystromformer": SMALL | {"num_landmarks": 4, "segment_means_seq_len": 16, "max_position_embeddings": 16},
    "SqueezeBert": SMALL | {"embedding_size": 32},
    "ConvBert": SMALL | {"embedding_size": 16},
    "IBert": SMALL,
    "MobileBert": SMALL
    | {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_attention_heads": 4},
    "RoFormer": SMALL | {"embedding_size": 32},
    "XLNet": {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "Flaubert": {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "Esm": SMALL | {"mask_token_id": 3},
    "BigBird": SMALL | {"attention_type": "original_full"},
    "Camembert": SMALL,
}
T5: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 48,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}
BETWEEN: dict[str, dict[str, Any]] = {
    "T5": T5,
    "MT5": T5,
    "Bart": D,
    "Pegasus": D,
    "MBart": D,
    "LED": D | {"attention_window": 4},
    "BlenderbotSmall": D,
    "M2M100": D,
}
HEADS = {
    "BertForSequenceClassification": ("Bert", SMALL),
    "RobertaForTokenClassification": ("Roberta", SMALL),
    "BertForQuestionAnswering": ("Bert", SMALL),
    "XLMRobertaForSequenceClassification": ("XLMRoberta", SMALL),
}


def register() -> None:
    for name, words_of in CAUSAL.items():
        if words_of:
            add(f"transformers/{name}", lambda n=name, w=words_of: made(n, w, CAUSAL_CLASSES), tokens, 12, 9)
    for name, words_of in MASKED.items():
        if words_of:
            add(
                f"transformers/{name}",
                lambda n=name, w=words_of: made(n, w, "ForMaskedLM"),
                tokens,
                16,
                16 if name == "Nystromformer" else 12,
            )
    for name, words_of in BETWEEN.items():
        add(f"transformers/{name}", lambda n=name, w=words_of: made(n, w, "ForConditionalGeneration"), both, 12, 8)
    for cls, (config, words_of) in HEADS.items():
        add(f"transformers/{cls}", lambda c=config, w=words_of, k=cls: built(c, w, k), tokens, 12, 9)


CAUSAL_CLASSES = "ForCausalLM"


def made(name: str, words_of: dict[str, Any], suffix: str):
    import transformers

    own = {
        "GPT2": "GPT2LMHeadModel",
        "CTRL": "CTRLLMHeadModel",
        "OpenAIGPT": "OpenAIGPTLMHeadModel",
        "XLNet": "XLNetLMHeadModel",
        "Flaubert": "FlaubertWithLMHeadModel",
    }.get(name, f"{name}{suffix}")
    return getattr(transformers, own)(getattr(transformers, f"{name}Config")(**words_of))


def built(config: str, words_of: dict[str, Any], cls: str):
    import transformers

    return getattr(transformers, cls)(getattr(transformers, f"{config}Config")(**words_of))


def both(batch: int, size: int) -> dict[str, Any]:
    return {"input_ids": words(batch, size), "decoder_input_ids": words(batch, size - 2)}
