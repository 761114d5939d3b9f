"""The chunk loop of the fused losses: projections, one row operation, two gradient products.

A flat operation on tensors, scalars and a mask of wanted gradients; no autograd, no modules. Logits exist for
a few rows at a time, in the buffers that workspace.py plans. Two levels: the logits of a few rows, the gradient of
several such chunks, because dW is read and written once for each of the latter, and dH is narrow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opcd_fast.kernels.reference import STATISTICS, logprobs
from opcd_fast.loss.chunks import sharding
from opcd_fast.loss.chunks.buffers import borrowed
from opcd_fast.loss.chunks.differences import LARGEST, largest_in_head, run_differences
from opcd_fast.loss.chunks.gradients import Gradients
from opcd_fast.loss.chunks.products import Weight, operand_dtype, project, scale_, take
from opcd_fast.loss.chunks.row_operations import divergence_rows, scratch_planes
from opcd_fast.loss.chunks.rows import Rows
from opcd_fast.loss.chunks.spec import Spec, Wanted
from opcd_fast.loss.chunks.workspace import (
    Side,
    block_rows,
    compute_dtype,
    gradient_dtype,
    has_gradient_buffer,
    make_plan,
    multiprocessors_of,
    pitch_of,
    returned_dtype,
)

LOGITS_SCRATCH = 1 << 28  # bytes, for logits that exist already
# of (logits of each side, which rows of the call, statistics to write, gradient to write or None, scratch)
RowOperation = Callable[..., None]
Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def linear_divergence(
    student: Side,  # (N, D_s), (V_s, D_s), (V_s,)
    teacher: Side,  # (N, D_t), (V_t, D_t), (V_t,)
    rows: Rows,
    spec: Spec,
    wanted: Wanted,
    dw_into: Tensor | None = None,  # (V_s, D_s) float32: dW is added there and not returned
    token_ids: Tensor | None = None,  # (N,) int64, for differences
) -> tuple[int, Results]:
    """(repeated, (statistics (6, N) of every row, and the gradients (dH, dW, db) of factor * sum(row_weights * D))).

    repeated: how many rows differences did not do for; -1 where the sides were multiplied separately.

    Rows that are not active have statistics 0 and gradient 0 and cost nothing. Gradients come in the dtype of what they
    belong to, but dW, which is large, as it was accumulated: in the compute dtype, and without a factor that is a
    tensor, so that one pass in backward multiplies and rounds it. With a sharded head every rank
    gets all rows' statistics and dH, and dW and db of its slice.
    """
    h_s, v, dtype = student.h, spec.vocab_size, compute_dtype(*student[:2], *teacher[:2])
    statistics = torch.zeros(len(STATISTICS), len(h_s), dtype=dtype, device=h_s.device)
    gradients = Gradients(student, rows, spec, wanted, dtype, dw_into)
    largest = largest_in_head(student, teacher, rows.count, spec, wanted, token_ids is not None)
    # Before anything that a rank might skip: the ranks of a sharded head meet here.
    first_column, columns, multiprocessors = 0, v, multiprocessors_of(h_s.device)
    if spec.group:
        first_column, columns, multiprocessors, largest = sharding.slices(
            spec, wanted, rows.count, h_s.device, multiprocessors, largest
        )
    if spec.projection == "difference" and largest > LARGEST:
        raise ValueError(
            "projection='difference' needs a head whose numbers float16 holds, none above 65,504 in size and the "
            "largest at least 2^-60; use projection='auto'"
        )
    if h_s.is_cuda and h_s.dtype != student.weight.dtype and dtype != torch.float64:
        warnings.warn(
            f"student_hidden is {h_s.dtype} and its head {student.weight.dtype}: exact, but in float32 GEMMs, which "
            "are slow; hand over both in bf16 (head.weight.bfloat16()) for fast ones",
            stacklevel=2,
        )
    sides = [side._replace(h=rows.seen(side.h)[0]).valid(v, dtype) for side in (student, teacher)]
    separate = replace(spec, projection="separate")

    def operate(
        z: list[Tensor], chosen: slice | Tensor, computed: Tensor, gradient: Tensor | None, scratch: Tensor
    ) -> None:
        logits = spec.student(z[0], sides[0].bias), spec.teacher(z[1], sides[1].bias)
        divergence_rows(separate, *logits, rows.weights[chosen], computed, gradient, scratch, first_column)

    repeated, most = -1, None
    if largest <= LARGEST and rows.count:
        assert token_ids is not None
        spec = replace(spec, projection="difference")
        plan = make_plan(rows.count, sides, columns, spec, wanted, sum(scratch_planes(spec)), multiprocessors)
        run_differences(sides, token_ids, rows, spec, wanted, plan, largest, statistics, gradients, first_column)
        rows = replace(rows, active=statistics[0].isfinite().logical_not().nonzero().squeeze(1))
        repeated, most = rows.count, plan.nbytes
    planes = scratch_planes(separate)
    run_chunks(sides, rows, separate, wanted, planes, operate, statistics, gradients, columns, multiprocessors, most)
    (seen,) = rows.seen(statistics.t())
    return repeated, (seen.t(), *gradients.finished())


def linear_logprobs(side: Side, token_ids: Tensor, rows: Rows, spec: Spec, wanted: Wanted) -> Results:
    """log p (N,) of a token (N,) in every active row, and the gradients of sum(row_weights * log p)."""
    v, dtype = spec.vocab_size, compute_dtype(*side[:2])
    statistics = torch.zeros(len(logprobs.STATISTICS), len(side.h), dtype=dtype, device=side.h.device)
    gradients = Gradients(side, rows, spec, wanted, dtype)
    valid, run, planes = side.valid(v, dtype), logprobs.logprob_rows, logprobs.scratch_planes(spec.softcap_s)
    if spec.backend == "triton":
        from opcd_fast.kernels.triton import logprob_rows as run

        planes = 0

    def operate(
        z: list[Tensor], chosen: slice | Tensor, computed: Tensor, gradient: Tensor | None, scratch: Tensor
    ) -> None:
        logits = spec.student(z[0], valid.bias)
        run(logits, token_ids[chosen], rows.weights[chosen], computed, gradient, scratch=scratch)

    multiprocessors = multiprocessors_of(side.h.device)
    run_chunks([valid], rows, spec, wanted, (planes, 0), operate, statistics, gradients, v, multiprocessors)
    return statistics[0], *gradients.finished()


def run_chunks(
    sides: list[Side],  # the student first; the valid rows of their heads
    rows: Rows,
    spec: Spec,
    wanted: Wanted,
    planes: tuple[int, int],  # (block, V) buffers of the row operation: as its scratch, and what it allocates itself
    operate: RowOperation,
    statistics: Tensor,  # (planes, N) written
    gradients: Gradients,
    columns: int,  # of the largest slice of the vocabulary; all of it unless the head is sharded
    multiprocessors: int,
    most: int | None = None,  # bytes of the workspace where the caller of the loss names none
) -> None:
    n, v, dtype, device = rows.count, spec.vocab_size, statistics.dtype, statistics.device
    if n == 0:
        return
    student, pitch = sides[0], pitch_of(v)
    plan = make_plan(n, sides, columns, spec, wanted, sum(planes), multiprocessors, most)
    weights: list[Weight] = []
    for side in sides:
        weights.append(Weight(side, dtype, plan.tile, spec.backend, shares=weights[0] if weights else None))
    types = [operand_dtype(side, dtype) for side in sides]
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((plan.logit_rows, pitch), dtype) for _ in sides]
    if has_gradient_buffer(student, dtype, spec, wanted):
        shapes.append(((plan.gradient_rows, pitch), gradient_dtype(student, dtype)))
    shapes.append(((planes[0], plan.block_rows, v), dtype))

    with borrowed(device, *shapes, keep=spec.keep) as (*cut, scratch):
        logits, g_buffer = cut[: len(sides)], [*cut, cut[0]][len(sides)]  # of its own, or over the student's logits
        for first in range(0, n, plan.gradient_rows):
            last = min(first + plan.gradient_rows, n)
            h_big = take(student.h, rows.active, first, last, types[0])
            for start in range(first, last, plan.logit_rows):
                stop = min(start + plan.logit_rows, last)
                inside, chosen = slice(start - first, stop - first), rows.chosen(start, stop)
                others = zip(sides[1:], types[1:], strict=True)
                hidden = [h_big[inside], *(take(side.h, rows.active, start, stop, kind) for side, kind in others)]
                z = [buffer[: stop - start, :v] for buffer in logits]
                project(hidden, weights, z)
                computed = torch.zeros(len(statistics), stop - start, dtype=dtype, device=device)
                operate(z, chosen, computed, g_buffer[inside, :v] if any(wanted) else None, scratch)
                statistics[:, chosen] = computed
            if any(wanted):
                gradients.add(g_buffer[: last - first, :v], h_big, weights[0], rows.chosen(first, last))


def _readable(logits: Tensor) -> bool:
    return logits.dtype in (torch.float32, torch.bfloat16) and logits.stride(1) == 1


def logits_divergence(
    logits_s: Tensor,  # (N, V)
    logits_t: Tensor,  # (N, V)
    rows: Rows,
    spec: Spec,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Per-row KL (N,) and the gradient (N, V) of factor * sum(row_weights * KL), from logits that exist
    already."""
    total, v = logits_s.shape
    n, device, dtype = rows.count, logits_s.device, compute_dtype(logits_s, logits_t)
    kl = torch.zeros(total, dtype=dtype, device=device)
    gradient = torch.zeros(logits_s.shape, dtype=returned_dtype(logits_s.dtype), device=device) if wanted else None
    if n == 0:
        return kl, gradient
    logits_s, logits_t = rows.seen(logits_s, logits_t)
    all_rows = rows.active is None and not rows.hidden
    if spec.backend == "native" and all_rows and _readable(logits_s) and _readable(logits_t):
        # The library reads bf16 as it is, leaves the logits alone and rounds the gradient once.
        computed = torch.zeros(len(STATISTICS), n, dtype=dtype)
        logits = spec.student(logits_s, None), spec.teacher(logits_t, None)
        divergence_rows(spec, *logits, rows.weights * rows.factor, computed, gradient, None)
        return computed[0], gradient
    planes, _ = scratch_planes(spec)
    chunk = min(n, max(1, LOGITS_SCRATCH // ((planes + 2) * v * dtype.itemsize)))
    buffers = [torch.empty(chunk, pitch_of(v), dtype=dtype, device=device) for _ in range(2)]
    scratch = torch.empty(planes, min(chunk, block_rows(v)), v, dtype=dtype, device=device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        chosen = rows.chosen(start, stop)
        z_s, z_t = (buffer[: stop - start, :v] for buffer in buffers)
        z_s.copy_(logits_s[chosen])
        z_t.copy_(logits_t[chosen])
        computed = torch.zeros(len(STATISTICS), stop - start, dtype=dtype, device=device)
        logits = spec.student(z_s, None), spec.teacher(z_t, None)
        divergence_rows(spec, *logits, rows.weights[chosen], computed, z_s if wanted else None, scratch)
        kl[chosen] = computed[0]
        if gradient is not None:
            gradient[chosen] = scale_(z_s, rows.factor).to(gradient.dtype)
    return rows.seen(kl)[0], gradient
