"""The kernels that attention on a packed row is made of, each behind the same few arguments.

Which of them may run where is said in `attention.backends`. Those for CUDA were written against their sources and
documentation; no time of theirs is quoted anywhere. Queries, keys and values are (1, H, N, d); results (N, H_q, d) and
the logsumexp (N, H_q) float32, natural logarithm, of the scores after scale and softcap.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opcd_fast.attention.blocked import blocked_attention
from opcd_fast.attention.rows import PackedRow, from_grid, to_grid, tokens_first

aten = torch.ops.aten

# --- torch's operators, for any of the parts ----------------------------------------------------------------
# (B, H, n, d) -> out (B, H, n, d), logsumexp (B, H, n)


def cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """bias: (B or 1, H or 1, n or 1, m), added to the scores."""
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """On CUDA, not causal."""
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)
    return out, lse[:, :, : query.shape[2]]


def efficient(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """On CUDA; wants as many key heads as query heads, and rows of a bias that begin at multiples of 8 elements."""
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.shape[2])
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, 0.0, causal, scale=scale)
    return out, lse[:, :, : query.shape[2]]  # it comes padded to a multiple of 32


def repeat_heads(x: Tensor, like: Tensor) -> Tensor:
    return x.repeat_interleave(like.shape[1] // x.shape[1], dim=1)


def fold_heads(x: Tensor, like: Tensor) -> Tensor:
    """The heads that share keys as more queries, where no mask tells queries apart: (1, H_kv, n H_q / H_kv, d)."""
    return x.reshape(1, like.shape[1], -1, x.shape[-1])


def computed_in(x: Tensor) -> Tensor:
    """x in the type that the row's own attention computes in.

    On CPUs without bf16 units the half-precision backward is 3-4 times slower than casting (measured), and nothing is
    lost in accuracy. A prefix is never cast.
    """
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x


# --- phase 1: all queries against the prefix, not causal ----------------------------------------------------
# (query, key, value, scale, softcap) -> out, logsumexp


def prefix_flash(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Any:
    out, lse = flash(query, key, value, scale)
    return tokens_first(out), tokens_first(lse)


def prefix_cpu_flash(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Any:
    out, lse = cpu_flash(query, key, value, False, scale)
    return tokens_first(out), tokens_first(lse)


def prefix_efficient(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Any:
    # Folded rather than the prefix repeated.
    out, lse = efficient(fold_heads(query, key), key, value, False, scale)
    return tokens_first(out.reshape(query.shape)), tokens_first(lse.reshape(query.shape[:3]))


def _prefix_of(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, *, package: str, **with_lse: bool
) -> Any:
    function = importlib.import_module(package).flash_attn_func
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse, *_ = function(q=q, k=k, v=v, softmax_scale=scale, causal=False, softcap=softcap or 0.0, **with_lse)
    return out[0], tokens_first(lse[:, :, : query.shape[2]])


prefix_fa4 = functools.partial(_prefix_of, package="flash_attn.cute", return_lse=True)
prefix_fa2 = functools.partial(_prefix_of, package="flash_attn", return_attn_probs=True)


def prefix_flex(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Any:
    out, lse = _flex(query, key, value, scale, softcap, None)
    return tokens_first(out), tokens_first(lse)


def prefix_blocked(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Any:
    return blocked_attention(query, key, value, scale, softcap=softcap)


# --- phase 2: causal inside each sequence of a row ----------------------------------------------------------
# (query, key, value, row, scale, softcap, dropout, with_lse) -> out, logsumexp or None


class Bounds(NamedTuple):
    """Where sequences begin and end among queries and among keys; the ends of both are aligned."""

    cu_q: Tensor  # (B + 1,) int32
    cu_k: Tensor
    longest_q: int
    longest_k: int


Varlen = Callable[..., "tuple[Tensor, Tensor | None]"]


def row_varlen(varlen: Varlen) -> Callable[..., Any]:
    """Phase 2 by a kernel for sequences of any lengths."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float, softcap: float | None,
        dropout: float, with_lse: bool,
    ) -> Any:  # fmt: skip
        bounds = Bounds(row.cu_seqlens, row.cu_seqlens, row.longest, row.longest)
        return varlen(query, key, value, bounds, scale, softcap, None, with_lse)

    return run


def row_on_grid(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float, softcap: float | None,
    dropout: float, with_lse: bool,
) -> Any:  # fmt: skip
    """Sequences padded on the right, torch's kernels for batches. Differentiable without the logsumexp."""
    dtype = query.dtype
    q, k, v = (to_grid(computed_in(x), row) for x in (query, key, value))  # (B, H, T, d)
    if q.is_cuda:
        k, v = repeat_heads(k, q), repeat_heads(v, q)
    if not with_lse:
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        return from_grid(out, row).to(dtype), None
    out, lse = (efficient if q.is_cuda else cpu_flash)(q, k, v, True, scale)
    return from_grid(out, row).to(dtype), from_grid(lse.unsqueeze(-1), row).squeeze(-1)


def row_flex(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float, softcap: float | None,
    dropout: float, with_lse: bool,
) -> Any:  # fmt: skip
    q, k, v = (to_grid(x, row) for x in (query, key, value))
    out, lse = _flex(q, k, v, scale, softcap, _causal_block_mask(row.longest, q.device))
    return from_grid(out, row), from_grid(lse.unsqueeze(-1), row).squeeze(-1)


def row_blocked(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float, softcap: float | None,
    dropout: float, with_lse: bool,
) -> Any:  # fmt: skip
    """One sequence at a time; differentiable, the logsumexp too."""
    pieces = [
        blocked_attention(q, k, v, scale, softcap=softcap, causal=True)
        for q, k, v in zip(*(x.split(list(row.lengths), 2) for x in (query, key, value)), strict=True)
        if q.shape[2]
    ]
    return torch.cat([out for out, _ in pieces]), torch.cat([lse for _, lse in pieces])


# --- sequences of any lengths, causal, with a window --------------------------------------------------------
# (query, key, value, bounds, scale, softcap, window, with_lse) -> out, logsumexp or None


def varlen_torch(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scale: float, softcap: float | None,
    window: int | None, with_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """torch's varlen kernel; queries end where keys end."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    q, k, v = map(tokens_first, (query, key, value))
    options: dict[str, Any] = {}
    if "enable_gqa" in _varlen_parameters():  # without the switch, as in torch 2.11, heads are shared as they come
        options["enable_gqa"] = k.shape[1] != q.shape[1]
    out = varlen_attn(
        q,
        k,
        v,
        *bounds,
        return_aux=AuxRequest(lse=True) if with_lse else None,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    if not with_lse:
        return out, None  # type: ignore[return-value]
    out, lse = out
    # Documented as (N, H), returned as (H, N) by the releases seen so far.
    if lse.shape[0] == q.shape[1] and (lse.shape[0] != lse.shape[1] or _lse_has_heads_first(q.device, q.dtype)):
        lse = lse.transpose(0, 1)
    return out, lse


def _varlen_of(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scale: float, softcap: float | None,
    window: int | None, with_lse: bool, *, package: str, whole: int | None, **ask_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """whole: how the package says that there is no window."""
    function = importlib.import_module(package).flash_attn_varlen_func
    q, k, v = map(tokens_first, (query, key, value))
    out, lse, *_ = function(
        q=q, k=k, v=v, cu_seqlens_q=bounds.cu_q, cu_seqlens_k=bounds.cu_k, max_seqlen_q=bounds.longest_q,
        max_seqlen_k=bounds.longest_k, softmax_scale=scale, causal=True, softcap=softcap or 0.0,
        window_size=(whole, whole) if window is None else (window - 1, 0), **ask_lse,
    )  # fmt: skip
    return out, lse.transpose(0, 1) if with_lse else None


varlen_fa4 = functools.partial(_varlen_of, package="flash_attn.cute", whole=None, return_lse=True)
varlen_fa2 = functools.partial(_varlen_of, package="flash_attn", whole=-1, return_attn_probs=True)


def varlen_ready() -> bool:
    """Whether this torch's varlen_attn takes windows and a scale (2.10 did not)."""
    return {"window_size", "scale"} <= _varlen_parameters()


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@functools.cache
def _lse_has_heads_first(device: torch.device, dtype: torch.dtype) -> bool:
    """How varlen_attn lays out its logsumexp, asked with shapes that cannot be confused (for N = H)."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    x = torch.zeros(3, 2, 16, device=device, dtype=dtype)
    bounds = torch.tensor([0, 3], dtype=torch.int32, device=device)
    _, lse = varlen_attn(x, x, x, bounds, bounds, 3, 3, return_aux=AuxRequest(lse=True), window_size=(-1, 0))
    return lse.shape[0] == 2


# --- flex attention -----------------------------------------------------------------------------------------


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=8)  # one function for each bound: another one would be compiled anew
def _cap(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _flex(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, mask: Any) -> Any:
    """torch's flex_attention on (B, H, n, d): out (B, H, n, d), logsumexp (B, H, n). Compiled only on CUDA, where the
    eager version would hold all scores."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    function: Any = _compiled_flex() if query.is_cuda else flex_attention
    out, aux = function(
        query, key, value, score_mod=None if softcap is None else _cap(softcap), block_mask=mask, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return out, aux.lse


@functools.lru_cache(maxsize=8)
def _causal_block_mask(tokens: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, tokens, tokens, device=device)
