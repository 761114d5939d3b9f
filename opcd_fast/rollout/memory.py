"""What sequences hold while they are being written, and how many fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from opcd_fast.models import seam, virtual_tokens
from opcd_fast.rollout.decoding import HOLD_ONCE, BatchRun, numbers_per_token
from opcd_fast.rollout.sampling import BYTES_PER_LOGIT, draw

MOST = 256  # sequences; beyond this a batch is no faster per token
SHARE = {"cuda": 0.5, "cpu": 0.25}  # of the free memory; the rest is for what else happens meanwhile
KEPT_SHARE = 1 / 16  # of a GPU's memory: recorded steps with their buffers, between calls


def kept_at_most(device: torch.device) -> int:
    """Bytes that recorded steps keep between calls."""
    share = KEPT_SHARE * torch.cuda.get_per_process_memory_fraction(device)
    return int(torch.cuda.get_device_properties(device).total_memory * share)


def cache_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that one token of one sequence holds, in the model's own dtype.

    Counts every layer as full attention: a bound where layers are windowed, recurrent or share keys.
    """
    layers = seam.num_layers(seam.body_of(model))
    return layers * numbers_per_token(model) * next(model.parameters()).dtype.itemsize


def bytes_per_sequence(model: Any, prompt_tokens: int, max_new_tokens: int, vocab_size: int) -> int:
    """Peak bytes of one row: its keys and values, and its logits."""
    tokens = prompt_tokens + virtual_tokens(model) + max_new_tokens
    return tokens * cache_bytes_per_token(model) + vocab_size * BYTES_PER_LOGIT


def batch_that_fits(
    model: Any, prompt_tokens: int, max_new_tokens: int, free: int | None = None, kind: str | None = None, *,
    shared_tokens: int = 0,
) -> int:  # fmt: skip
    """Sequences to generate at once, 1 to MOST. `free` bytes: asked of the device or the system when None. kind: of the
    device, "cuda" or "cpu"; None for the one that the model is on. shared_tokens: that all prompts begin with, counted
    once where any two rows hold them once."""
    device = next(model.parameters()).device
    vocabulary = seam.config_of(seam.body_of(model)).vocab_size
    held = shared_tokens if shared_tokens * numbers_per_token(model) >= HOLD_ONCE else 0
    row = bytes_per_sequence(model, prompt_tokens - held, max_new_tokens, vocabulary)
    budget = int((free_bytes(device) if free is None else free) * SHARE.get(kind or device.type, 0.25))
    budget -= held * cache_bytes_per_token(model)
    return max(1, min(MOST, budget // row))


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now: of the GPU with what torch's allocator holds unused, else of the system."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return psutil.virtual_memory().available


@torch.no_grad()
def first_and_last_token(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float, top_p: float,
    decodes: bool,
) -> int:  # fmt: skip
    """What a batch holds at its worst, for a plan of a run's memory: reads the prompts and draws the first and the last
    token of each answer, with the cache grown in between. Returns the bytes that recorded steps would hold.

    model: causal LM whose tensors need no data. decodes: by our loop, with what answers share held once; else a row
    for each in transformers' cache.
    """

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        uniform = torch.zeros(len(prompts), dtype=torch.float64)
        draw(logits, uniform, temperature, top_p, None)
        return torch.zeros(len(prompts), dtype=torch.int64)

    with seam.scoring_mode(model):
        if decodes:
            different = list(dict.fromkeys(map(tuple, prompts)))
            run = BatchRun(model, [different.index(tuple(p)) for p in prompts], different, max_new_tokens)
            with seam.using_attention(seam.body_of(model), run.attend)():
                tokens = drawn(run.read_prompts())
                run.end += max_new_tokens - 2
                run.extend()
                drawn(logits := run.next(tokens))
            return logits.numel() * BYTES_PER_LOGIT + run.cache.nbytes
        from transformers import DynamicCache

        cache, longest = DynamicCache(config=model.config), max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        options = {**seam.cache_argument(model, cache), "use_cache": True, "logits_to_keep": 1}
        drawn(model(input_ids=ids, **options).logits[:, -1])
        for layer in cache.layers:
            if getattr(layer, "keys", None) is not None:
                _lengthen(layer, longest + max_new_tokens - 2)
        drawn(model(input_ids=ids[:, :1], **options).logits[:, -1])
        return 0


def _lengthen(layer: Any, tokens: int) -> None:
    """A layer of transformers' cache, which is made anew with each token, as it is after so many."""
    window = getattr(layer, "sliding_window", None)
    if window is not None:
        layer.cumulative_length, tokens = tokens, min(tokens, window - 1)
    for name in ("keys", "values"):
        old = getattr(layer, name)
        setattr(layer, name, None)
        setattr(layer, name, old.new_empty(*old.shape[:2], tokens, old.shape[3]))
