"""The path `mask`: sequences packed in one row, the model's own attention, and a mask that says who sees what.

For models that take their positions from `position_ids` alone but whose attention cannot be replaced (Falcon), for
devices without packed attention, and for models set to flex_attention. The contexts' keys lie in front of the row
once each. On dense kernels every token pays for all keys of the row, of other sequences too, which `merge` and `pad`
do not: attention costs N (P + N) for N tokens after P context tokens. With flex_attention the mask is a BlockMask, and
blocks that nobody sees are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from opcd_fast import transformers_seam as seam
from opcd_fast.packed_row import PackedRow
from opcd_fast.prefix import SharedPrefix, cache_of

MASK_BYTES = 2**30
"""Most bytes of one mask in the model's dtype, which is how dense kernels read it."""


class _Tokens(NamedTuple):
    """Which sequence or prefix tokens belong to, and where they are in it."""

    owner: Tensor  # (n,) sequence; -1 - i for keys of prefix i
    position: Tensor  # (n,) counted from the start of the context


class CountedLayer(seam.FrozenLayer):
    """Says whether its prefixes were asked for."""

    read = False

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.read = True
        return super().update(*args, **kwargs)


def mask_forward(
    body: nn.Module, prefixes: Mapping[int, SharedPrefix], input_ids: Tensor, row: PackedRow, index: Sequence[int]
) -> Tensor:
    """Packed ids (N,) after their prefixes -> (N, D), with the model's own attention under an explicit mask.

    prefixes: by context, at least those that `index` (B,) names. Raises ValueError where a mask would be larger
    than `MASK_BYTES`, RuntimeError if a layer did not read its prefix.
    """
    contexts = sorted(set(index))
    used = [prefixes[context] for context in contexts]
    device = input_ids.device
    starts = torch.tensor([len(prefixes[context]) for context in index], device=device)
    queries = _Tokens(row.sequence_of_token, row.offset_of_token + starts[row.sequence_of_token])
    which = torch.tensor([contexts.index(context) for context in index], device=device)
    cache, counts = _counted(used)
    masks = _masks(body, queries, which[row.sequence_of_token], used, counts)
    hidden = seam.run_body(
        body, input_ids.unsqueeze(0), position_ids=queries.position.unsqueeze(0), attention_mask=masks, cache=cache
    )
    missed = [] if cache is None else [i for i, layer in enumerate(cache.layers) if not layer.read and counts[i]]
    if missed:
        raise RuntimeError(f"attention layers {missed} did not read the context; use path='concat'")
    return hidden[0]


def _counted(used: Sequence[SharedPrefix]) -> tuple[Any, list[list[int] | None]]:
    """The cache of `prefix.cache_of` with layers that count, and how many keys of each prefix each layer holds."""
    plain, counts = cache_of(used)
    if plain is None or counts is None:
        return None, []
    return Cache(layers=[CountedLayer(layer.stream, layer.index) for layer in plain.layers]), counts


def _masks(
    body: nn.Module, queries: _Tokens, which: Tensor, used: Sequence[SharedPrefix], counts: list[list[int] | None]
) -> Any:
    """What the model takes as its attention mask: one for all layers, or one for each type of layer by name."""
    config = seam.config_of(body)
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    types = list(getattr(config, "layer_types", None) or [])
    if len(set(types)) < 2:
        return _mask(body, queries, which, used, counts[0] if counts else None, windows[0])
    masks = {}
    for kind in sorted(set(types)):
        # The first layers of each type are those that hold keys; others read theirs.
        layer = types.index(kind)
        masks[kind] = _mask(body, queries, which, used, counts[layer] if counts else None, windows[layer])
    return masks


def _mask(
    body: nn.Module,
    queries: _Tokens,
    which: Tensor,
    used: Sequence[SharedPrefix],
    counts: list[int] | None,
    window: int | None,
) -> Any:
    """Of one type of layer, where `counts` of each prefix's last keys lie in front: (1, 1, N, K), or a BlockMask."""
    config, dtype, device = seam.config_of(body), next(body.parameters()).dtype, queries.owner.device
    owners, positions = [], []
    for number, (prefix, count) in enumerate(zip(used, counts or (), strict=False)):
        owners.append(torch.full((count,), -1 - number, device=device))
        positions.append(torch.arange(len(prefix) - count, len(prefix), device=device))
    keys = _Tokens(torch.cat([*owners, queries.owner]), torch.cat([*positions, queries.position]))
    n, k = queries.owner.numel(), keys.owner.numel()
    size = n * k * torch.empty((), dtype=dtype).element_size()
    if size > MASK_BYTES:
        raise ValueError(
            f"input_ids: {n} tokens that see {k} keys need an attention mask of {size / 2**30:.1f} GiB, more than "
            f"{MASK_BYTES / 2**30:.1f}; score fewer sequences at a time, or use path='pad'"
        )

    def sees(batch: Any, head: Any, q: Tensor, key: Tensor) -> Tensor:
        # Comparisons alone: a table of distances would be eight times as large as the mask.
        owner, place, own_place = keys.owner[key], keys.position[key], queries.position[q]
        seen = ((owner == queries.owner[q]) | (owner == -1 - which[q])) & (place <= own_place)
        return seen if window is None else seen & (place > own_place - window)

    if config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, 1, 1, n, k, device=device)
    seen = sees(None, None, torch.arange(n, device=device).unsqueeze(1), torch.arange(k, device=device).unsqueeze(0))
    if config._attn_implementation == "eager":  # which adds what it is given, True as 1
        nothing = torch.zeros((), dtype=dtype, device=device)
        return torch.where(seen, nothing, torch.finfo(dtype).min)[None, None]
    return seen[None, None]
