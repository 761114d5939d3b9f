"""Reading a context in chunks of tokens: keys and values grow, everything else is dropped after each chunk.

A forward pass over the whole context would hold its activations and hidden states at once. Here a chunk of c tokens
attends to what the cache holds and to itself, as a packed row of one sequence whose prefix is the cache
(`attention.attention_on_row`), so that neither a mask of c x P nor a copy of the keys is made. Beyond the keys and
values themselves, memory does not depend on the length P of the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from opcd_fast.attention import PackedCall, PackedRow, PrefixGroup, attention_on_row, running
from opcd_fast.models import moving_rope, refuses_packing, seam

_ACTIVATION_BYTES = 256 * 2**20  # of one layer, for one chunk
_LEAST_TOKENS = 256  # fewer leave matrix products too thin to be worth their launch


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values (1, H_kv, ..., d) of a context of `length` tokens that arrives in chunks.

    window: tokens a query sees, itself included, or None. Without one there is one buffer of the final size, and
    `update` returns views of it; with one, only the last window - 1 tokens are kept. start: keys and values after the
    first `start_length` tokens. place: the device that keeps them, None for the layer's own. From another one `update`
    returns copies.
    """

    is_sliding = False

    def __init__(
        self,
        length: int,
        window: int | None,
        start: tuple[Tensor, Tensor] | None = None,
        start_length: int = 0,
        place: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.place = place
        self.length, self.window = length, window
        self.past = 0
        self.is_initialized = True
        if start is not None:
            self.update(*start)
            self.past = start_length  # a window kept fewer keys than there were tokens

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.past + key_states.shape[-2]
        if self.window is not None:
            keys = key_states if self.keys is None else _after(self.keys, key_states)
            values = value_states if self.values is None else _after(self.values, value_states)
            first = keys.shape[-2] - _kept(keys.shape[-2], self.window)
            # Clones: a slice would keep the storage of the whole chunk alive.
            self.keys, self.values = (x[..., first:, :].to(self.place, copy=True) for x in (keys, values))
        else:
            if self.keys is None:
                self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
            assert self.values is not None
            self.keys[..., self.past : end, :] = key_states
            self.values[..., self.past : end, :] = value_states
            if _lies_at(self.keys, key_states.device):
                keys, values = self.keys[..., :end, :], self.values[..., :end, :]
            else:
                keys = _after(self.keys[..., : self.past, :], key_states)
                values = _after(self.values[..., : self.past, :], value_states)
        self.past = end
        return keys, values

    def _buffer(self, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:-2], self.length, states.shape[-1], device=self.place)

    def get_seq_length(self, *args: Any) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = _kept(self.past, self.window)
        return kept + query_length, self.past - kept

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before 5.18


def _lies_at(x: Tensor, device: torch.device) -> bool:
    return x.device == device


def _after(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past.to(new.device), new], dim=-2)


def _kept(past: int, window: int | None) -> int:
    """How many of `past` tokens a later one still sees."""
    return past if window is None else min(past, window - 1)


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
    hidden = int(_setting(body, "hidden_size") or 0)
    experts, expert = int(_setting(body, "num_experts_per_tok") or 1), int(_setting(body, "moe_intermediate_size") or 0)
    inner = max(int(_setting(body, "intermediate_size") or 4 * hidden), experts * expert)
    heads = int(_setting(body, "num_attention_heads") or 1)
    head_dim = int(_setting(body, "head_dim") or hidden // heads)
    size = next(body.parameters()).element_size()
    per_token = (3 * inner + 3 * heads * head_dim + 3 * hidden) * size + 4 * hidden
    return max(_LEAST_TOKENS, _ACTIVATION_BYTES // per_token // _LEAST_TOKENS * _LEAST_TOKENS)


def _setting(body: nn.Module, name: str) -> int | None:
    """One number of the configuration; None where it has none, or one for each layer."""
    try:
        value = getattr(seam.config_of(body), name, None)
    except Exception:  # newer versions of transformers refuse to name one of several, with an error of their own
        return None
    return value if isinstance(value, int) else None


def grow(
    body: nn.Module,
    token_ids: Tensor,
    chunk: int,
    start: Sequence[tuple[Tensor, Tensor]] = (),
    start_length: int = 0,
    device: torch.device | str | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
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
    cache, ids = Cache(layers=[*layers]), token_ids.to(next(body.parameters()).device)
    for first in range(start_length, length, chunk):
        piece = ids[first : first + chunk]
        count = piece.numel()
        bounds = torch.tensor([0, count], dtype=torch.int32, device=ids.device)
        groups = (PrefixGroup(0, 1, 0, count, first),) if first else ()
        # What each layer must hand over is known from the shapes, not asked of the layer.
        kept = [[_kept(first, window)] if first else [] for window in windows]
        call = PackedCall(PackedRow((count,), bounds, groups), kept)
        positions = torch.arange(first, first + count, device=ids.device).unsqueeze(0)
        with running(call), seam.using_attention(body, attention_on_row):
            hidden = seam.run_body(body, piece.unsqueeze(0), position_ids=positions, cache=cache)
        missed = sorted(set(range(len(layers))) - call.layers_done)
        if missed:
            raise RuntimeError(f"attention layers {missed} did not read the context's earlier chunks")
    grown = []
    for layer in layers:
        assert layer.keys is not None and layer.values is not None
        grown.append((layer.keys, layer.values))
    return grown, hidden[0, -1].clone()
