"""Tiny models of many families, with random weights, and where each has the feed-forward block of its last layer: as
one who knows the family would write its hook by hand."""

from __future__ import annotations

from typing import Any

VOCABULARY, WIDTH, LAYERS = 96, 32, 2
LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}
GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLP = "model.layers.1.mlp"

# model type -> (settings, the block's name; None where there is none)
FAMILIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "gpt2": (GPT, "transformer.h.1.mlp"),
    "gpt_neo": (
        {"hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
             "max_position_embeddings": 64, "intermediate_size": 48},
        "transformer.h.1.mlp",
    ),
    "gpt_neox": ({**LLAMA, "num_key_value_heads": None}, "gpt_neox.layers.1.mlp"),
    "gptj": ({**GPT, "rotary_dim": 4}, "transformer.h.1.mlp"),
    "opt": (
        {"hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "word_embed_proj_dim": 16, "max_position_embeddings": 64},
        "model.decoder.layers.1.fc1",
    ),
    "bloom": ({"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}, "transformer.h.1.mlp"),
    "llama": (LLAMA, MLP),
    "mistral": (LLAMA, MLP),
    "mixtral": ({**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, MLP),
    "qwen2": (LLAMA, MLP),
    "qwen3": ({**LLAMA, "head_dim": 8}, MLP),
    "qwen3_moe": ({**LLAMA, **EXPERTS, "head_dim": 8}, MLP),
    "gemma2": ({**LLAMA, "head_dim": 8, "final_logit_softcapping": 5.0}, MLP),
    "gemma3_text": ({**LLAMA, "head_dim": 8}, MLP),
    "phi": (LLAMA, MLP),
    "phi3": ({**LLAMA, "pad_token_id": 0}, MLP),
    "olmo2": (LLAMA, MLP),
    "granite": ({**LLAMA, "logits_scaling": 3.0, "embedding_multiplier": 2.0}, MLP),
    "falcon": (
        {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64},
        "transformer.h.1.mlp",
    ),
    "stablelm": (LLAMA, MLP),
    "smollm3": ({**LLAMA, "pad_token_id": 0}, MLP),
    "cohere": ({**LLAMA, "logit_scale": 0.25}, MLP),
    "starcoder2": (LLAMA, MLP),
    "mpt": ({"d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}, "transformer.blocks.1.ffn"),
    "mamba": ({"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4}, None),
}


def make(family: str) -> Any:
    """A model of this family in evaluation mode, its weights large enough for predictions that differ."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings, _ = FAMILIES[family]
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(family, **{**special, **settings, "vocab_size": VOCABULARY})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)
