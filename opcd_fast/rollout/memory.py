"""How many sequences fit into memory while they are being written."""

from __future__ import annotations

from typing import Any

import torch

from opcd_fast.models import seam, virtual_tokens

MOST = 256  # sequences; beyond this a batch is no faster per token
SHARE = {"cuda": 0.5, "cpu": 0.25}  # of the free memory; the rest is for what else happens meanwhile
BYTES_PER_LOGIT = 32  # the model's logits, float32 scores and probabilities, float64 sums, and their temporaries


def cache_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that one token of one sequence holds, in the model's own dtype.

    Counts every layer as full attention: a bound where layers are windowed, recurrent or share keys.
    """
    config = seam.config_of(seam.body_of(model))
    heads = seam.setting(config, "num_attention_heads")
    key_heads = seam.setting(config, "num_key_value_heads") or heads
    width = seam.setting(config, "head_dim") or _largest(seam.setting(config, "hidden_size")) // _largest(heads)
    per_layer = _largest(key_heads) * _largest(width)
    return 2 * seam.num_layers(seam.body_of(model)) * per_layer * next(model.parameters()).dtype.itemsize


def bytes_per_sequence(model: Any, prompt_tokens: int, max_new_tokens: int, vocab_size: int) -> int:
    """Peak bytes of one row: its keys and values (twice while rows move to a larger buffer) and its logits."""
    tokens = 2 * (prompt_tokens + virtual_tokens(model)) + max_new_tokens
    return tokens * cache_bytes_per_token(model) + vocab_size * BYTES_PER_LOGIT


def batch_that_fits(model: Any, prompt_tokens: int, max_new_tokens: int, free: int | None = None) -> int:
    """Sequences to generate at once, 1 to MOST. `free` bytes: asked of the device or the system when None."""
    device = next(model.parameters()).device
    vocabulary = seam.config_of(seam.body_of(model)).vocab_size
    row = bytes_per_sequence(model, prompt_tokens, max_new_tokens, vocabulary)
    budget = int((free_bytes(device) if free is None else free) * SHARE.get(device.type, 0.25))
    return max(1, min(MOST, budget // row))


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now: of the GPU with what torch's allocator holds unused, else of the system."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil  # which accelerate and PEFT bring

    return psutil.virtual_memory().available


def _largest(value: Any) -> int:
    return max(value) if isinstance(value, list) else int(value)
