"""The divergences by name, and their parameters."""

from __future__ import annotations

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl", "topk_reverse_kl")
TAILS = ("none", "renormalize", "bucket")


def check_divergence(divergence: str, beta: float, alpha: float, k: int, tail: str) -> tuple[str, float]:
    """(divergence, its parameter) in the form the kernels know, end points mapped to the plain divergences.

    beta = 0 is the forward and beta = 1 the reverse KL, as in TRL; alpha = 0 takes the skew away.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; expected one of {', '.join(map(repr, DIVERGENCES))}")
    if divergence == "jsd":
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta}; it must be in 0..1 (0: forward KL, 1: reverse KL)")
        if beta in (0, 1):
            return ("reverse_kl" if beta else "forward_kl"), 0.0
        return divergence, float(beta)
    if divergence in ("skew_reverse_kl", "skew_forward_kl"):
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha is {alpha}; it must be in 0..1, 1 excluded (0: no skew)")
        return (divergence, float(alpha)) if alpha else (divergence.removeprefix("skew_"), 0.0)
    if divergence == "topk_reverse_kl":
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}; it must be a positive integer")
        if tail not in TAILS:
            raise ValueError(f"tail is {tail!r}; expected one of {', '.join(map(repr, TAILS))}")
        return divergence, float(k)
    return divergence, 0.0
