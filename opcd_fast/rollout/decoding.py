"""Sampling token by token with keys and values in one buffer: what `generate` does, without what it adds per token.

Three things make it cheaper than transformers' `generate`: the cache is written in place instead of concatenated in
every layer at every token; a query head is folded into its key head, so that keys are never repeated; and rows that
are finished leave the batch. Prompts that occur several times run once, and so does the prefix that all share. A device
is never waited for but every few tokens, to see which rows are finished.

Token ids in, token ids out. The random number of answer i at token t depends on the seed, i and t alone, so the
answers do not depend on how the prompts were split into batches (up to rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opcd_fast.attention import repeat_heads, sdpa_without_cudnn
from opcd_fast.data import common_prefix_length
from opcd_fast.models import refuses_plain_cache, seam
from opcd_fast.models.caches import buffered_cache
from opcd_fast.rollout.protocol import cut_at_stop
from opcd_fast.rollout.sampling import draw

MIN_SHARED_PREFIX = 8  # tokens; below this one extra forward costs more than it saves
LOOK_EVERY = 16  # tokens, on a device


def refuses_decoding(model: Any) -> str | None:
    """Why this loop cannot run `model`, in words; None when it can (`rollout.check` looks all the same)."""
    return refuses_plain_cache(seam.body_of(model), training=False)


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniform: Tensor,
    *,
    stop_token_ids: Sequence[int],
    temperature: float,
    top_p: float,
    vocab_size: int | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Token ids and log-probabilities of one answer per prompt, ending with a stop token or after T tokens.

    Args:
        model: a causal LM in eval mode that `refuses_decoding` does not refuse.
        uniform: (B, T) float64 in [0, 1), the random number of each answer's tokens; T is the limit.
        temperature: 0 takes the most probable token; its log-probability is then at temperature 1.
        vocab_size: ids from here on are never drawn.
    """
    device = next(model.parameters()).device
    limit = uniform.shape[1]
    different = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: row for row, prompt in enumerate(different)}
    run = BatchRun(model, [place[tuple(prompt)] for prompt in prompts], different, limit)
    stops = torch.tensor(list(stop_token_ids), device=device)
    uniform = uniform.to(device)
    drawn = torch.zeros(len(prompts), limit, dtype=torch.int64, device=device)
    values = torch.zeros(len(prompts), limit, device=device)
    rows = torch.arange(len(prompts), device=device)  # the answers in the batch
    over = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    every = tokens_between_looks(device)
    with seam.using_attention(seam.body_of(model), run.attend), sdpa_without_cudnn():
        logits = run.read_prompts()
        for step in range(limit):
            tokens, logprobs = draw(logits, uniform[:, step], temperature, top_p, vocab_size)
            drawn[rows, step], values[rows, step] = tokens, logprobs
            over = over | (tokens[:, None] == stops).any(1)
            if step + 1 == limit:
                break
            if (step + 1) % every == 0:
                going = (~over).nonzero().squeeze(1)  # waits for the device
                if not len(going):
                    break
                if len(going) < len(rows):
                    rows, over, uniform, tokens = rows[going], over[going], uniform[going], tokens[going]
                    run.keep(going)
            logits = run.next(tokens)
    # What a row drew after its stop token, while it waited to leave, is dropped.
    kept = [cut_at_stop(row, stop_token_ids)[0] for row in drawn.tolist()]
    return [(list(ids), row[: len(ids)]) for ids, row in zip(kept, values.tolist())]


def tokens_between_looks(device: torch.device) -> int:
    """How many tokens are drawn before the host looks which rows are finished.

    A look waits for all work that was given to a device, so that it then idles until more comes. On a CPU it costs
    nothing, and a row that stays costs its share of every token.
    """
    return 1 if device.type == "cpu" else LOOK_EVERY


class BatchRun:
    """The cache of one batch, the mask and the positions that go with it."""

    def __init__(self, model: Any, row_of: Sequence[int], prompts: Sequence[Sequence[int]], limit: int) -> None:
        prefix = seam.trained_prefix(model)
        # PEFT would put its prefix into a cache of its own at every call.
        self.model: Any = model if seam.prompt_learner(model) is None else seam.causal_lm(model)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.cache = buffered_cache(seam.num_layers(seam.body_of(model)))
        self._as_argument = seam.cache_argument(self.model, self.cache)
        self.prompts, self.row_of, self.limit = prompts, torch.tensor(row_of, device=self.device), limit
        self.past = 0  # virtual tokens in front of every row
        if prefix is not None:
            self.past = prefix[0][0].shape[2]
            self.cache.spread(torch.zeros(1, dtype=torch.int64, device=self.device), self.past)
            layer: Any
            for layer, (key, value) in zip(self.cache.layers, prefix, strict=True):
                layer.update(key.detach(), value.detach())
        self.mask: Tensor | None = None  # (B, 1, queries, keys) added to the scores, or None: causal

    def read_prompts(self) -> Tensor:
        """(B, V) logits after the prompts; the cache holds a row for each answer afterwards."""
        lengths = [len(prompt) for prompt in self.prompts]
        shared = common_prefix_length(self.prompts) if len(self.prompts) > 1 else 0
        shared = shared if shared >= MIN_SHARED_PREFIX else 0
        width, count, head = self.past + max(lengths), len(lengths), self.past + shared
        if shared:
            prefix = torch.tensor([self.prompts[0][:shared]], device=self.device)
            self.cache.spread(torch.zeros(1, dtype=torch.int64, device=self.device), head)
            places = torch.arange(head, device=self.device)
            if self.past:
                self.mask = self._additive((places <= places[self.past :, None])[None, None])
            self._forward(prefix, places[None, self.past :])
        self.cache.spread(torch.zeros(count, dtype=torch.int64, device=self.device), width)
        ids = torch.tensor(
            [[p[-1]] * (width - self.past - len(p)) + list(p[shared:]) for p in self.prompts], device=self.device
        )
        # Slots between what all begin with and the rest.
        padding = width - self.past - torch.tensor(lengths, device=self.device)
        ragged = min(lengths) < max(lengths)
        slots = torch.arange(width, device=self.device)
        real = (slots < head) | (slots >= head + padding[:, None])  # (B, width)
        positions = (slots[head:] - padding[:, None]).clamp(min=0)
        self.mask = None
        if head or ragged:
            # Padding sees itself: a row without any key would be NaN, and NaN survives a weight of 0.
            seen = (real[:, None] & (slots <= slots[head:, None])) | (slots == slots[head:, None])
            self.mask = self._additive(seen[:, None])
        logits = self._forward(ids, positions)
        self.mask = None
        self.decoding_mask: Tensor | None = None
        if ragged:
            # Rows of a mask begin at multiples of 8 elements: else a kernel copies it in every layer at every token.
            more = real.new_ones(count, self.limit + -(width + self.limit) % 8)
            self.decoding_mask = self._additive(torch.cat([real, more], dim=1)[:, None, None])[self.row_of]
        self.cache.spread(self.row_of, width + self.limit)
        self.positions = (width - padding)[self.row_of]
        return logits[self.row_of]

    def next(self, tokens: Tensor) -> Tensor:
        """(B, V) logits after one more token each, (B,)."""
        if self.decoding_mask is not None:
            self.mask = self.decoding_mask[..., : self.cache.get_seq_length() + 1]
        logits = self._forward(tokens[:, None], self.positions[:, None])
        self.positions = self.positions + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.positions = self.positions[rows]
        if self.decoding_mask is not None:
            self.decoding_mask = self.decoding_mask[rows]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Any:
        """transformers' attention function: (B, H, Q, d) queries over the cache's (B, H_kv, K, d)."""
        for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
            if options.get(name) is not None:
                raise NotImplementedError(f"the decoding loop has no {name}; use engine='generate'")
        b, heads, count, _d = query.shape
        groups = heads // key.shape[1]
        scaling = options.get("scaling")
        if self.mask is not None and self.mask.dtype != query.dtype:  # float32 adapters on a bfloat16 model
            self.mask = self.mask.to(query.dtype)
        if count == 1 and groups > 1:
            folded = query.reshape(b, key.shape[1], groups, -1)
            out = F.scaled_dot_product_attention(folded, key, value, attn_mask=self.mask, scale=scaling)
            return out.reshape(b, 1, heads, -1), None
        if groups > 1 and query.is_cuda:
            # Keys shared by heads leave CUDA one kernel, which takes neither a mask nor float32; without it, the scores
            # of all queries and keys would be stored.
            key, value, groups = repeat_heads(key, query), repeat_heads(value, query), 1
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, scale=scaling,
            is_causal=self.mask is None and count > 1, enable_gqa=groups > 1,
        )  # fmt: skip
        return out.transpose(1, 2), None

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids, position_ids=positions, **self._as_argument, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1]

    def _additive(self, seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, -torch.inf)
