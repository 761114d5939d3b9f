"""What drawing answers holds: keys and values, the longest prompts' forward pass, and the logits of one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from opcd_fast.config import OPCDConfig
from opcd_fast.merged import MergedCopy
from opcd_fast.planning.meter import Meter


def rehearse_rollout(
    meter: Meter, phase: str, model: Any, config: OPCDConfig, device: str, prompts: Sequence[int], dtype: torch.dtype
) -> None:
    """`TransformersRollout.generate` at its largest batch. prompts: their numbers of tokens."""
    from transformers import DynamicCache

    merges = config.merge_for_rollout if config.merge_for_rollout is not None else device == "cpu"
    if merges and phase == "rollout" and MergedCopy.supports(model):
        with meter.phase("other", "merged copy"):
            model = MergedCopy(model).refresh()
    batch, longest = min(config.rollout_batch, len(prompts)), max(prompts)
    with torch.no_grad():
        with meter.phase(phase):
            cache = DynamicCache(config=model.config)
            ids = torch.zeros(batch, longest, dtype=torch.int64)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            _draw(logits, config)
            del logits
            with meter.phase(phase, "rollout KV"):
                for layer in cache.layers:
                    if getattr(layer, "keys", None) is not None:
                        _lengthen(layer, longest + config.max_new_tokens - 2)
            logits = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            _draw(logits, config)


def _lengthen(layer: Any, tokens: int) -> None:
    """The cache as it is before the last token is drawn."""
    window = getattr(layer, "sliding_window", None)
    if window is not None:
        tokens = min(tokens, window - 1)
    for name in ("keys", "values"):
        old = getattr(layer, name)
        setattr(layer, name, None)
        setattr(layer, name, old.new_empty(*old.shape[:2], tokens, old.shape[3]))


def _draw(logits: Any, config: OPCDConfig) -> None:
    """As transformers draws, with this package's recorder."""
    from opcd_fast.rollout import _Sampler

    recorder = _Sampler(config.temperature, config.top_p, None)
    scores = logits[:, -1].to(copy=True, dtype=torch.float32)
    scores = recorder(None, scores)
    torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), 1)
    recorder.logprobs(torch.zeros(logits.shape[0], 1, dtype=torch.int64))
