"""The divergences by name, and their parameters."""

from __future__ import annotations

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl", "topk_reverse_kl")
TAILS = ("none", "renormalize", "bucket")
# What a caller gets who names no parameter.
BETA, ALPHA, K, TAIL = 0.5, 0.1, 256, "none"


def check_divergence(divergence: str, beta: float, alpha: float, k: int, tail: str) -> tuple[str, float]:
    """(divergence, its parameter) in the form the kernels know, end points mapped to the plain divergences.

    beta = 0 is the forward and beta = 1 the reverse KL, as in TRL; alpha = 0 takes the skew away. A parameter that the
    divergence does not have is checked and then not used.

    Raises ValueError for what no divergence could mean.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; expected one of {', '.join(map(repr, DIVERGENCES))}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must be in 0..1 (0: forward KL, 1: reverse KL)")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}; it must be in 0..1, 1 excluded (0: no skew)")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; it must be a positive integer")
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r}; expected one of {', '.join(map(repr, TAILS))}")
    if divergence == "jsd":
        if beta in (0, 1):
            return ("reverse_kl" if beta else "forward_kl"), 0.0
        return divergence, float(beta)
    if divergence in ("skew_reverse_kl", "skew_forward_kl"):
        return (divergence, float(alpha)) if alpha else (divergence.removeprefix("skew_"), 0.0)
    return divergence, float(k) if divergence == "topk_reverse_kl" else 0.0


def unused_parameter(divergence: str, beta: float, alpha: float, k: int, tail: str) -> str | None:
    """The name of a parameter that was set although the divergence does not have it."""
    for owner, name, value, default in (
        ("jsd", "beta", beta, BETA),
        ("skew", "alpha", alpha, ALPHA),
        ("topk", "k", k, K),
        ("topk", "tail", tail, TAIL),
    ):
        if value != default and not divergence.startswith(owner):
            return name
    return None
