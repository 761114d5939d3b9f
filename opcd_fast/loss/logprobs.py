"""Log-probabilities of given tokens from hidden states, differentiable, without the logits of more than a few rows."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from opcd_fast.kernels.reference import logprobs as logprob_rows
from opcd_fast.loss.chunks import (
    NOTHING,
    Side,
    Spec,
    Wanted,
    Weight,
    add_weight_gradient,
    compute_dtype,
    exactly,
    gradient_dtype,
    has_gradient_buffer,
    hidden_gradient,
    make_plan,
    multiprocessors_of,
    operand_dtype,
    pitch_of,
    project,
    refuse_capture,
    sharding,
    take,
)
from opcd_fast.loss.heads import LMHead
from opcd_fast.loss.inputs import as_head, check_finite, check_side, check_temperature, check_workspace, resolve_backend


def fused_linear_logprobs(
    hidden: Tensor,
    head: LMHead | Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """log p(token) of one token per position, differentiable in hidden states, head weight and bias.

    hidden: (..., D). head: `LMHead` or a bare (V, D) weight. token_ids: (...,) integers; a negative id (-100 by
    custom) marks a position that costs nothing, may hold anything and gets 0. temperature divides the logits.
    workspace_bytes and backend as in `fused_linear_reverse_kl`. The logits are recomputed in backward.

    A token of probability 0 has log-probability -inf and gradient 0.

    Returns (...,) float32 (float64 with float64 inputs), natural logarithms.

    Raises ValueError, naming the argument and what would be right.
    """
    head = as_head(head, "head")
    check_side("", hidden, head, hidden.device if isinstance(hidden, Tensor) else torch.device("cpu"))
    leading = hidden.shape[:-1]
    if head.group is not None:
        raise ValueError("head is sharded over a group, which log-probabilities do not support; gather it first")
    integers = isinstance(token_ids, Tensor) and not token_ids.is_floating_point() and token_ids.dtype != torch.bool
    if not integers or token_ids.shape != leading:
        kind = f"{token_ids.dtype} {tuple(token_ids.shape)}" if isinstance(token_ids, Tensor) else type(token_ids)
        raise ValueError(f"token_ids is {kind}; expected integers of shape {tuple(leading)}, one per position")
    h, ids = hidden.reshape(-1, hidden.shape[-1]), token_ids.reshape(-1).to(hidden.device, torch.int64)
    refuse_capture(h.device, "fused_linear_logprobs")
    weight, bias = sharding.whole(head.weight), sharding.whole(head.bias)
    assert weight is not None
    check = os.environ.get("OPCD_CHECK") == "1"
    if check:
        check_finite({"": (h, replace(head, weight=weight, bias=bias))}, ids >= 0)
    # On a device looking would synchronise; there such a token has probability 0.
    if (check or not ids.is_cuda) and not torch.compiler.is_compiling() and bool((ids >= head.valid_size).any()):
        raise ValueError(f"token_ids holds {int(ids.max())}; the head has {head.valid_size} tokens")
    trained = torch.is_grad_enabled()
    wanted = Wanted(
        trained and h.requires_grad, trained and weight.requires_grad,
        trained and bias is not None and bias.requires_grad,
    )  # fmt: skip
    scalars = (
        float(head.scale), head.softcap, check_temperature(temperature), head.valid_size,
        check_workspace(workspace_bytes), backend,
    )  # fmt: skip
    return LinearLogprobs.apply(h, weight, bias, ids, scalars, wanted).reshape(leading)


@torch.library.custom_op("opcd_fast::linear_logprobs", mutates_args=())
def linear_logprobs_op(
    h: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045 (schemas of torch 2.10 are inferred from Optional)
    token_ids: Tensor,
    upstream: Optional[Tensor],  # noqa: UP045
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    scale: float,
    softcap: Optional[float],  # noqa: UP045
    temperature: float,
    vocab_size: int,
    workspace_bytes: Optional[int],  # noqa: UP045
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p (N,), dH, dW, db) for sum(upstream * log p); a gradient that is not wanted is empty."""
    dtype = compute_dtype(h, weight)
    spec = Spec(
        scale, scale, softcap, softcap, temperature, vocab_size, workspace_bytes,
        resolve_backend(backend, h.device, dtype), False,
    )  # fmt: skip
    wanted = Wanted(want_hidden, want_weight, want_bias)
    with exactly(h.device):
        logprobs, *found = _run(h, weight, bias, token_ids, upstream, spec, wanted, dtype)
    gradients = [h.new_empty(0) if gradient is None else gradient for gradient in found]
    return logprobs, gradients[0], gradients[1], gradients[2]


@linear_logprobs_op.register_fake
def _(h, weight, bias, token_ids, upstream, want_hidden, want_weight, want_bias, *_):
    return (
        h.new_empty(h.shape[0], dtype=compute_dtype(h, weight)),
        torch.empty_like(h) if want_hidden else h.new_empty(0),
        torch.empty_like(weight) if want_weight else h.new_empty(0),
        torch.empty_like(bias) if want_bias else h.new_empty(0),
    )


class LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scalars: Any, wanted: Wanted):
        ctx.scalars, ctx.wanted = scalars, wanted
        ctx.save_for_backward(h, weight, bias, ids)
        return linear_logprobs_op(h, weight, bias, ids, None, *NOTHING, *scalars)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor):
        h, weight, bias, ids = ctx.saved_tensors
        _, *gradients = linear_logprobs_op(h, weight, bias, ids, upstream, *ctx.wanted, *ctx.scalars)
        return (*(g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)), None, None, None)


def _run(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    upstream: Tensor | None,
    spec: Spec,
    wanted: Wanted,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The chunk loop of one model: projection, row operation, gradient products."""
    v, device = spec.vocab_size, h.device
    active = _active(token_ids, upstream)
    n = active.shape[0]
    logprobs = torch.zeros(h.shape[0], dtype=dtype, device=device)
    dh = torch.zeros(h.shape, dtype=h.dtype, device=device) if wanted.hidden else None
    dw = torch.zeros(weight.shape, dtype=dtype, device=device) if wanted.weight else None
    db = torch.zeros(weight.shape[0], dtype=dtype, device=device) if wanted.bias else None
    if n > 0:
        side = Side(h, weight[:v])
        row_bias = None if bias is None else bias[:v].to(dtype).contiguous()
        planes = 0 if spec.backend == "triton" else logprob_rows.scratch_planes(spec.softcap_s)
        plan = make_plan(n, [side], v, spec, wanted, planes, multiprocessors_of(device))
        tiles, h_dtype = Weight(side, dtype, plan.tile, spec.backend), operand_dtype(side, dtype)
        logits = torch.empty(plan.logit_rows, pitch_of(v), dtype=dtype, device=device)
        g_buffer = logits
        if has_gradient_buffer(side, dtype, spec, wanted):
            g_buffer = torch.empty(
                plan.gradient_rows, pitch_of(v), dtype=gradient_dtype(side, dtype), device=device
            )
        scratch = torch.empty(planes, plan.block_rows, v, dtype=dtype, device=device)
        run_rows = _row_operation(spec.backend)
        for first in range(0, n, plan.gradient_rows):
            last = min(first + plan.gradient_rows, n)
            h_big = take(h, active, first, last, h_dtype)
            for start in range(first, last, plan.logit_rows):
                stop = min(start + plan.logit_rows, last)
                z = logits[: stop - start, :v]
                project([h_big[start - first : stop - first]], [tiles], [z])
                chosen = active[start:stop]
                statistics = torch.zeros(2, stop - start, dtype=dtype, device=device)
                weights = torch.ones_like(statistics[0]) if upstream is None else upstream[chosen].to(dtype)
                run_rows(
                    z, row_bias, token_ids[chosen], weights, statistics,
                    g_buffer[start - first : stop - first, :v] if any(wanted) else None,
                    scale=spec.scale_s, softcap=spec.softcap_s, temperature=spec.temperature, scratch=scratch,
                )  # fmt: skip
                logprobs[chosen] = statistics[0]
            g = g_buffer[: last - first, :v]
            if dh is not None:
                dh[active[first:last]] = hidden_gradient(g, h_big, tiles).to(dh.dtype)
            if dw is not None:
                add_weight_gradient(dw[:v], g, h_big, tiles)
            if db is not None:
                db[:v].add_(g.sum(dim=0, dtype=db.dtype))
    return (
        logprobs,
        dh,
        None if dw is None else dw.to(weight.dtype),
        None if db is None or bias is None else db.to(bias.dtype),
    )


def _active(token_ids: Tensor, upstream: Tensor | None) -> Tensor:
    """Positions to compute: those with a token and, in backward, with an upstream gradient."""
    counted = token_ids >= 0
    if upstream is not None:
        counted &= upstream != 0
    return counted.nonzero().squeeze(1)


def _row_operation(backend: str) -> Any:
    if backend == "triton":
        from opcd_fast.kernels.triton import logprob_rows as triton_rows

        return triton_rows
    return logprob_rows.logprob_rows
