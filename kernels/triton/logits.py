"""What the Triton row kernels share: reading a block of logits, and the terms of a divergence without cancellation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST = tl.constexpr(1.1754944e-38)  # smallest normal float32: a probability below it counts as 0
UNSEEN = tl.constexpr(-1.0e38)  # a running maximum before its first finite logit
NO_COLUMN = tl.constexpr(2147483647)


@triton.jit
def load_logits(z_ptr, bias_ptr, columns, n_columns, inner, outer, HAS_BIAS, SOFTCAP, MASKED):
    """Logits / temperature of one block; -inf beyond the last column."""
    if MASKED:
        inside = columns < n_columns
        z = tl.load(z_ptr + columns, mask=inside, other=0.0)
    else:
        z = tl.load(z_ptr + columns)
    if HAS_BIAS:
        if MASKED:
            z += tl.load(bias_ptr + columns, mask=inside, other=0.0)
        else:
            z += tl.load(bias_ptr + columns)
    z *= inner
    if SOFTCAP:
        # tanh; saturates to +-1 without overflow
        z = (1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0)) * outer
    if MASKED:
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def accumulate(z, m, d):
    """Online maximum and sum of exponentials, one exponential an element."""
    shrink = tl.exp(-tl.abs(z - m))
    grows = z > m
    d = tl.where(grows, d * shrink + 1.0, d + shrink)
    return tl.where(grows, z, m), d


@triton.jit
def difference_of(z_s, z_t):
    """z_s - z_t, 0 where either is -inf: p or q is 0 there and the callers treat those entries apart."""
    return tl.where((z_s == float("-inf")) | (z_t == float("-inf")), 0.0, z_s - z_t)


@triton.jit
def psi_terms(p, other, l):
    """p (exp(-l) - 1 + l) = other - p + p l for other = p exp(-l): >= 0, without cancellation where |l| is small."""
    series = l * l * (0.5 + l * (-1.0 / 6 + l * (1.0 / 24 + l * (-1.0 / 120 + l * (1.0 / 720)))))
    return tl.where(tl.abs(l) < 0.25, p * series, other - p + p * l)


@triton.jit
def expm1(x):
    """exp(x) - 1 to a relative error of 1e-6."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720))))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0)


def check_logits(name: str, z: Tensor) -> None:
    """Raise ValueError for logits that the kernels cannot read."""
    if z.dtype != torch.float32 or z.stride(1) != 1:
        raise ValueError(f"{name} is {z.dtype} with strides {z.stride()}; expected float32 with unit column stride")


def inner_and_outer(scale: float, softcap: float | None, temperature: float) -> tuple[float, float]:
    """logits / temperature = inner * x, or outer * tanh(inner * x) with a softcap."""
    return (scale / temperature, 1.0) if softcap is None else (scale / softcap, softcap / temperature)
