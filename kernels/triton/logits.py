"""What the Triton row kernels share: reading logits, writing a gradient, terms without cancellation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from opcd_fast.kernels.reference import Logits

SMALLEST = tl.constexpr(1.1754944e-38)  # smallest normal float32: a probability below it counts as 0
UNSEEN = tl.constexpr(-1.0e38)  # a running maximum before its first finite logit
NO_COLUMN = tl.constexpr(2147483647)
# Of a thread, in kernels that form the terms: two programs of 8 warps on a multiprocessor. Left to itself ptxas takes
# 150 in one of them and in another, with Triton 3.9, so few that it spills.
MOST_REGISTERS = 128


@triton.jit
def load_logits(z_ptr, bias_ptr, columns, n_columns, inner, outer, HAS_BIAS, SOFTCAP, MASKED):
    """Logits / temperature of one block; -inf beyond the last column."""
    if MASKED:
        inside = columns < n_columns
        z = tl.load(z_ptr + columns, mask=inside, other=0.0)
    else:
        z = tl.load(z_ptr + columns)
    z = z.to(tl.float32)
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
def difference_of(z_s, z_t):
    """z_s - z_t, 0 where either is -inf: p or q is 0 there and the callers treat those entries apart."""
    return tl.where((z_s == float("-inf")) | (z_t == float("-inf")), 0.0, z_s - z_t)


@triton.jit
def load_pair(
    z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, columns, n_columns, inner_s, inner_t, outer_s, outer_t,
    HAS_BIAS_S, HAS_BIAS_T, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, MASKED,
):  # fmt: skip
    """One block of both sides, and what they differ by, which with DIFFERENCE is what lies in the teacher's place."""
    z_s = load_logits(z_s_ptr, bias_s_ptr, columns, n_columns, inner_s, outer_s, HAS_BIAS_S, SOFTCAP_S, MASKED)
    z_t = load_logits(z_t_ptr, bias_t_ptr, columns, n_columns, inner_t, outer_t, HAS_BIAS_T, SOFTCAP_T, MASKED)
    if DIFFERENCE:
        difference = z_t
        if MASKED:
            difference = tl.where(columns < n_columns, difference, 0.0)
        z_t = z_s - difference
    else:
        difference = difference_of(z_s, z_t)
    return z_s, z_t, difference


@triton.jit
def accumulate(z, m, d):
    """Online maximum and sum of exponentials, one exponential an element."""
    shrink = tl.exp(-tl.abs(z - m))
    grows = z > m
    d = tl.where(grows, d * shrink + 1.0, d + shrink)
    return tl.where(grows, z, m), d


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


@triton.jit
def gated_terms(p, q, l, gate, rest):
    """rest p psi(l) + gate q psi(-l), rest p and p - q, without cancellation where |l| is small.

    Where one side is -inf, l is wrong, but finite: it does no harm where the other's probability underflows, nor where
    the teacher forbids and the gate is 1.
    """
    square = l * l
    even = 0.5 + square * (1.0 / 24 + square * (1.0 / 720))
    odd = l * (1.0 / 6 + square * (1.0 / 120))  # psi(l) = square (even - odd)
    near = (tl.abs(l) < 0.25) & (q >= SMALLEST)
    excess = tl.where(near, p * (l - square * (even - odd)), p - q)
    share = rest * p
    both = gate * q
    far_terms = l * (share - both) + (gate - rest) * excess
    terms = tl.where(near, square * (even * (share + both) - odd * (share - both)), far_terms)
    return terms, share, excess


@triton.jit
def store_gradient(g_ptr, g, z, columns, n_columns, inverse_outer, SOFTCAP, MASKED):
    """g, of one block, times the softcap's derivative at its logits."""
    if SOFTCAP:
        tanh = z * inverse_outer
        g *= 1.0 - tanh * tanh
    g = g.to(g_ptr.dtype.element_ty)
    if MASKED:
        # Padding lanes hold z = -inf, whose square is not a number; they are not stored.
        tl.store(g_ptr + columns, g, mask=columns < n_columns)
    else:
        tl.store(g_ptr + columns, g)


def check_logits(name: str, z: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Raise ValueError for logits that the kernels cannot read."""
    if z.dtype != dtype or z.stride(1) != 1:
        raise ValueError(f"{name} is {z.dtype} with strides {z.stride()}; expected {dtype} with unit column stride")


class Pair(NamedTuple):
    """Both sides of a divergence as the kernels take them."""

    pointers: tuple[Tensor, ...]  # student's and teacher's z, student's and teacher's bias
    factors: tuple[Tensor, ...]  # both sides'; anything where there are none
    strides: tuple[int, int]
    transforms: tuple[float, ...]  # inner of both, outer of both
    options: dict[str, Any]
    difference: bool

    @classmethod
    def of(cls, student: Logits, teacher: Logits, difference: bool = False) -> Pair:
        """difference: the teacher's are not logits, but by how much the student's are larger; both in float16."""
        sides = {"S": student, "T": teacher}
        for side, name in (("S", "z_s"), ("T", "z_t")):
            check_logits(name, sides[side].z, torch.float16 if difference else torch.float32)
        transforms = [side.inner_and_outer() for side in sides.values()]
        return cls(
            (student.z, teacher.z, *(side.z if side.bias is None else side.bias for side in sides.values())),
            tuple(side.z if side.factors is None else side.factors for side in sides.values()),
            (student.z.stride(0), teacher.z.stride(0)),
            (*(inner for inner, _ in transforms), *(outer for _, outer in transforms)),
            {f"HAS_BIAS_{name}": side.bias is not None for name, side in sides.items()}
            | {f"SOFTCAP_{name}": side.softcap is not None for name, side in sides.items()},
            difference,
        )
