"""Tiny random models of the architectures that the shared-prefix teacher knows, one of every mechanism."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

VOCABULARY = 97
WINDOW = 8

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
_NEMOTRON = {
    "head_dim": 12,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
}
_GEMMA4 = {
    "head_dim": 12,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_ALTERNATING_TWICE = {**_ALTERNATING, "layer_types": _ALTERNATING["layer_types"] * 2, "num_hidden_layers": 4}

Config = Callable[[], Any]


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


def _config(name: str, *parts: dict[str, Any], **options: Any) -> Config:
    merged: dict[str, Any] = dict(_BASE)
    for part in parts:
        merged.update(part)
    merged.update(options)

    def build() -> Any:
        return getattr(transformers, name)(**merged)

    return build


ARCHITECTURES: dict[str, Config] = {
    "llama": _config("LlamaConfig"),
    "qwen2": _config("Qwen2Config"),
    "qwen3": _config("Qwen3Config", head_dim=16),
    "mistral-window": _config("MistralConfig", sliding_window=WINDOW),
    "olmo": _config("OlmoConfig"),
    "olmo2": _config("Olmo2Config"),
    "olmo3": _config("Olmo3Config", _ALTERNATING),
    "smollm3": _config("SmolLM3Config", no_rope_layers=[1, 0]),
    "phi": _config("PhiConfig"),
    "phi3": _config("Phi3Config", sliding_window=None),
    "phi3-window": _config("Phi3Config", sliding_window=WINDOW),
    "phi3-longrope": _config(
        "Phi3Config",
        _rope("longrope", short_factor=[1.0] * 6, long_factor=[4.0] * 6, original_max_position_embeddings=24),
        sliding_window=None,
        original_max_position_embeddings=24,
    ),
    "llama-dynamic": _config("LlamaConfig", _rope("dynamic", factor=4.0), max_position_embeddings=24),
    "llama3-rope": _config(
        "LlamaConfig",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "yarn": _config("Qwen3Config", _rope("yarn", factor=4.0, original_max_position_embeddings=32), head_dim=16),
    "mixtral": _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2-moe": _config("Qwen2MoeConfig", _EXPERTS, shared_expert_intermediate_size=32),
    "qwen3-moe": _config("Qwen3MoeConfig", _EXPERTS, head_dim=16),
    "olmoe": _config("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "gemma": _config("GemmaConfig", head_dim=12),
    "gemma2": _config(
        "Gemma2Config", _ALTERNATING, head_dim=12, attn_logit_softcapping=2.0, attn_implementation="eager"
    ),
    "gemma3": _config("Gemma3TextConfig", _ALTERNATING, head_dim=12),
    "gemma3n": _config(
        "Gemma3nTextConfig",
        _ALTERNATING_TWICE,
        head_dim=12,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=8,
        altup_num_inputs=2,
        intermediate_size=[64] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4": _config("Gemma4TextConfig", _ALTERNATING, _GEMMA4, num_global_key_value_heads=2, num_kv_shared_layers=0),
    "gemma4-shared-kv": _config("Gemma4TextConfig", _ALTERNATING_TWICE, _GEMMA4, num_kv_shared_layers=2),
    "gemma4-moe": _config(
        "Gemma4TextConfig",
        _ALTERNATING,
        _GEMMA4,
        num_global_key_value_heads=2,
        num_kv_shared_layers=0,
        attention_k_eq_v=True,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
    ),
    "granite": _config("GraniteConfig", attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=2.0),
    "glm": _config("GlmConfig", head_dim=12),
    "glm4": _config("Glm4Config", head_dim=12),
    "cohere": _config("CohereConfig"),
    "cohere2": _config("Cohere2Config", _ALTERNATING),
    "starcoder2": _config("Starcoder2Config", sliding_window=None),
    "starcoder2-window": _config("Starcoder2Config", sliding_window=WINDOW),
    "exaone4": _config("Exaone4Config", _ALTERNATING),
    "stablelm": _config("StableLmConfig", partial_rotary_factor=0.5),
    "gpt-neox": _config("GPTNeoXConfig"),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "opt": _config("OPTConfig", ffn_dim=64, word_embed_proj_dim=48),
    "gpt-oss": _config(
        "GptOssConfig",
        _ALTERNATING,
        _rope("default"),
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "deepseek-v3": _config("DeepseekV3Config", _LATENT),
    "deepseek-v32": _config("DeepseekV32Config", _LATENT, index_topk=4, index_n_heads=16, index_head_dim=16),
    "llama4": _config(
        "Llama4TextConfig",
        head_dim=12,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        floor_scale=16,
        attn_temperature_tuning=True,
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=48, n_layers=2, n_heads=4, max_seq_len=128),
    "falcon": _config("FalconConfig", new_decoder_architecture=False, multi_query=True, num_ln_in_parallel_attn=None),
    "falcon-alibi": _config("FalconConfig", alibi=True, multi_query=False),
    "qwen3-next": _config("Qwen3NextConfig", _EXPERTS, _LINEAR, head_dim=16, shared_expert_intermediate_size=32),
    "qwen3.5": _config("Qwen3_5TextConfig", _LINEAR, head_dim=16),
    "falcon-h1": _config("FalconH1Config", _MAMBA2, mamba_d_ssm=96),
    "bamba": _config("BambaConfig", _MAMBA2, attn_layer_indices=[1]),
    "granite-hybrid": _config(
        "GraniteMoeHybridConfig",
        _MAMBA2,
        layer_types=["linear_attention", "full_attention"],
        shared_intermediate_size=64,
        num_local_experts=0,
    ),
    "nemotron-h": _config(
        "NemotronHConfig", _NEMOTRON, layers_block_type=["linear_attention", "full_attention"]
    ),
    "nemotron-h-moe": _config(
        "NemotronHConfig",
        _NEMOTRON,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        n_group=1,
        topk_group=1,
    ),
    "zamba2": _config(
        "Zamba2Config",
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "hybrid", "linear_attention"],
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_ngroups=2,
        chunk_size=16,
        num_mem_blocks=1,
        hybrid_layer_ids=[1],
        num_key_value_heads=4,
        attention_hidden_size=96,
        attention_head_dim=24,
    ),
    "lfm2": _config("Lfm2Config", layer_types=["conv", "full_attention"]),
    "lfm2-moe": _config("Lfm2MoeConfig", _EXPERTS, layer_types=["conv", "full_attention"], num_dense_layers=1),
    "qwen3.5-moe": _config("Qwen3_5MoeTextConfig", _EXPERTS, _LINEAR, head_dim=16, shared_expert_intermediate_size=32),
    "olmo-hybrid": _config("OlmoHybridConfig", _LINEAR, layer_types=["linear_attention", "full_attention"]),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=12,
        state_size=8,
        n_groups=2,
        chunk_size=16,
    ),
    "jamba": _config(
        "JambaConfig",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "recurrent-gemma": _config("RecurrentGemmaConfig", lru_width=48, attention_window_size=WINDOW, conv1d_width=4),
    "minimax": _config(
        "MiniMaxConfig",
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention"],
        head_dim=12,
        block_size=16,
    ),
}


def build(name: str, *, seed: int = 0, **overrides: object) -> nn.Module:
    """A causal LM in eval mode with attention far from uniform; `overrides` are set on its configuration."""
    config = ARCHITECTURES[name]()
    for key, value in overrides.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
    return model


# Those that run on a packed row, which is what a teacher must choose by itself.
# fmt: off
MERGE = [
    "llama", "qwen2", "qwen3", "mistral-window", "olmo", "olmo2", "olmo3", "smollm3", "phi", "phi3", "phi3-window",
    "phi3-longrope", "llama3-rope", "yarn", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gemma", "gemma3",
    "gemma3n", "gemma4", "gemma4-moe", "gemma4-shared-kv", "granite", "glm", "glm4", "cohere", "cohere2", "starcoder2",
    "starcoder2-window", "exaone4", "stablelm", "gpt-neox", "gemma2", "gpt-oss", "gpt2", "opt", "deepseek-v3",
]
# One member of every mechanism; the others are walked with -m slow.
MECHANISMS = {
    "qwen3", "mistral-window", "olmo3", "smollm3", "phi3-longrope", "yarn", "qwen3-moe", "gemma3",
    "gemma4-shared-kv", "granite", "stablelm", "gemma2", "gpt-oss", "gpt2", "deepseek-v3", "falcon", "llama4",
    "bloom", "falcon-alibi", "mpt", "llama-dynamic", "deepseek-v32", "qwen3-next", "falcon-h1", "bamba", "zamba2",
    "lfm2", "mamba2", "jamba",
}
# fmt: on


def walk(names: Iterable[str]) -> list[Any]:
    """Parameters of a test."""
    return [pytest.param(name, marks=() if name in MECHANISMS else pytest.mark.slow) for name in names]
