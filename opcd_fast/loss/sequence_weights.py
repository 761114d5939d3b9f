"""Token weights that turn a sum over tokens into a mean over sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_mean_weights(mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Weights that turn `reduction="sum"` into the mean over sequences of the mean over their tokens.

    Give either mask, (B, T), non-zero at response tokens: returns (B, T); or cu_seqlens, (B + 1,) integer
    offsets of packed sequences: returns (N,), N = cu_seqlens[-1]. float32. Every token of a sequence of
    length n gets 1 / (B' n), B' the number of sequences that have tokens. Without any, all weights are 0.
    """
    if (mask is None) == (cu_seqlens is None):
        raise ValueError("sequence_mean_weights takes exactly one of mask and cu_seqlens")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ValueError(f"mask has shape {getattr(mask, 'shape', None)}; expected a tensor (B, T)")
        chosen = (mask != 0).float()
        lengths = chosen.sum(dim=1)
        sequences = (lengths > 0).sum().clamp(min=1)
        return chosen / (lengths.clamp(min=1) * sequences).unsqueeze(1)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens is {cu_seqlens!r}; expected a tensor of integers (B + 1,)")
    counts = cu_seqlens.long().diff()
    if bool((counts < 0).any()) or cu_seqlens[:1].tolist() != [0]:
        raise ValueError("cu_seqlens must start at 0 and never decrease")
    sequences = (counts > 0).sum().clamp(min=1)
    return torch.repeat_interleave(1.0 / (counts.clamp(min=1) * sequences).float(), counts)
