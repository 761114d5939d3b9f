"""Drawing a token from logits, and the log-probability it was drawn with."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # ids whose masses are added up before single ones are looked at
BYTES_PER_LOGIT = 32  # the model's logits, float32 scores, and what sorting them for top_p takes


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens (B,) and their float32 log-probabilities (B,), by inverting the cumulative distribution.

    First the block of BLOCK ids in which the cumulative mass passes the random number, then the id in that block.
    Masses are float32; the sums of blocks, and the masses in one block, are added up in float64: 100,000 float32 masses
    one after the other would be off by more than the smallest of them.

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
    count = scores.shape[-1]
    top = scores.max(-1, keepdim=True)
    mass = scores.new_empty(len(scores), -(-count // BLOCK) * BLOCK)
    torch.sub(scores, top.values, out=mass[:, :count]).exp_()
    mass[:, count:] = 0.0
    blocks = mass.unflatten(1, (-1, BLOCK))
    ends = blocks.sum(-1).double().cumsum(-1)  # (B, blocks)
    total = ends[:, -1:]
    if temperature == 0:
        tokens = top.indices
    else:
        # The first whose cumulative mass is above the goal: one of mass 0 is never it.
        goal = uniform[:, None] * total
        block = torch.searchsorted(ends, goal, right=True).clamp_(max=ends.shape[1] - 1)
        end = ends.gather(1, block)
        start = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
        inside = blocks.take_along_dim(block[:, :, None], 1).squeeze(1).double().cumsum(-1)  # (B, BLOCK)
        share = (goal - start) / (end - start)  # of its block, below 1; its sum in float64 differs by rounding
        place = torch.searchsorted(inside, share * inside[:, -1:], right=True).clamp_(max=BLOCK - 1)
        tokens = (block * BLOCK + place).clamp_(max=count - 1)
    logprobs = scores.gather(1, tokens).sub_(top.values).double().sub_(total.log())
    return tokens.squeeze(1), logprobs.squeeze(1).float()


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """(B, V) scores with -inf outside of each row's nucleus (Holtzman et al., 2020); the top token always stays."""
    ordered = scores.sort(-1, descending=True)
    mass = ordered.values.softmax(-1)
    before = mass.cumsum(-1).sub_(mass)
    del mass
    outside = torch.empty_like(before, dtype=torch.bool).scatter_(-1, ordered.indices, before >= top_p)
    return scores.masked_fill(outside, -torch.inf)
