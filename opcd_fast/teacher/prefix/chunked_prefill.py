"""Reading a context in chunks of tokens: keys and values grow, everything else is dropped after each chunk.

A forward pass over the whole context would hold its activations and hidden states at once. Here a chunk of c tokens
attends to what the cache holds and to itself, as a packed row of one sequence whose prefix is the cache
(`attention.PackedCall`), so that neither a mask of c x P nor a copy of the keys is made. Beyond the keys and
values themselves, memory does not depend on the length P of the context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from opcd_fast.attention import KeysAndValues, PackedCall, PrefixGroup, row_of
from opcd_fast.models import forward_on_row, moving_rope, refuses_packing, seam
from opcd_fast.models.caches import GrowingLayer, PrefixCache

_ACTIVATION_BYTES = 256 * 2**20  # of one layer, for one chunk
_LEAST_TOKENS = 256  # fewer leave matrix products too thin to be worth their launch


def refuses_chunks(body: nn.Module) -> str | None:
    """Why `body` cannot read a context piece by piece with packed attention, in words; None when it can.

    Besides what a packed row needs: RoPE that is the same for every length (the pieces would be on different sides of
    a switch), and layers with a cache of their own.
    """
    reason = refuses_packing(body)
    if reason is not None:
        return reason
    if moving_rope(body):
        return "its RoPE changes with the length of the input"
    if getattr(seam.config_of(body), "num_kv_shared_layers", None):
        return "some of its layers read the keys of others"
    return None


def chunk_tokens(body: nn.Module) -> int:
    """Tokens of one chunk: as many as one layer's activations fit in 256 MiB, a multiple of 256, at least 256.

    Counted for each token, in the model's dtype: gate, up and product of the MLP (of every expert a token visits),
    queries, keys and values, and the residual stream four times, once of these in float32. A Qwen3-8B in bf16 gets
    1,792 tokens, a SmolLM2-135M in fp32 7,680.
    """

    def setting(name: str) -> int:
        """0 where there is none, or one for each layer."""
        found = seam.setting(seam.config_of(body), name)
        return found if isinstance(found, int) else 0

    hidden, heads = setting("hidden_size"), setting("num_attention_heads") or 1
    experts = (setting("num_experts_per_tok") or 1) * setting("moe_intermediate_size")
    inner = max(setting("intermediate_size") or 4 * hidden, experts)
    head_dim = setting("head_dim") or hidden // heads
    size = next(body.parameters()).element_size()
    per_token = (3 * inner + 3 * heads * head_dim + 3 * hidden) * size + 4 * hidden
    return max(_LEAST_TOKENS, _ACTIVATION_BYTES // per_token // _LEAST_TOKENS * _LEAST_TOKENS)


def grow(
    body: nn.Module,
    token_ids: Tensor,
    chunk: int,
    start: Sequence[KeysAndValues] = (),
    start_length: int = 0,
    device: torch.device | str | None = None,
) -> tuple[list[KeysAndValues], Tensor]:
    """Run `token_ids` (P,) through `body` in chunks of `chunk` tokens: each layer's (keys, values), last hidden state.

    start: each layer's keys and values after the first `start_length` < P tokens, which are then not run; they are
    copied. Keys and values are (1, H_kv, kept, d) in storage of their own; kept is P, or min(P, W - 1) for a layer
    with a sliding window of W tokens. The hidden state is (D,), at the last token. device: where keys and values grow,
    None for where the model is; from another one a layer's keys come over for each chunk anew.

    For a body that `refuses_chunks` does not refuse, without gradients. Raises RuntimeError when an
    attention layer did not read the cache.
    """
    length = token_ids.numel()
    place = None if device is None else torch.device(device)
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=seam.config_of(body)).layers]
    layers = [
        GrowingLayer(length, window, start[index] if start_length else None, start_length, place)
        for index, window in enumerate(windows)
    ]
    cache, ids = PrefixCache(layers=[*layers]), token_ids.to(next(body.parameters()).device)
    for first in range(start_length, length, chunk):
        piece = ids[first : first + chunk]
        count = len(piece)
        row = row_of([count], ids.device, [PrefixGroup(0, 1, 0, count, first)] if first else [])
        hidden = forward_on_row(body, piece, row.position_of_token, PackedCall(row, cache.prefixes), cache)
    return [(layer.keys, layer.values) for layer in layers], hidden[-1].clone()  # type: ignore[misc]
