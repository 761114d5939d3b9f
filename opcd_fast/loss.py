"""The exact full-vocabulary reverse KL of on-policy (context) distillation, fused with both lm-heads.

Per token, with p the student, q the teacher and l = log p - log q:

    KL(p || q) = sum_v p_v l_v            dKL/dz_v = p_v (l_v - KL)

Student and teacher hidden states go in, the loss and the gradients of the student's side come out. Logits
exist for a few rows at a time, in float32: rounded to bf16 they would put an error of 5 % (KL 0.3) to 350 %
(KL 3e-5) on the gradient. Needs torch alone; Triton is imported when a CUDA tensor first asks for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd_fast.chunks import linear_reverse_kl, logits_reverse_kl
from opcd_fast.heads import LMHead
from opcd_fast.loss_inputs import (
    as_head,
    check_finite,
    check_hidden,
    check_logits,
    check_temperature,
    check_workspace,
    resolve_backend,
    weigh_rows,
)
from opcd_fast.workspace import Spec, Wanted, compute_dtype

__all__ = ["LMHead", "LossStats", "fused_linear_reverse_kl", "reverse_kl", "sequence_mean_weights"]


@dataclass
class LossStats:
    """Per token, detached, float32, in the shape of the hidden states without their last dimension.

    Natural units (nats), of the distributions after temperature. Rows of weight 0 were not computed and hold
    0 in every field.
    """

    token_kl: Tensor
    student_entropy: Tensor
    student_logsumexp: Tensor  # of logits / temperature over the valid vocabulary
    teacher_logsumexp: Tensor
    top1_agreement: Tensor  # 1.0 where both models rank the same token first, else 0.0


def fused_linear_reverse_kl(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    *,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Any:
    """Reverse KL between two models' next-token distributions, from their last hidden states.

    student_hidden: (..., D_s). teacher_hidden: (..., D_t), same leading dimensions. The heads are `LMHead`s
    or bare (V, D) weights; their valid vocabulary sizes must agree. Any floating dtypes: each side is
    computed in its own, with float32 logits (float64 if any input is float64). Gradients reach the student's
    hidden states, weight and bias, whichever require them, never the teacher.

    token_weights: (...,) bool or float, constants. Rows of weight 0 cost nothing and may hold anything.
    temperature: divides both models' logits; no T^2 factor.
    reduction: "mean" is sum(w * kl) / denominator; "sum" is sum(w * kl); "none" is the kl of each token in
        the shape (...,), not multiplied by its weight, 0 where that is 0. "none" recomputes the logits in
        backward.
    denominator: for "mean"; default sum(w). Give the global count when accumulating over micro-batches or
        ranks.
    workspace_bytes: bound for scratch memory, which does not include the gradients; default 1 GiB, or 2.5
        GiB when the head is trained, less where the shapes need less.
    return_stats: also return `LossStats`.
    backend: "torch" (any device), "triton" (CUDA), or "auto": triton where it can run, else torch.

    A row in which the teacher gives probability 0 to a token that the student gives more has kl = inf and
    gradient 0. With the environment variable OPCD_CHECK=1, NaN or infinite inputs raise an error naming the
    first bad row (costs a pass over the inputs, and a synchronisation on a device).

    Returns the loss, a scalar (or (...,) for "none"), in float32 (float64 with float64 inputs); with
    `return_stats` the pair (loss, LossStats).
    """
    student, teacher = as_head(student_head, "student_head"), as_head(teacher_head, "teacher_head")
    leading = check_hidden(student_hidden, student, teacher_hidden, teacher)
    if student.valid_size != teacher.valid_size:
        raise ValueError(
            f"student_head has {student.valid_size} valid tokens and teacher_head {teacher.valid_size}; "
            "both models must share one vocabulary. If the larger one is padded, pass "
            "LMHead(weight, vocab_size=<number of real tokens>)"
        )
    h_s = student_hidden.reshape(-1, student_hidden.shape[-1])
    h_t = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    dtype = compute_dtype(h_s, student.weight, h_t, teacher.weight)
    spec = Spec(
        scale_s=float(student.scale),
        scale_t=float(teacher.scale),
        softcap_s=student.softcap,
        softcap_t=teacher.softcap,
        temperature=check_temperature(temperature),
        vocab_size=student.valid_size,
        workspace_bytes=check_workspace(workspace_bytes),
        backend=resolve_backend(backend, h_s.device, dtype),
        all_statistics=return_stats,
    )
    rows = weigh_rows(token_weights, leading, reduction, denominator, dtype, h_s.device)
    if os.environ.get("OPCD_CHECK") == "1":
        check_finite(h_s, student, h_t, teacher, rows.active)

    trained = torch.is_grad_enabled()
    wanted = Wanted(
        hidden=trained and h_s.requires_grad,
        weight=trained and student.weight.requires_grad,
        bias=trained and student.bias is not None and student.bias.requires_grad,
    )
    teacher_bias = None if teacher.bias is None else teacher.bias.detach()
    loss, statistics = _LinearReverseKL.apply(
        h_s,
        student.weight,
        student.bias,
        h_t,
        teacher.weight.detach(),
        teacher_bias,
        rows.weights,
        rows.active,
        rows.factor,
        reduction,
        spec,
        wanted,
    )
    if reduction == "none":
        loss = loss.reshape(leading)
    if not return_stats:
        return loss
    return loss, LossStats(*(plane.reshape(leading) for plane in statistics.float()))


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Reverse KL from logits (..., V) that exist already; the options are those of `fused_linear_reverse_kl`.

    Computed in float32 a few rows at a time whatever the logits' dtype, but what a bf16 logit has lost stays
    lost: prefer `fused_linear_reverse_kl` on hidden states. The gradient has the logits' dtype.
    """
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not logits.is_floating_point() or logits.ndim < 1:
            raise ValueError(f"{name} has dtype {logits.dtype} and {logits.ndim} dimensions; expected floats (..., V)")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)}, teacher_logits "
            f"{tuple(teacher_logits.shape)}; they must be equal. Slice padded entries off the vocabulary "
            "first"
        )
    if student_logits.device != teacher_logits.device:
        raise ValueError(f"student_logits is on {student_logits.device}, teacher_logits on {teacher_logits.device}")
    leading, v = student_logits.shape[:-1], student_logits.shape[-1]
    z_s, z_t = student_logits.reshape(-1, v), teacher_logits.detach().reshape(-1, v)
    dtype = compute_dtype(z_s, z_t)
    backend = resolve_backend("auto", z_s.device, dtype)
    spec = Spec(1.0, 1.0, None, None, check_temperature(temperature), v, None, backend, all_statistics=False)
    rows = weigh_rows(token_weights, leading, reduction, denominator, dtype, z_s.device)
    if os.environ.get("OPCD_CHECK") == "1":
        check_logits("student_logits", z_s, rows.active)
        check_logits("teacher_logits", z_t, rows.active)
    wanted = torch.is_grad_enabled() and z_s.requires_grad
    loss = _LogitsReverseKL.apply(z_s, z_t, rows.weights, rows.active, rows.factor, reduction, spec, wanted)
    return loss.reshape(leading) if reduction == "none" else loss


def sequence_mean_weights(mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Weights that turn `reduction="sum"` into the mean over sequences of the mean over their tokens.

    Give either mask, (B, T), non-zero at response tokens: returns (B, T); or cu_seqlens, (B + 1,) integer
    offsets of packed sequences: returns (N,), N = cu_seqlens[-1]. float32. Every token of a sequence of
    length n gets 1 / (B' n), B' the number of sequences that have tokens. Without any, all weights are 0.
    """
    if (mask is None) == (cu_seqlens is None):
        raise ValueError("sequence_mean_weights takes exactly one of mask and cu_seqlens")
    if mask is not None:
        if mask.ndim != 2:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected (B, T)")
        chosen = (mask != 0).float()
        lengths = chosen.sum(dim=1)
        sequences = (lengths > 0).sum().clamp(min=1)
        return chosen / (lengths.clamp(min=1) * sequences).unsqueeze(1)
    assert cu_seqlens is not None
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; expected integers (B + 1,)"
        )
    counts = cu_seqlens.long().diff()
    if bool((counts < 0).any()) or int(cu_seqlens[0]) != 0:
        raise ValueError("cu_seqlens must start at 0 and never decrease")
    sequences = (counts > 0).sum().clamp(min=1)
    return torch.repeat_interleave(1.0 / (counts.clamp(min=1) * sequences).float(), counts)


class _LinearReverseKL(torch.autograd.Function):
    """Forms the gradients in forward, where the logits are; "none" learns its weights in backward."""

    @staticmethod
    def forward(ctx, h_s, w_s, b_s, h_t, w_t, b_t, weights, active, factor, reduction, spec, wanted):
        late = reduction == "none"
        now = Wanted(False, False, False) if late else wanted
        with torch.autocast(h_s.device.type, enabled=False):
            statistics, *gradients = linear_reverse_kl(h_s, w_s, b_s, h_t, w_t, b_t, weights, active, factor, spec, now)
            kl = statistics[0]
            loss = kl.clone() if late else _weighted_sum(kl, weights) * factor
        ctx.late, ctx.spec, ctx.wanted = late, spec, wanted
        if late and any(wanted):
            ctx.save_for_backward(h_s, w_s, b_s, h_t, w_t, b_t, weights)
        else:
            ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        if ctx.late:
            h_s, w_s, b_s, h_t, w_t, b_t, weights = ctx.saved_tensors
            row_weights = torch.where(weights != 0, upstream.to(weights.dtype), 0)
            active = row_weights.nonzero().squeeze(1)
            with torch.autocast(h_s.device.type, enabled=False):
                _, *gradients = linear_reverse_kl(
                    h_s, w_s, b_s, h_t, w_t, b_t, row_weights, active, 1.0, ctx.spec, ctx.wanted
                )
        else:
            gradients = [_times(g, upstream) for g in ctx.saved_tensors]
        return (*gradients, *(None,) * 9)


class _LogitsReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_s, z_t, weights, active, factor, reduction, spec, wanted):
        late = reduction == "none"
        kl, gradient = logits_reverse_kl(z_s, z_t, weights, active, factor, spec, wanted and not late)
        ctx.late, ctx.spec = late, spec
        if late and wanted:
            ctx.save_for_backward(z_s, z_t, weights)
        else:
            ctx.save_for_backward(gradient)
        return kl.clone() if late else _weighted_sum(kl, weights) * factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.late:
            z_s, z_t, weights = ctx.saved_tensors
            row_weights = torch.where(weights != 0, upstream.to(weights.dtype), 0)
            active = row_weights.nonzero().squeeze(1)
            _, gradient = logits_reverse_kl(z_s, z_t, row_weights, active, 1.0, ctx.spec, True)
        else:
            gradient = _times(ctx.saved_tensors[0], upstream)
        return (gradient, *(None,) * 7)


def _weighted_sum(kl: Tensor, weights: Tensor) -> Tensor:
    # Inactive rows hold kl = 0 and weight 0, so no mask is needed; an infinite kl makes the sum infinite.
    return (kl * weights).sum()


def _times(gradient: Tensor | None, upstream: Tensor) -> Tensor | None:
    # On a CPU the usual upstream gradient of 1 is seen for free; on a device looking would synchronise.
    if gradient is None or (not upstream.is_cuda and float(upstream) == 1.0):
        return gradient
    scaled = torch.empty_like(gradient)
    # In slices through the upstream's dtype: 1/3 rounded to bf16 would scale a whole bf16 gradient wrongly.
    for source, target in zip(gradient.split(4096), scaled.split(4096), strict=True):
        target.copy_(source.to(upstream.dtype) * upstream)
    return scaled
