"""The fused losses as flat PyTorch operators, and the autograd functions around them.

An operator takes tensors, scalars and a mask of wanted gradients, and is opaque to torch.compile: no graph break
around a call, and gradients inside it is traced. Which rows count is decided inside, because that depends on values.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any, Optional

import torch
from torch import Tensor

from opcd_fast.kernels.reference import STATISTICS
from opcd_fast.loss.chunks import (
    NOTHING,
    Spec,
    Wanted,
    compute_dtype,
    exactly,
    linear_divergence,
    logits_divergence,
    placeholder,
    returned_dtype,
    scale_into,
    select_rows,
)
from opcd_fast.loss.inputs import resolve_backend


# ruff: noqa: UP007, UP045  (the operator's schema is inferred from these annotations; torch 2.10 reads Optional)
@torch.library.custom_op("opcd_fast::linear_divergence", mutates_args=("dw_into",))
def linear_divergence_op(
    h_s: Tensor,
    w_s: Tensor,
    b_s: Optional[Tensor],
    h_t: Tensor,
    w_t: Tensor,
    b_t: Optional[Tensor],
    token_weights: Optional[Tensor],
    denominator: Optional[Tensor],
    dw_into: Optional[Tensor],
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    reduction: str,
    factor: float,
    scale_s: float,
    scale_t: float,
    softcap_s: Optional[float],
    softcap_t: Optional[float],
    temperature: float,
    vocab_size: int,
    workspace_bytes: Optional[int],
    backend: str,
    all_statistics: bool,
    divergence: str,
    parameter: float,
    tail: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics (5, N), dH, dW, db); a gradient that is not wanted is empty. The last parameters, from
    scale_s on, are the fields of `Spec` in order; backend may be "auto"."""
    dtype = compute_dtype(h_s, w_s, h_t, w_t)
    spec = Spec(
        scale_s, scale_t, softcap_s, softcap_t, temperature, vocab_size, workspace_bytes,
        resolve_backend(backend, h_s.device, dtype), all_statistics, divergence, parameter, tail, group,
    )  # fmt: skip
    rows = select_rows(token_weights, h_s.shape[0], reduction, denominator, factor, dtype, h_s.device)
    with exactly(h_s.device):
        wanted = Wanted(want_hidden, want_weight, want_bias)
        statistics, dh, dw, db = linear_divergence(h_s, w_s, b_s, h_t, w_t, b_t, rows, spec, wanted, dw_into)
        loss = _reduce(statistics[0], rows.weights, rows.factor, reduction)
    gradients = [h_s.new_empty(0) if gradient is None else gradient for gradient in (dh, dw, db)]
    return loss, statistics, gradients[0], gradients[1], gradients[2]


@linear_divergence_op.register_fake
def _(
    h_s, w_s, b_s, h_t, w_t, b_t, token_weights, denominator, dw_into, want_hidden, want_weight, want_bias, reduction,
    *_,
):  # fmt: skip
    dtype = compute_dtype(h_s, w_s, h_t, w_t)
    count = h_s.shape[0]
    loss = h_s.new_empty((count,) if reduction == "none" else (), dtype=dtype)
    return (
        loss,
        h_s.new_empty((len(STATISTICS), count), dtype=dtype),
        _like(h_s) if want_hidden else h_s.new_empty(0),
        _like(w_s) if want_weight and dw_into is None else h_s.new_empty(0),
        _like(b_s) if want_bias else h_s.new_empty(0),
    )


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape, dtype=returned_dtype(tensor.dtype))


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
        denominator: Tensor | None,
        dw_into: Tensor | None,
        reduction: str,
        factor: float,
        spec: Spec,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor]:
        late = reduction == "none"
        loss, statistics, dh, dw, db = linear_divergence_op(
            h_s, w_s, b_s, h_t, w_t, b_t, token_weights, denominator, dw_into,
            *(NOTHING if late else wanted), reduction, factor, *astuple(spec),
        )  # fmt: skip
        ctx.late, ctx.spec, ctx.wanted = late, spec, wanted
        ctx.accumulated = w_s if dw_into is not None else None
        ctx.dtypes = (h_s.dtype, w_s.dtype, None if b_s is None else b_s.dtype)
        if late:
            ctx.save_for_backward(h_s, w_s, b_s, h_t, w_t, b_t, token_weights)
        else:
            ctx.save_for_backward(dh, dw, db)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return loss, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Any, ...]:
        if upstream is None:
            return (None,) * 13
        if ctx.late:
            h_s, w_s, b_s, h_t, w_t, b_t, token_weights = ctx.saved_tensors
            weights = upstream if token_weights is None else torch.where(token_weights != 0, upstream, 0)
            _, _, *gradients = linear_divergence_op(
                h_s, w_s, b_s, h_t, w_t, b_t, weights, None, None, *ctx.wanted, "sum", 1.0, *astuple(ctx.spec)
            )
        else:
            if ctx.accumulated is not None:
                _require_one(upstream)
            gradients = ctx.saved_tensors
        found: list[Tensor | None] = [None] * 3
        for i, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
            if ctx.wanted[i]:
                found[i] = gradient.to(dtype) if ctx.late else scaled(gradient, upstream, dtype)
        if ctx.accumulated is not None:
            found[1] = placeholder(ctx.accumulated)
        return (*found, *(None,) * 10)


class LogitsReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_s, z_t, token_weights, denominator, reduction, factor, spec, wanted):
        late = reduction == "none"
        rows = select_rows(
            token_weights, z_s.shape[0], reduction, denominator, factor, compute_dtype(z_s, z_t), z_s.device
        )
        with exactly(z_s.device):
            kl, gradient = logits_divergence(z_s, z_t, rows, spec, wanted and not late)
        ctx.late, ctx.spec, ctx.dtype = late, spec, z_s.dtype
        if late and wanted:
            ctx.save_for_backward(z_s, z_t, token_weights)
        else:
            ctx.save_for_backward(gradient)
        return _reduce(kl, rows.weights, rows.factor, reduction)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        gradient: Any
        if ctx.late:
            z_s, z_t, token_weights = ctx.saved_tensors
            weights = upstream if token_weights is None else torch.where(token_weights != 0, upstream, 0)
            rows = select_rows(weights, z_s.shape[0], "sum", None, 1.0, compute_dtype(z_s, z_t), z_s.device)
            with exactly(z_s.device):
                _, gradient = logits_divergence(z_s, z_t, rows, ctx.spec, True)
        else:
            gradient = scaled(ctx.saved_tensors[0], upstream, ctx.dtype)
        return (gradient.to(ctx.dtype), *(None,) * 7)


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
