"""The sampler's log-probabilities against the trainer's: how far apart they are, and weights that make up for it.

p is the student as the trainer computes it, q the distribution that the answers were drawn from. They differ where the
sampler has older weights, fewer bits or another order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opcd_fast.loss.chunks import sharding
from opcd_fast.loss.heads import LMHead

ROWS_AT_ONCE = 4096


@torch.no_grad()
def logits_of(hidden: Tensor, head: LMHead, token_ids: Tensor) -> Tensor:
    """(N,) float32: one logit per row, from that token's row of the head; no product over the vocabulary.

    hidden: (N, D). token_ids: (N,) below the head's valid size. The head is whole, not one rank's slice of it.
    """
    weight, bias = sharding.whole(head.weight), sharding.whole(head.bias)
    assert weight is not None
    parts = []
    for h, ids in zip(hidden.detach().split(ROWS_AT_ONCE), token_ids.split(ROWS_AT_ONCE)):
        logit = (h.float() * weight[ids].float()).sum(-1)
        parts.append(logit if bias is None else logit + bias[ids].float())
    logits = head.scale * torch.cat(parts)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def trainer_logprobs(hidden: Tensor, head: LMHead, token_ids: Tensor, logsumexp: Tensor, temperature: float) -> Tensor:
    """(N,) float32 log p of the drawn tokens, z / T - logsumexp(z / T), the second part from the loss's statistics."""
    return logits_of(hidden, head, token_ids) / temperature - logsumexp


@dataclass
class Drift:
    """Sums over drawn tokens of what is said about p and q; add them up over micro-batches."""

    tokens: int = 0
    distance: float = 0.0
    kl: float = 0.0
    factors: float | None = None

    def add(self, logprobs: Tensor, behaviour: Tensor, factors: Tensor | None = None) -> None:
        """logprobs, behaviour: (N,) log p and log q of the same tokens; tokens whose log q is NaN, which somebody else
        wrote, do not count. factors: (N,) importance weights, if used."""
        ratio = (logprobs - behaviour).double()[~behaviour.isnan()]
        self.tokens += ratio.numel()
        self.distance += float(ratio.abs().sum())
        self.kl += float((ratio.expm1() - ratio).sum())
        if factors is not None:
            self.factors = (self.factors or 0.0) + float(factors.double().sum())

    @classmethod
    def total(cls, parts: Sequence[Drift]) -> Drift:
        """The sums over all ranks' tokens."""
        factors = [part.factors for part in parts if part.factors is not None]
        return cls(
            sum(part.tokens for part in parts),
            sum(part.distance for part in parts),
            sum(part.kl for part in parts),
            sum(factors) if factors else None,
        )

    def record(self) -> dict[str, float]:
        """`sampler_distance`: mean |log p - log q|. `sampler_kl`: KL(q || p) per token, nats, estimated without bias as
        the mean of r - 1 - log r with r = p / q (http://joschu.net/blog/kl-approx.html). `importance_weight`: mean
        factor, where there are. Nothing without tokens."""
        if not self.tokens:
            return {}
        found = {"sampler_distance": self.distance / self.tokens, "sampler_kl": self.kl / self.tokens}
        return found if self.factors is None else {**found, "importance_weight": self.factors / self.tokens}


def importance_weights(logprobs: Tensor, behaviour: Tensor, cu_seqlens: Tensor, correction: str, clip: float) -> Tensor:
    """(N,) float32 factors for the tokens' weights, constants.

    logprobs, behaviour: (N,) log p and log q of the drawn tokens; cu_seqlens: (B + 1,) where answers begin and end.
    With r_t = p_t / q_t, in the answer that holds token t:

        "sequence"   min(clip, prod_s r_s)         over the whole answer
        "token"      min(clip, prod_{s<t} r_s)     over what comes before the token

    A token's term is the KL over the whole vocabulary at its position. That does not depend on the token drawn there,
    so r_t has no place in its weight: only the way to the position does. Without the bound, "sequence" makes any
    function of an answer right in expectation, and "token" any sum over tokens, with less variance; for the mean over
    an answer's tokens "token" is right where lengths do not depend on the sampler. The bound trades variance for bias
    (truncated importance sampling, E. L. Ionides, 2008).
    """
    ratio = (logprobs.detach().float() - behaviour.float()).double()
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    total = torch.cat([ratio.new_zeros(1), ratio.cumsum(0)])  # over all answers: (N + 1,)
    lengths = ends - starts
    if correction == "sequence":
        log_weight = (total[ends] - total[starts]).repeat_interleave(lengths)
    else:
        log_weight = total[:-1] - total[starts].repeat_interleave(lengths)
    return log_weight.exp().clamp(max=clip).float()
