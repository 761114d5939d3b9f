"""Attention over a union of key sets in one pass (Triton). The twin of `reference.attention.merge_attention`.

One program handles a tile of (token, head) pairs by the whole head size, and reads each element once before it writes
it: the result may lie where the first input is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opcd_fast.kernels.triton import launch_shapes


@triton.jit
def _level(lse_ptr, has_ptr, tokens, heads, inside, stride_n, stride_h, HAS_FLAG: tl.constexpr):
    """A set's logsumexp, -inf where it is empty, and which rows have it."""
    level = tl.load(lse_ptr + tokens * stride_n + heads * stride_h, mask=inside, other=0.0)
    there = inside
    if HAS_FLAG:
        there = inside & (tl.load(has_ptr + tokens, mask=inside, other=0) != 0)
    return tl.where(there, level, float("-inf")), there


@triton.jit
def _merge_attention_kernel(
    a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, sink_ptr, has_a_ptr, has_b_ptr, out_ptr, lse_ptr,
    stride_a_n, stride_a_h, stride_lse_a_n, stride_lse_a_h, stride_b_n, stride_b_h, stride_lse_b_n, stride_lse_b_h,
    stride_out_n, stride_out_h, stride_lse_n, stride_lse_h, n_pairs,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HAS_B: tl.constexpr, HAS_SINK: tl.constexpr,
    HAS_FLAG_A: tl.constexpr, HAS_FLAG_B: tl.constexpr, WRITE_LSE: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pairs = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)  # tokens * stride passes 2^31
    inside = pairs < n_pairs
    tokens = pairs // HEADS
    heads = pairs % HEADS
    level_a, there_a = _level(lse_a_ptr, has_a_ptr, tokens, heads, inside, stride_lse_a_n, stride_lse_a_h, HAS_FLAG_A)
    top = level_a
    if HAS_B:
        level_b, there_b = _level(
            lse_b_ptr, has_b_ptr, tokens, heads, inside, stride_lse_b_n, stride_lse_b_h, HAS_FLAG_B
        )
        top = tl.maximum(top, level_b)
    if HAS_SINK:
        sink = tl.load(sink_ptr + heads, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(level_a - top)
    total = weight_a
    if HAS_B:
        weight_b = tl.exp(level_b - top)
        total += weight_b
    if HAS_SINK:
        total += tl.exp(sink - top)
    divisor = tl.where(total > 0.0, total, 1.0)

    columns = tl.arange(0, BLOCK)[None, :]
    in_width = columns < WIDTH
    a = tl.load(
        a_ptr + (tokens * stride_a_n + heads * stride_a_h)[:, None] + columns,
        mask=there_a[:, None] & in_width, other=0.0,
    ).to(tl.float32)  # fmt: skip
    merged = a * (weight_a / divisor)[:, None]
    if HAS_B:
        b = tl.load(
            b_ptr + (tokens * stride_b_n + heads * stride_b_h)[:, None] + columns,
            mask=there_b[:, None] & in_width, other=0.0,
        ).to(tl.float32)  # fmt: skip
        merged += b * (weight_b / divisor)[:, None]
    tl.store(
        out_ptr + (tokens * stride_out_n + heads * stride_out_h)[:, None] + columns,
        merged.to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_width,
    )  # fmt: skip
    if WRITE_LSE:
        lse = tl.where(total > 0.0, top + tl.log(divisor), float("-inf"))
        tl.store(lse_ptr + tokens * stride_lse_n + heads * stride_lse_h, lse, mask=inside)


def launch_shape(width: int) -> tuple[int, int, int]:
    """(PAIRS, BLOCK, warps) for heads of this size."""
    tile, warps = launch_shapes.launch_shape("merge_attention", width)
    block = triton.next_power_of_2(width)
    return max(1, tile // block), block, warps


def merge_attention(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor | None = None,
    lse_b: Tensor | None = None,
    *,
    sink: Tensor | None = None,
    has_keys_a: Tensor | None = None,
    has_keys_b: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Launch one program per tile. Arguments as in `reference.attention.merge_attention`; no gradient, no float64.

    Only the last dimension of outputs must have stride 1; what has not is copied. Raises ValueError for a logsumexp
    that is not float32, and for out that does not have stride 1.
    """
    tokens, heads, width = out_a.shape
    result = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device) if out is None else out
    for name, x in (("lse_a", lse_a), ("lse_b", lse_b), ("lse", lse)):
        if x is not None and x.dtype != torch.float32:
            raise ValueError(f"{name} is {x.dtype}; expected float32")
    if result.stride(-1) != 1 and width > 1:
        raise ValueError(f"out has strides {result.stride()}; expected unit stride in the last dimension")
    if tokens == 0:
        return result
    two = out_b is not None and lse_b is not None
    first = _unit(out_a)
    second, level_b = (_unit(out_b), lse_b) if out_b is not None and lse_b is not None else (first, lse_a)
    levels = lse_a if lse is None else lse
    flags = [lse_a if has is None else has.to(torch.int8) for has in (has_keys_a, has_keys_b)]
    pairs, block, warps = launch_shape(width)
    _merge_attention_kernel[(triton.cdiv(tokens * heads, pairs),)](
        first, lse_a, second, level_b, lse_a if sink is None else sink.contiguous(), *flags, result, levels,
        *first.stride()[:2], *lse_a.stride(), *second.stride()[:2], *level_b.stride(),
        *result.stride()[:2], *levels.stride(), tokens * heads,
        HEADS=heads, WIDTH=width, HAS_B=two, HAS_SINK=sink is not None,
        HAS_FLAG_A=has_keys_a is not None, HAS_FLAG_B=two and has_keys_b is not None, WRITE_LSE=lse is not None,
        PAIRS=pairs, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return result


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
