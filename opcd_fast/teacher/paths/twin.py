"""A small random model of another model's kind, to try a way of running it on."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from opcd_fast.models import seam

VOCABULARY = 64
_MOST_PARAMETERS = 30_000_000  # a second on one CPU core

# Sizes that do not decide how attention and its cache work, as configurations spell them. All experts are chosen:
# a router that is near a tie would turn rounding into another expert.
_SMALL = {
    "intermediate_size": 128,
    "intermediate_size_mlp": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "num_local_experts": 2,
    "num_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "num_mem_blocks": 1,
}
_FOR_EACH_LAYER = ("no_rope_layers", "mlp_layer_types", "activation_sparsity_pattern", "intermediate_size")


def twin_of(kind: type[nn.Module], original: Any, device: torch.device, *, window: int | None = None) -> nn.Module:
    """A model of class `kind`, of `original`'s layer types, head size and RoPE: two or so layers, random fp32 weights.

    window: the sliding window or attention chunk in tokens of the layers that have one. It is in eval mode, with the
    model's stock attention ("eager" or "sdpa"). The global random state is left alone.

    Raises ValueError where the twin would not be small.
    """
    config = _shrunk(original, window)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"a small model of this kind still has {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        twin = kind(config)
    twin = twin.to(device=device, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        # Wide enough that attention is far from uniform and a wrong key shows, not so wide that rounding does.
        std = 1.0 if parameter.ndim < 2 else 1.0 / parameter.shape[-1] ** 0.5
        noise = torch.randn(parameter.shape, generator=generator) * std
        parameter.data.copy_(noise if parameter.ndim > 1 else 1.0 + 0.1 * noise)
    return twin


def has_window(body: nn.Module) -> bool:
    config = seam.config_of(body)
    return any(seam.setting(config, name) is not None for name in ("sliding_window", "attention_chunk_size"))


def _shrunk(original: Any, window: int | None) -> Any:
    config = copy.deepcopy(original)
    differing = _settings_by_layer(original)
    if differing:
        config.per_layer_config = None
    kept = _shrink_depth(config)
    for name, value in _SMALL.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, value)
    _shrink_heads(config)
    _shrink_recurrence(config)
    config.vocab_size = VOCABULARY
    if hasattr(config, "vocab_size_per_layer_input"):
        config.vocab_size_per_layer_input = VOCABULARY
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(config, name, None) is not None:
            setattr(config, name, window)
    if config._attn_implementation not in ("eager", "sdpa"):
        config._attn_implementation_internal = "sdpa"
    if differing:
        config.per_layer_config = {new: differing[old] for new, old in enumerate(kept) if old in differing}
    return config


def _settings_by_layer(config: Any) -> dict[int, dict[str, Any]]:
    """What single layers of `config` have different from the others (Gemma-4's head sizes), with few key heads."""
    spec = getattr(config, "_heterogeneity_spec", None)
    if spec is None:
        return {}
    few = {"num_key_value_heads": 2}
    return {
        layer: {name: few.get(name, value) for name, value in own.items()}
        for layer, own in spec.per_layer_overrides.items()
    }


def _shrink_heads(config: Any) -> None:
    """Few heads of the same size, two to a key head where the model groups them."""
    heads = config.num_attention_heads
    grouped_falcon = getattr(config, "new_decoder_architecture", False)
    shared = getattr(config, "num_kv_heads" if grouped_falcon else "num_key_value_heads", None) or heads
    groups = min(2, max(1, heads // shared))
    own_size = getattr(config, "head_dim", None)
    size = own_size or config.hidden_size // heads
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = 2
    config.num_attention_heads = 2 * groups
    if hasattr(config, "num_kv_heads"):
        config.num_kv_heads = 2 if grouped_falcon else config.num_attention_heads
    # Where the configuration has no head size of its own, it follows from these two.
    config.hidden_size = 32 if own_size else size * config.num_attention_heads
    if hasattr(config, "word_embed_proj_dim"):
        config.word_embed_proj_dim = config.hidden_size


def _shrink_recurrence(config: Any) -> None:
    """Few heads of recurrent layers, whose sizes hang together: heads x size = expansion x hidden size."""
    if hasattr(config, "linear_num_key_heads"):
        groups = config.linear_num_value_heads // config.linear_num_key_heads
        config.linear_num_key_heads, config.linear_num_value_heads = 2, 2 * groups
    heads = 4
    inner = getattr(config, "mamba_d_ssm", None)
    width = getattr(config, "mamba_expand", 2) * config.hidden_size
    for count, size in (("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim")):
        if hasattr(config, count):
            setattr(config, count, heads)
            setattr(config, size, width // heads)
    if inner is not None:
        config.mamba_d_ssm = width
    if hasattr(config, "mamba_num_heads"):
        config.mamba_num_heads = heads
    for name in ("mamba_n_groups", "mamba_ngroups", "n_groups"):
        if hasattr(config, name):
            setattr(config, name, 2)
    if hasattr(config, "attention_hidden_size"):
        config.attention_hidden_size = 2 * config.hidden_size
        config.attention_head_dim = config.attention_hidden_size // config.num_attention_heads


def _shrink_depth(config: Any) -> list[int]:
    """Keep one layer of each type, at least two, and return which; settings of single layers follow them."""
    depth = config.num_hidden_layers
    types = list(getattr(config, "layer_types", None) or ["any"] * depth)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    # Layers that read another's keys: one of each type of these, besides one of each type that has its own.
    kept = [first for a, b in ((0, depth - shared), (depth - shared, depth)) for first in _first_of_each(types, a, b)]
    if len(kept) == 1:
        kept.append(min(kept[0] + 1, depth - 1))
    if shared:
        config.num_kv_shared_layers = sum(layer >= depth - shared for layer in kept)
    if hasattr(config, "attn_layer_indices"):  # Bamba derives its layer types from these
        config.attn_layer_indices = [new for new, old in enumerate(kept) if types[old] == "full_attention"]
    elif getattr(config, "layer_types", None):
        with suppress(AttributeError):  # a property that follows the number of layers (Falcon-H1)
            config.layer_types = [types[layer] for layer in kept]
    if hasattr(config, "hybrid_layer_ids"):
        config.hybrid_layer_ids = [new for new, old in enumerate(kept) if types[old] == "hybrid"]
    for name in _FOR_EACH_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == depth:
            small = _SMALL.get(name)
            setattr(config, name, [values[layer] if small is None else small for layer in kept])
    config.num_hidden_layers = len(kept)
    return kept


def _first_of_each(types: list[str], start: int, end: int) -> list[int]:
    return sorted(types.index(kind, start, end) for kind in set(types[start:end]))
