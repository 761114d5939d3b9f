"""The exact full-vocabulary losses of on-policy (context) distillation, fused with both lm-heads.

Per token, with p the student, q the teacher and l = log p - log q:

    KL(p || q) = sum_v p_v l_v            dKL/dz_v = p_v (l_v - KL)

Student and teacher hidden states go in, the loss and the gradients of the student's side come out. Logits
exist for a few rows at a time, in float32: rounded to bf16 they would put an error of 5 % (KL 0.3) to 350 %
(KL 3e-5) on the gradient. Needs torch alone; Triton is imported when a CUDA tensor first asks for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opcd_fast.loss import inputs
from opcd_fast.loss.chunks import Spec, Wanted, accumulation_target, compute_dtype, sharding
from opcd_fast.loss.divergences import ALPHA, BETA, DIVERGENCES, GATE, TAIL, K, check_divergence
from opcd_fast.loss.heads import PLAIN, LMHead
from opcd_fast.loss.operators import LinearDivergence, LogitsReverseKL


@dataclass
class LossStats:
    """Per token, detached, float32, in the shape of the hidden states without their last dimension.

    Natural units (nats), of the distributions after temperature. Rows of weight 0 were not computed and hold
    0 in every field.
    """

    token_kl: Tensor  # the value of the divergence that was asked for
    student_entropy: Tensor
    student_logsumexp: Tensor  # of logits / temperature over the valid vocabulary
    teacher_logsumexp: Tensor
    top1_agreement: Tensor  # 1.0 where both models rank the same token first, else 0.0
    gate: Tensor | None = None  # "gated_kl": the forward KL's share, in 0..1; None for other divergences
    rows_repeated: Tensor | None = None  # (), int64: see `repeated`; -1 without differences

    @property
    def projection(self) -> str:
        """What ran: "difference" or "separate". Reading it waits for the device, as `repeated` does."""
        return "separate" if self.rows_repeated is None or int(self.rows_repeated) < 0 else "difference"

    @property
    def repeated(self) -> int:
        """How many rows were computed again in float32, because float16 did not hold their logits well."""
        return 0 if self.rows_repeated is None else max(0, int(self.rows_repeated))


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
    accumulate_weight_grad: bool = False,
    projection: str = "auto",
    token_ids: Tensor | None = None,
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
    workspace_bytes: bound for scratch memory, which does not include the gradients; default 3 GiB on a GPU, on a CPU
        2.5 GiB when the head is trained and else 1 GiB, 1 GiB without a gradient; less where the shapes need less.
    return_stats: also return `LossStats`.
    backend: "triton" (CUDA), "native" (the compiled CPU library), "torch" (any device), or "auto": the first of
        these that can run.
    accumulate_weight_grad: add dW to `student_head.weight.main_grad` (or to a float32 `.grad`) in forward, without
        a buffer of its own, and return none. Needs reduction="sum" or denominator=, a backward with an upstream
        gradient of exactly 1, and no activation checkpointing around the call. The gradient is added when the loss is
        computed, whether or not backward follows.
    projection: how the logits are formed. "separate" multiplies each side with its head, in float32. "difference",
        where both heads are one: the student's logits and their differences to the teacher's, in float16; see below.
        "auto" takes that where it can and where it saves something: on a GPU, from D / 3 rows of non-zero weight on,
        where a copy of the head in float16 takes at most half of the workspace, and not while a CUDA graph is captured.
    token_ids: (...,) integers for differences: the token that was drawn at each position, by whose logit the row is
        shifted; by nothing where there is no such token (-100). They decide over speed, not over what comes out: rows
        whose largest logit, after temperature, is then more than 8 from 0 are computed again in float32.

    Differences need `token_ids`, one tensor as the weight of both heads, and one as their bias, the same scale, no
    softcap, bf16 inputs, weights up to 65,504 in size (looked at once per head) and a divergence other than
    "topk_reverse_kl". They move 18 bytes per logit (16 with a frozen head) where float32 moves 30 (28), and are as
    accurate in the gradients. A row's reverse KL is right to 3e-3 of it, another divergence to 4e-3, logsumexps to 0.02
    and the entropy to 0.01. They synchronise with a device once. On a CPU they are for checking that, and slow.

    A row in which the teacher gives probability 0 to a token that the student gives more has kl = inf and
    gradient 0. With the environment variable OPCD_CHECK=1, NaN or infinite inputs raise an error naming the
    first bad row (costs a pass over the inputs, and a synchronisation on a device).

    Returns the loss, a scalar (or (...,) for "none"), in float32 (float64 with float64 inputs); with
    `return_stats` the pair (loss, LossStats).

    Raises ValueError, naming the argument and what would be right, TypeError for a head that is neither.
    """
    return fused_linear_divergence(
        student_hidden, student_head, teacher_hidden, teacher_head, token_weights=token_weights,
        temperature=temperature, reduction=reduction, denominator=denominator, workspace_bytes=workspace_bytes,
        return_stats=return_stats, backend=backend, accumulate_weight_grad=accumulate_weight_grad,
        projection=projection, token_ids=token_ids,
    )  # fmt: skip


def fused_linear_divergence(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    *,
    divergence: str = "reverse_kl",
    beta: float = BETA,
    alpha: float = ALPHA,
    k: int = K,
    tail: str = TAIL,
    gate: str = GATE,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    return_stats: bool = False,
    backend: str = "auto",
    accumulate_weight_grad: bool = False,
    projection: str = "auto",
    token_ids: Tensor | None = None,
) -> Any:
    """`fused_linear_reverse_kl` for other divergences; p is the student, q the teacher.

    divergence:
        "reverse_kl"       KL(p || q)
        "forward_kl"       KL(q || p)
        "jsd"              beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q; TRL's beta
                           (arXiv 2306.13649): 0 is the forward and 1 the reverse KL
        "skew_reverse_kl"  KL(p || alpha p + (1 - alpha) q)        (arXiv 2402.03898)
        "skew_forward_kl"  KL(q || alpha q + (1 - alpha) p)
        "topk_reverse_kl"  the reverse KL on the student's k most likely tokens; tail="none" sums over them alone,
                           with both models normalised over the whole vocabulary (what the OPCD authors' code
                           minimises with k=256; it can be negative), "renormalize" normalises over them, "bucket"
                           counts all other tokens as one more
        "gated_kl"         (1 - w) KL(p || q) + w KL(q || p), w held constant. gate="kl": w = 1 - exp(-KL(p || q));
                           gate="tv": w = sum |p - q| / 2, a pass more. Near the teacher it is the reverse KL; where the
                           teacher wants what the student never says, where that has no gradient, the forward one. w is
                           1 where KL(p || q) is infinite

    The forward KL and the gated one are infinite, with gradient 0, where the student gives probability 0 to a token
    that the teacher gives more; the JSD and the skewed divergences are always finite. A parameter of another divergence
    is checked and not used. All other arguments, the result and the errors as in `fused_linear_reverse_kl`;
    `LossStats.token_kl` holds the value of the divergence asked for.
    """
    student, teacher = inputs.as_head(student_head, "student_head"), inputs.as_head(teacher_head, "teacher_head")
    leading = inputs.check_pair(student_hidden, student, teacher_hidden, teacher)
    chosen = check_divergence(divergence, {"beta": beta, "alpha": alpha, "k": k, "tail": tail, "gate": gate})
    if DIVERGENCES[chosen.divergence].code is None and student.group is not None:
        raise ValueError(
            f"divergence={divergence!r} needs the whole vocabulary on every rank; gather the head, and leave its "
            "group=None"
        )
    operator_reduction, factor, scalar = inputs.check_reduction(reduction, denominator)
    weights = inputs.flat_weights(token_weights, leading, student_hidden.device)
    ids = None if token_ids is None else inputs.flat_ids(token_ids, leading, student_hidden.device)
    h_s = student_hidden.reshape(-1, student_hidden.shape[-1])
    h_t = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    weight, bias = sharding.whole(student.weight), sharding.whole(student.bias)
    with torch.no_grad():
        weight_t = weight if teacher.weight is student.weight else sharding.whole(teacher.weight)
        bias_t = sharding.whole(teacher.bias)
    assert weight is not None and weight_t is not None
    if os.environ.get("OPCD_CHECK") == "1":
        gathered = {
            "student_": (h_s, replace(student, weight=weight, bias=bias)),
            "teacher_": (h_t, replace(teacher, weight=weight_t, bias=bias_t)),
        }
        _check_on_all_ranks(gathered, weights, student)
    wanted = Wanted.of(torch.is_grad_enabled(), h_s, weight, bias)
    target = None
    if accumulate_weight_grad and wanted.weight:
        dtype = compute_dtype(h_s, weight, h_t, weight_t)
        target = accumulation_target(student.weight, operator_reduction, scalar, dtype)
    workspace_bytes, backend = inputs.check_resources(workspace_bytes, backend)
    spec = Spec(
        student.valid_size, workspace_bytes, backend, return_stats, float(student.scale), float(teacher.scale),
        student.softcap, teacher.softcap, inputs.check_temperature(temperature), *chosen,
        "" if student.group is None else student.group.group_name, inputs.check_projection(projection),
        not torch.compiler.is_compiling(),
    )  # fmt: skip
    loss, statistics, repeated = LinearDivergence.apply(
        h_s, weight, bias, h_t, weight_t.detach(), None if bias_t is None else bias_t.detach(), weights, ids, scalar,
        target, operator_reduction, factor, spec, wanted,
    )  # fmt: skip
    if reduction == "none":
        loss = loss.reshape(leading)
    if not return_stats:
        return loss
    stats = replace(LossStats(*(plane.reshape(leading) for plane in statistics.float())), rows_repeated=repeated)
    return loss, stats if chosen.divergence == "gated_kl" else replace(stats, gate=None)


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
        if not isinstance(logits, Tensor) or logits.dtype not in PLAIN or not logits.ndim or not logits.shape[-1]:
            kind = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"{name} is {kind}; expected (..., V) in float32, bf16, fp16 or float64")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student_logits.shape)}, teacher_logits {tuple(teacher_logits.shape)}; "
            "they must be equal. Slice padded entries off the vocabulary first"
        )
    if student_logits.device != teacher_logits.device:
        raise ValueError(f"student_logits is on {student_logits.device}, teacher_logits on {teacher_logits.device}")
    leading, v = student_logits.shape[:-1], student_logits.shape[-1]
    z_s = student_logits.reshape(-1, v)
    z_t = teacher_logits.detach().reshape(-1, v)
    operator_reduction, factor, scalar = inputs.check_reduction(reduction, denominator)
    weights = inputs.flat_weights(token_weights, leading, z_s.device)
    backend = inputs.resolve_backend("auto", z_s.device, compute_dtype(z_s, z_t))
    spec = Spec(v, backend=backend, temperature=inputs.check_temperature(temperature))
    if os.environ.get("OPCD_CHECK") == "1":
        inputs.check_logits("student_logits", z_s, weights)
        inputs.check_logits("teacher_logits", z_t, weights)
    wanted = torch.is_grad_enabled() and z_s.requires_grad
    loss = LogitsReverseKL.apply(z_s, z_t, weights, scalar, operator_reduction, factor, spec, wanted)
    return loss.reshape(leading) if reduction == "none" else loss


def _check_on_all_ranks(sides: dict[str, tuple[Tensor, LMHead]], weights: Tensor | None, student: LMHead) -> None:
    """A rank that raised alone would leave the others waiting for it."""
    if student.group is None:
        inputs.check_finite(sides, weights)
        return
    error: ValueError | None = None
    try:
        inputs.check_finite(sides, weights)
    except ValueError as found:
        error = found
    sharding.raise_together(error, student.group.group_name, sides["student_"][0].device)
