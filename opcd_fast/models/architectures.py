"""Which models can run on a prefix computed once, and why others cannot.

`merge` and the student's packed row need attention that goes through transformers' attention interface with windows,
caps and sinks on top; `pad` needs a cache of keys, values and states that can be copied for each row. What is said
here is what is known before running anything; `opcd_fast.teacher.paths.verification` then tries the path on a small
model of the same kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from opcd_fast.attention import backends
from opcd_fast.models import seam
from opcd_fast.models.caches import is_recurrent, unknown_state

# Models with recurrent layers that go on from a cached state, in tests/teacher/test_teacher_matrix.py. Known not to:
# Jamba, MiniMax and RecurrentGemma, whose scans start anew or whose state no cache sees.
# fmt: off
_GOES_ON = frozenset({
    "bamba", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_next", "zamba2",
})
# fmt: on

# Every attention call of these goes through the attention interface, with all keyword arguments, at the
# positions given by `position_ids`. Each is in tests/teacher/test_teacher_matrix.py; others need a test before they are
# added.
# fmt: off
_PACKABLE = frozenset({
    "llama", "qwen2", "qwen3", "mistral", "olmo", "olmo2", "olmo3", "smollm3", "phi", "phi3", "mixtral",
    "qwen2_moe", "qwen3_moe", "olmoe", "gemma", "gemma3_text", "gemma3n_text", "gemma4_text", "granite", "glm",
    "glm4", "cohere", "cohere2", "starcoder2", "exaone4", "stablelm", "gpt_neox", "gemma2", "gpt_oss", "gpt2", "opt",
    "deepseek_v3",
})
# fmt: on


def refuses_stock_attention(body: nn.Module) -> str | None:
    """Why the model's own attention, as it is set, does not compute what the model means; None when it does."""
    if seam.config_of(body)._attn_implementation != "sdpa":
        return None
    extra = _on_top(body)
    return f"sdpa attention drops this model's {extra}; load it with attn_implementation='eager'" if extra else None


def refuses_packing(body: nn.Module, *, training: bool | None = None) -> str | None:
    """Why a packed row cannot be run through `body` exactly, in words; None when it can.

    training: whether dropout is on; None: as `body` has it.
    """
    kinds = moving_rope(body)
    if kinds:
        return f"RoPE type {kinds[0]!r} changes every position with the length"
    dropout = seam.setting(seam.config_of(body), "attention_dropout")
    training = body.training if training is None else training
    if training and dropout and _on_top(body):
        return f"attention_dropout={dropout} with capped scores or sinks, which packed attention does not combine"
    return _refuses_row(body)


def refuses_sharing(body: nn.Module, *, training: bool) -> str | None:
    """Why several continuations cannot share their prompt in a packed row through `body`; None when they can.

    training: whether dropout is on.
    """
    reason = refuses_packing(body)
    if reason is not None:
        return reason
    extra = _on_top(body)
    if extra:
        return f"attention with shared prompts has no {extra}"
    for name in ("attention_dropout", "attn_pdrop"):
        dropout = seam.setting(seam.config_of(body), name)
        if training and any(dropout if isinstance(dropout, list) else [dropout]):
            return f"attention with shared prompts has no dropout, the model has {name}={dropout}"
    return None


def refuses_plain_cache(body: nn.Module, *, training: bool) -> str | None:
    """Why one row of keys and values for each layer and sequence is not all that attention reads; None when it is.

    training: whether dropout is on.
    """
    config = seam.config_of(body)
    kinds = set(seam.setting(config, "layer_types") or ["full_attention"])
    if kinds != {"full_attention"} or seam.setting(config, "sliding_window"):
        return "its attention is windowed"
    if seam.setting(config, "num_kv_shared_layers"):
        return "its layers share keys and values"
    return refuses_sharing(body, training=training)


def refuses_merge(body: nn.Module) -> str | None:
    """Why sequences in a packed row cannot be merged with a prefix; None when they can.

    "longrope" is allowed: which of its two sets of frequencies holds is known for each call, see `rope_switch`.
    """
    return _refuses_dynamic(body) or _refuses_row(body)


def refuses_pad(body: nn.Module) -> str | None:
    """Why a padded batch cannot continue a prefix's cache; None when nothing is known against it."""
    config = seam.config_of(body)
    if config.get_text_config() is not config:
        return f"{type(body).__name__} is a model of several inputs; pass its language model"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return "the model has cross-attention"
    state = unknown_state(body)
    if state is not None:
        return f"layers of architecture {config.model_type!r} keep more than keys and values ({state})"
    # RecurrentGemma's state does not show in the cache of every version.
    recurrent = is_recurrent(body) or config.model_type == "recurrent_gemma"
    if recurrent and config.model_type not in _GOES_ON:
        return f"recurrent layers of architecture {config.model_type!r} are not known to go on from a cached state"
    if seam.takes_cache(body) is None:
        return f"architecture {config.model_type!r} takes no cache of keys and values"
    if seam.setting(config, "sliding_window") == 1:
        return "a sliding_window of 1 leaves transformers' caches no key to keep"
    implementation = config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        return f"the padded path runs eager or sdpa attention, the model has {implementation!r}"
    return _refuses_dynamic(body)


def moving_rope(body: nn.Module) -> list[str]:
    """RoPE types of `body` whose frequencies depend on the longest position of a call."""
    return sorted({str(rope["rope_type"]) for rope in _ropes(body) if rope.get("rope_type") in ("dynamic", "longrope")})


def rope_switch(body: nn.Module) -> int | None:
    """Length beyond which "longrope" moves all positions of a call, None without such RoPE.

    A prefix computed on one side of it is wrong for sequences that end on the other.
    """
    for rope in _ropes(body):
        if rope.get("rope_type") == "longrope":
            length = rope.get("original_max_position_embeddings")
            return int(length or seam.config_of(body).original_max_position_embeddings)
    return None


def _ropes(body: nn.Module) -> list[dict[str, Any]]:
    """RoPE settings, one for all layers or one for each layer type."""
    rope = getattr(seam.config_of(body), "rope_parameters", None) or {}
    return [value for value in (rope, *rope.values()) if isinstance(value, dict)]


def _caps_scores(body: nn.Module) -> bool:
    return seam.setting(seam.config_of(body), "attn_logit_softcapping") is not None


def _has_sinks(body: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "sinks" for name, _ in body.named_parameters())


def _on_top(body: nn.Module) -> str | None:
    """What the model's attention has besides products and softmax."""
    return "cap on attention scores" if _caps_scores(body) else "attention sinks" if _has_sinks(body) else None


def _refuses_dynamic(body: nn.Module) -> str | None:
    return "RoPE type 'dynamic' changes every position with the length" if "dynamic" in moving_rope(body) else None


def _refuses_row(body: nn.Module) -> str | None:
    config = seam.config_of(body)
    if config.model_type not in _PACKABLE or getattr(config, "add_cross_attention", False):
        return f"architecture {config.model_type!r} is not known to run exactly on a packed row"
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if kinds:
        return f"architecture {config.model_type!r} has layers of type {min(kinds)!r}"
    device = next(body.parameters()).device.type
    if device not in ("cpu", "cuda"):
        return f"no packed attention for device type {device!r}"
    return None


def kernels_of(body: nn.Module) -> str:
    """One line: the kernels that attention on a packed row of `body` goes to, without gradients."""
    config, first = seam.config_of(body), next(body.parameters())
    sizes = seam.setting(config, "head_dim") or config.hidden_size // config.num_attention_heads
    if getattr(config, "qk_rope_head_dim", None):
        sizes = config.qk_nope_head_dim + config.qk_rope_head_dim
    sizes = [*sizes] if isinstance(sizes, list) else [sizes]
    size = max(*sizes, getattr(config, "global_head_dim", None) or 0)
    need = backends.Need(
        device=first.device.type,
        capability=torch.cuda.get_device_capability(first.device) if first.is_cuda else (0, 0),
        dtype=first.dtype,
        head_size=size,
        softcap=_caps_scores(body),
    )
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return "kernels: " + backends.describe(need, windows=any(windows), sinks=_has_sinks(body))
