"""The fused losses as flat PyTorch operators, and the autograd functions around them.

An operator takes tensors, scalars and a mask of wanted gradients, and is opaque to torch.compile: no graph break
around a call, and gradients inside it is traced. Which rows count is decided inside, because that depends on values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from opcd_fast.kernels.reference import STATISTICS
from opcd_fast.loss.chunks import (
    NOTHING,
    Side,
    Spec,
    Wanted,
    compute_dtype,
    exactly,
    linear_divergence,
    linear_logprobs,
    logits_divergence,
    placeholder,
    returned_dtype,
    scale_into,
    select_rows,
)
from opcd_fast.loss.inputs import resolve_backend
from opcd_fast.runtime import first_order


# ruff: noqa: UP007, UP045  (the operators' schemas are inferred from these annotations; torch 2.10 reads Optional)
@torch.library.custom_op("opcd_fast::linear_divergence", mutates_args=("dw_into",))
def linear_divergence_op(
    h_s: Tensor,
    w_s: Tensor,
    b_s: Optional[Tensor],
    h_t: Tensor,
    w_t: Tensor,
    b_t: Optional[Tensor],
    token_weights: Optional[Tensor],
    token_ids: Optional[Tensor],
    denominator: Optional[Tensor],
    dw_into: Optional[Tensor],
    wanted: Sequence[bool],
    reduction: str,
    factor: float,
    vocab_size: int,
    workspace_bytes: Optional[int],
    all_statistics: bool,
    numbers: Sequence[float],
    words: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics (6, N), rows repeated (), what dW is still to be multiplied with (), dH, dW, db); a gradient
    that is not wanted is empty, dW is in the compute dtype. The last parameters, from vocab_size on, are
    `Spec.packed()`; its backend and projection may be "auto"."""
    student, teacher = Side(h_s, w_s, b_s), Side(h_t, w_t, b_t)
    dtype = compute_dtype(h_s, w_s, h_t, w_t)
    spec = _resolved(h_s, dtype, vocab_size, workspace_bytes, all_statistics, numbers, words)
    rows = select_rows(token_weights, h_s, dtype, reduction, denominator, factor)
    with exactly(h_s.device):
        repeated, found = linear_divergence(student, teacher, rows, spec, Wanted(*wanted), dw_into, token_ids)
        loss = _reduce(found[0][0], rows.weights, rows.factor, reduction)
    gradients = [h_s.new_empty(0) if gradient is None else gradient for gradient in found[1:]]
    count = h_s.new_full((), repeated, dtype=torch.int64)
    rest = rows.factor if isinstance(rows.factor, Tensor) else h_s.new_ones((), dtype=dtype)
    return loss, found[0], count, rest, gradients[0], gradients[1], gradients[2]


@linear_divergence_op.register_fake
def _(h_s, w_s, b_s, h_t, w_t, b_t, token_weights, token_ids, denominator, dw_into, wanted, reduction, *_):
    dtype, count = compute_dtype(h_s, w_s, h_t, w_t), h_s.shape[0]
    return (
        h_s.new_empty((count,) if reduction == "none" else (), dtype=dtype),
        h_s.new_empty((len(STATISTICS), count), dtype=dtype),
        h_s.new_empty((), dtype=torch.int64),
        h_s.new_empty((), dtype=dtype),
        *_fake(Side(h_s, w_s, b_s), wanted if dw_into is None else (wanted[0], False, wanted[2]), dtype),
    )


@torch.library.custom_op("opcd_fast::linear_logprobs", mutates_args=())
def linear_logprobs_op(
    h: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    token_ids: Tensor,
    upstream: Optional[Tensor],
    wanted: Sequence[bool],
    vocab_size: int,
    workspace_bytes: Optional[int],
    all_statistics: bool,
    numbers: Sequence[float],
    words: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p (N,), dH, dW, db) for sum(upstream * log p); a gradient that is not wanted is empty."""
    dtype = compute_dtype(h, weight)
    spec = _resolved(h, dtype, vocab_size, workspace_bytes, all_statistics, numbers, words)
    counted = token_ids >= 0
    rows = select_rows(counted if upstream is None else torch.where(counted, upstream, 0), h, dtype)
    with exactly(h.device):
        logprobs, *found = linear_logprobs(Side(h, weight, bias), token_ids, rows, spec, Wanted(*wanted))
    gradients = [h.new_empty(0) if gradient is None else gradient for gradient in found]
    return logprobs, gradients[0], gradients[1], gradients[2]


@linear_logprobs_op.register_fake
def _(h, weight, bias, token_ids, upstream, wanted, *_):
    dtype = compute_dtype(h, weight)
    return h.new_empty(h.shape[0], dtype=dtype), *_fake(Side(h, weight, bias), wanted, dtype)


def _resolved(h: Tensor, dtype: torch.dtype, *packed: Any) -> Spec:
    spec = Spec.unpacked(*packed)
    return replace(spec, backend=resolve_backend(spec.backend, h.device, dtype))


def _fake(side: Side, wanted: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    """Gradients as the operators return them."""
    return [
        x.new_empty(x.shape, dtype=dtype if x is side.weight else returned_dtype(x.dtype))
        if want and x is not None
        else side.h.new_empty(0)
        for x, want in zip(side, wanted, strict=True)
    ]


def _reduce(kl: Tensor, weights: Tensor, factor: float | Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return kl.clone()
    # Inactive rows hold kl = 0 and weight 0, so no mask is needed; an infinite kl makes the sum infinite.
    return (kl * weights).sum() * factor


class LinearDivergence(torch.autograd.Function):
    """Forms the gradients in forward, where the logits are; "none" learns its weights in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        h_s: Tensor,
        w_s: Tensor,
        b_s: Tensor | None,
        h_t: Tensor,
        w_t: Tensor,
        b_t: Tensor | None,
        token_weights: Tensor | None,
        token_ids: Tensor | None,
        denominator: Tensor | None,
        dw_into: Tensor | None,
        reduction: str,
        factor: float,
        spec: Spec,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor, Tensor]:
        late = reduction == "none"
        loss, statistics, repeated, rest, dh, dw, db = linear_divergence_op(
            h_s, w_s, b_s, h_t, w_t, b_t, token_weights, token_ids, denominator, dw_into,
            NOTHING if late else wanted, reduction, factor, *spec.packed(),
        )  # fmt: skip
        ctx.late, ctx.spec, ctx.wanted = late, spec, wanted
        ctx.accumulated = w_s if dw_into is not None else None
        ctx.dtypes = (h_s.dtype, w_s.dtype, None if b_s is None else b_s.dtype)
        if late:
            _save(ctx, h_s, w_s, b_s, h_t, w_t, b_t, token_weights, token_ids)
        else:
            ctx.save_for_backward(rest, dh, dw, db)
        ctx.mark_non_differentiable(statistics, repeated)
        ctx.set_materialize_grads(False)
        return loss, statistics, repeated

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if upstream is None:
            return (None,) * 14
        if ctx.late:
            *inputs, token_weights, token_ids = ctx.saved_tensors
            weights = _late_weights(upstream, token_weights)
            _, _, _, rest, *gradients = linear_divergence_op(
                *inputs, weights, token_ids, None, None, ctx.wanted, "sum", 1.0, *ctx.spec.packed()
            )
        else:
            if ctx.accumulated is not None:
                _require_one(upstream)
            rest, *gradients = ctx.saved_tensors
        found: list[Tensor | None] = [None] * 3
        for i, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
            if ctx.wanted[i]:
                of_all = upstream * rest if i == 1 and not ctx.late else upstream
                found[i] = gradient.to(dtype) if ctx.late else scaled(gradient, of_all, dtype)
        if ctx.accumulated is not None:
            found[1] = placeholder(ctx.accumulated)
        return (*found, *(None,) * 11)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """For backward. Autograd cannot keep what was made in inference mode: a copy of it is kept."""
    if not torch.compiler.is_compiling():
        tensors = tuple(x.clone() if x is not None and x.is_inference() else x for x in tensors)
    ctx.save_for_backward(*tensors)


class LinearLogprobs(torch.autograd.Function):
    """Recomputes the logits in backward, which knows the tokens' weights."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, spec: Spec, wanted: Wanted
    ) -> Tensor:
        ctx.spec, ctx.wanted = spec, wanted
        _save(ctx, h, weight, bias, token_ids)
        return linear_logprobs_op(h, weight, bias, token_ids, None, NOTHING, *spec.packed())[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        h, weight, bias, token_ids = ctx.saved_tensors
        _, *found = linear_logprobs_op(h, weight, bias, token_ids, upstream, ctx.wanted, *ctx.spec.packed())
        inputs = zip(found, ctx.wanted, (h, weight, bias), strict=True)
        return (*(gradient.to(x.dtype) if want else None for gradient, want, x in inputs), None, None, None)


class LogitsReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_s, z_t, token_weights, denominator, reduction, factor, spec, wanted):
        late = reduction == "none"
        rows = select_rows(token_weights, z_s, compute_dtype(z_s, z_t), reduction, denominator, factor)
        with exactly(z_s.device):
            kl, gradient = logits_divergence(z_s, z_t, rows, spec, wanted and not late)
        ctx.late, ctx.spec, ctx.dtype = late, spec, z_s.dtype
        _save(ctx, *((z_s, z_t, token_weights) if late and wanted else (gradient,)))
        return _reduce(kl, rows.weights, rows.factor, reduction)

    @staticmethod
    @first_order
    def backward(ctx, upstream):
        gradient: Any
        if ctx.late:
            z_s, z_t, token_weights = ctx.saved_tensors
            rows = select_rows(_late_weights(upstream, token_weights), z_s, compute_dtype(z_s, z_t))
            with exactly(z_s.device):
                _, gradient = logits_divergence(z_s, z_t, rows, ctx.spec, True)
        else:
            gradient = scaled(ctx.saved_tensors[0], upstream, ctx.dtype)
        return (gradient.to(ctx.dtype), *(None,) * 7)


def _late_weights(upstream: Tensor, token_weights: Tensor | None) -> Tensor:
    return upstream if token_weights is None else torch.where(token_weights != 0, upstream, 0)


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """upstream * gradient in this dtype, for a scalar upstream gradient; where that is free, in the gradient itself."""
    if gradient.numel() == 0:
        return gradient
    if torch.compiler.is_compiling():
        return (gradient * upstream.reshape([1] * gradient.ndim)).to(dtype)
    # A graph that is kept may come here again, for what this call found.
    again = torch._C._autograd._get_current_graph_task_keep_graph()
    # On a CPU the usual upstream gradient of 1 is seen for free; on a device looking would synchronise.
    if not upstream.is_cuda and float(upstream) == 1.0:
        return gradient.to(dtype, copy=again)
    out = torch.empty_like(gradient, dtype=dtype) if again or gradient.dtype != dtype else gradient
    return scale_into(gradient, upstream, out)


def _require_one(upstream: Tensor) -> None:
    if float(upstream) != 1.0:
        raise RuntimeError(
            f"the loss was multiplied by {float(upstream)}, but its weight gradient has already been added to "
            "weight.main_grad (accumulate_weight_grad=True); put the factor into denominator= or token_weights=, and "
            "zero the gradients before the next step"
        )
