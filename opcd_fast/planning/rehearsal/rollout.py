"""What drawing answers holds: keys and values, the longest prompts' forward pass, and the logits of one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from opcd_fast.models import MergedCopy, seam
from opcd_fast.planning.rehearsal.meter import Meter
from opcd_fast.rollout import BatchRun, draw, refuses_decoding
from opcd_fast.rollout import memory as rollout_memory
from opcd_fast.training.settings import OPCDConfig


def answering_model(meter: Meter, model: Any, config: OPCDConfig, device: str) -> Any:
    """The copy with the adapter folded in that the run keeps, or `model`.

    device: the run's, "cuda" or "cpu"; the model's tensors are fake ones.
    """
    merges = device == "cpu" if config.merge_for_rollout is None else config.merge_for_rollout
    if config.rollout not in ("transformers", "generate") or not merges:
        return model
    if not MergedCopy.supports(model):
        return model
    with meter.phase("other", "merged copy"):
        copied = MergedCopy(model, device)
        return copied.refresh()


def rehearse_rollout(
    meter: Meter, phase: str, model: Any, config: OPCDConfig, prompts: Sequence[Sequence[int]], limit: int | None
) -> int:
    """`TransformersRollout.generate` at its largest batch; returns that.

    limit: bytes in all, for a batch that is sized to memory.
    """
    longest = max(map(len, prompts))
    batch = config.rollout_batch or rollout_memory.MOST
    if config.rollout_batch is None and limit is not None:
        free = max(limit - meter.held, 0)
        row = rollout_memory.bytes_per_sequence(model, longest, config.max_new_tokens, _vocabulary(model))
        batch = max(1, min(rollout_memory.MOST, int(free * rollout_memory.SHARE["cuda"]) // row))
    chosen = sorted(prompts, key=len)[-batch:]
    body = seam.body_of(model)
    with torch.no_grad(), seam.scoring_mode(model), meter.phase(phase):
        if refuses_decoding(model) is None and config.rollout != "generate":
            different = list(dict.fromkeys(map(tuple, chosen)))
            run = BatchRun(model, [different.index(tuple(p)) for p in chosen], different, config.max_new_tokens)
            with seam.using_attention(body, run.attend):
                logits = run.read_prompts()
                tokens = _draw(logits, config)
                layer: Any
                for layer in run.cache.layers:
                    layer.length += config.max_new_tokens - 2  # on to the last token
                logits = run.next(tokens)
                _draw(logits, config)
        else:
            _generate(model, len(chosen), longest, config)
    return len(chosen)


def _vocabulary(model: Any) -> int:
    return int(seam.config_of(seam.body_of(model)).vocab_size)


def _draw(logits: torch.Tensor, config: OPCDConfig) -> torch.Tensor:
    uniform = torch.zeros(logits.shape[0], dtype=torch.float64)
    tokens, _ = draw(logits, uniform, config.temperature, config.top_p, None)
    return torch.zeros(tokens.shape, dtype=torch.int64)


def _generate(model: Any, batch: int, longest: int, config: OPCDConfig) -> None:
    """transformers' `generate`: a cache that is made anew with each token, layer by layer."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.zeros(batch, longest, dtype=torch.int64)
    options = {**seam.cache_argument(model, cache), "use_cache": True, "logits_to_keep": 1}
    _draw(model(input_ids=ids, **options).logits[:, -1], config)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            _lengthen(layer, longest + config.max_new_tokens - 2)
    _draw(model(input_ids=ids[:, :1], **options).logits[:, -1], config)


def _lengthen(layer: Any, tokens: int) -> None:
    """The cache as it is before the last token is drawn."""
    window = getattr(layer, "sliding_window", None)
    tokens = tokens if window is None else min(tokens, window - 1)
    for name in ("keys", "values"):
        old = getattr(layer, name)
        setattr(layer, name, None)
        setattr(layer, name, old.new_empty(*old.shape[:2], tokens, old.shape[3]))
