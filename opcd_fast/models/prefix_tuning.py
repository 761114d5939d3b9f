"""A trained prefix: keys and values of p virtual tokens in front of every sequence, the only weights that are trained.

The adapter is PEFT's prefix tuning (Li and Liang, arXiv 2101.00190), without its projection. Its first keys and values
are those that the model itself computes for the first p tokens of the context, as in Cartridges (arXiv 2506.06266), so
that the student begins with a part of what the teacher reads. Through a packed row it runs like the teacher's contexts:
the prefix is one stretch of keys that all sequences share, merged with each one's own attention by logsumexp, and here
with gradients. Positions go on after the prefix, as in PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from opcd_fast.attention import KeysAndValues
from opcd_fast.errors import InputError
from opcd_fast.models import seam
from opcd_fast.models.architectures import refuses_plain_cache

Prefix = Sequence[KeysAndValues]
"""Each layer's keys and values, (1, H_kv, p, d)."""


def virtual_tokens(model: nn.Module) -> int:
    """How many a model's trained prefix has; 0 for one without, also while it is disabled."""
    learner = seam.prompt_learner(model)
    if learner is None or getattr(learner, "_adapters_disabled", False):
        return 0
    return int(learner.active_peft_config.num_virtual_tokens)


def with_prefix(model: Any, count: int, contexts: Sequence[Sequence[int]]) -> Any:
    """PEFT's prefix tuning around `model`, `count` tokens long, begun with the longest of `contexts` (token ids).

    Raises InputError: no context has so many tokens, or a model through which a prefix does not run exactly.
    """
    from peft import PrefixTuningConfig, get_peft_model

    reason = refuses_prefix(model)
    if reason is not None:
        raise InputError(f"num_virtual_tokens={count}: {reason}; use lora_rank")
    longest = max(contexts, key=len, default=())
    if len(longest) < count:
        raise InputError(
            f"num_virtual_tokens={count}: the prefix begins as the first tokens of the context, which has "
            f"{len(longest)}; set num_virtual_tokens={max(len(longest) // 2, 1)}, or use lora_rank"
        )
    body = seam.body_of(model)
    ids = torch.tensor([list(longest[:count])], device=next(model.parameters()).device)
    with torch.no_grad(), seam.scoring_mode(body):
        layers, _, _ = seam.fill_cache(body, ids)  # causal: what comes later does not matter
    first = layers[0][0].shape
    if any(x.shape != first for layer in layers for x in layer):
        raise InputError(f"num_virtual_tokens={count}: keys and values have different shapes; use lora_rank")
    student: Any = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count))
    # PEFT's layout: token, then keys and values of each layer in turn, then head.
    flat = torch.stack([x[0].transpose(0, 1) for layer in layers for x in layer], dim=1).reshape(count, -1)
    weight = student.prompt_encoder[student.active_adapter].embedding.weight
    if weight.shape != flat.shape:
        raise InputError(
            f"num_virtual_tokens={count}: peft makes a prefix of {tuple(weight.shape)} for this model, whose keys and "
            f"values are {tuple(flat.shape)}; use lora_rank"
        )
    weight.data = flat.to(torch.float32)
    return student


def refuses_prefix(model: nn.Module) -> str | None:
    """Why a trained prefix does not run exactly through `model`, in words; None when it does."""
    body = seam.body_of(model)
    if seam.setting(seam.config_of(body), "kv_lora_rank"):
        return "its keys and values are compressed"
    return refuses_plain_cache(body, training=True)
