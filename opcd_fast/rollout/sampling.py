"""Drawing a token from logits, and the log-probability it was drawn with."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens (B,) and their float32 log-probabilities (B,), by inverting the cumulative distribution.

    Args:
        logits: (B, V), any float dtype.
        uniform: (B,) float64 in [0, 1), one random number per row.
        temperature: divides the logits; 0 takes the most probable token (log-probability at temperature 1).
        top_p: keep the smallest set of most probable tokens with at least this mass, renormalised.
        vocab_size: ids from here on are never drawn.
    """
    scores = logits.float()
    if vocab_size is not None and vocab_size < scores.shape[-1]:
        scores = scores[:, :vocab_size]
    if temperature not in (0.0, 1.0):
        scores = scores / temperature
    if top_p < 1.0:
        scores = nucleus(scores, top_p)
    logprobs = scores.log_softmax(-1)
    if temperature == 0:
        best = logprobs.max(-1)
        return best.indices, best.values
    # Double precision: the sum of 100,000 float32 probabilities would be off by more than the smallest of them.
    mass = logprobs.exp().to(torch.float64).cumsum(-1)
    # The first token whose cumulative mass is above u: a token of probability 0 is never it.
    tokens = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True).squeeze(1)
    tokens = tokens.clamp_(max=mass.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """(B, V) scores with -inf outside of each row's nucleus (Holtzman et al., 2020); the top token always stays."""
    ordered = scores.sort(-1, descending=True)
    probabilities = ordered.values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    outside = torch.empty_like(before, dtype=torch.bool).scatter_(-1, ordered.indices, before >= top_p)
    return scores.masked_fill(outside, -torch.inf)
