"""The chunk loop of the fused divergences: two projections, one row operation, two gradient products.

A flat operation on tensors, scalars and a mask of wanted gradients; no autograd, no modules. Logits exist for
a few rows at a time, in the buffers that workspace.py plans. Two levels: the logits of a few rows, the gradient of
several such chunks, because dW is read and written once for each of the latter, and dH is narrow.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from opcd_fast.kernels.reference import reverse_kl as reference
from opcd_fast.loss.chunks import sharding
from opcd_fast.loss.chunks.products import (
    Weight,
    add_weight_gradient,
    hidden_gradient,
    operand_dtype,
    project,
    scale_into,
    take,
)
from opcd_fast.loss.chunks.row_operations import row_operation
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


def linear_divergence(
    h_s: Tensor,  # (N, D_s)
    w_s: Tensor,  # (V_s, D_s)
    b_s: Tensor | None,  # (V_s,)
    h_t: Tensor,  # (N, D_t)
    w_t: Tensor,  # (V_t, D_t)
    b_t: Tensor | None,  # (V_t,)
    rows: Rows,  # its factor multiplies the gradients after their last GEMM, so that G keeps its range
    spec: Spec,
    wanted: Wanted,
    dw_into: Tensor | None = None,  # (V_s, D_s) float32: dW is added there and not returned
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Statistics (5, N) of every row and the gradients of factor * sum(row_weights * KL).

    Rows that are not active have statistics 0 and gradient 0 and cost nothing. Gradients come in the dtype of
    what they belong to; dW is accumulated in the compute dtype and rounded once. With a sharded head every rank
    gets all rows' statistics and dH, and dW and db of its slice.
    """
    total, v = h_s.shape[0], spec.vocab_size
    n = total if rows.active is None else rows.active.shape[0]
    dtype, device = compute_dtype(h_s, w_s, h_t, w_t), h_s.device
    statistics = torch.zeros(len(reference.STATISTICS), total, dtype=dtype, device=device)
    dh = torch.zeros(h_s.shape, dtype=returned_dtype(h_s.dtype), device=device) if wanted.hidden else None
    dw: Tensor | None = None
    if wanted.weight:
        dw = dw_into
        if dw is None:
            # Its first chunk writes it whole but for the padding: a (V, D) of zeros would be a pass for nothing.
            dw = torch.empty(w_s.shape, dtype=dtype, device=device)
            dw[v if n > 0 else 0 :].zero_()
    db = torch.zeros(w_s.shape[0], dtype=dtype, device=device) if wanted.bias else None
    # Before anything that a rank might skip: the ranks of a sharded head meet here.
    multiprocessors = multiprocessors_of(device)
    place = sharding.slices(spec, wanted, n, device, multiprocessors) if spec.group else (0, v, multiprocessors)
    if n > 0:
        if rows.hidden:
            seen = (rows.weights != 0).unsqueeze(1)
            h_s, h_t = torch.where(seen, h_s, 0), torch.where(seen, h_t, 0)
        student, teacher = Side(h_s, w_s[:v]), Side(h_t, w_t[:v])
        if h_s.is_cuda and h_s.dtype != w_s.dtype and torch.float64 not in (h_s.dtype, w_s.dtype):
            warnings.warn(
                f"student_hidden is {h_s.dtype} and its head {w_s.dtype}: exact, but in float32 GEMMs, which are slow; "
                "hand over both in bf16 (head.weight.bfloat16()) for fast ones",
                stacklevel=2,
            )
        # A factor that is a number rides on the product. One on the device waits until the end, unless dW is added to
        # somebody's running sum.
        late = dw_into is None and isinstance(rows.factor, Tensor)
        dw_factor = 1.0 if late else float(rows.factor)
        _run(
            student, _valid(b_s, v, dtype), teacher, _valid(b_t, v, dtype), rows, spec, wanted, statistics,
            dh, None if dw is None else dw[:v], dw_factor, dw_into is None, None if db is None else db[:v], *place,
        )  # fmt: skip
        if rows.hidden:
            statistics = torch.where(seen.t(), statistics, 0)
    if dw is not None and dw_into is None:
        # Rounded, or scaled and rounded, in one pass.
        kept = returned_dtype(w_s.dtype)
        if isinstance(rows.factor, Tensor):
            dw = scale_into(dw, rows.factor, dw if kept == dtype else torch.empty_like(dw, dtype=kept))
        dw = dw.to(kept)
    if db is not None:
        _scale(db, rows.factor)
    return (
        statistics,
        dh,
        None if dw_into is not None else dw,
        None if db is None or b_s is None else db.to(returned_dtype(b_s.dtype)),
    )


def _valid(bias: Tensor | None, v: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[:v].to(dtype).contiguous()


def _scale(tensor: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor) or factor != 1.0:
        tensor.mul_(factor)


def _run(
    student: Side,
    b_s: Tensor | None,
    teacher: Side,
    b_t: Tensor | None,
    rows: Rows,
    spec: Spec,
    wanted: Wanted,
    statistics: Tensor,
    dh: Tensor | None,
    dw: Tensor | None,
    dw_factor: float,
    fresh: bool,  # dW holds nothing yet
    db: Tensor | None,
    first_column: int,  # of this rank's slice of the vocabulary
    columns: int,  # of the largest slice; v unless the head is sharded
    multiprocessors: int,
) -> None:
    active = rows.active
    n = student.h.shape[0] if active is None else active.shape[0]
    v, pitch, device = spec.vocab_size, pitch_of(spec.vocab_size), student.h.device
    dtype = compute_dtype(*student, *teacher)
    operation = row_operation(spec, n)
    planes = operation.planes + operation.temporaries
    plan = make_plan(n, [student, teacher], columns, spec, wanted, planes, multiprocessors)
    run_rows = row_operation(spec, plan.logit_rows, first_column).run
    weight_s = Weight(student, dtype, plan.tile, spec.backend)
    weight_t = Weight(teacher, dtype, plan.tile, spec.backend, shares=weight_s)
    type_s, type_t = operand_dtype(student, dtype), operand_dtype(teacher, dtype)

    logits_s = torch.empty(plan.logit_rows, pitch, dtype=dtype, device=device)
    logits_t = torch.empty(plan.logit_rows, pitch, dtype=dtype, device=device)
    g_buffer = logits_s
    if has_gradient_buffer(student, dtype, spec, wanted):
        g_buffer = torch.empty(plan.gradient_rows, pitch, dtype=gradient_dtype(student, dtype), device=device)
    scratch = torch.empty((operation.planes, plan.block_rows, v), dtype=dtype, device=device)

    for first in range(0, n, plan.gradient_rows):
        last = min(first + plan.gradient_rows, n)
        h_big = take(student.h, active, first, last, type_s)
        for start in range(first, last, plan.logit_rows):
            stop = min(start + plan.logit_rows, last)
            z_s, z_t = logits_s[: stop - start, :v], logits_t[: stop - start, :v]
            h_small = take(teacher.h, active, start, stop, type_t)
            project([h_big[start - first : stop - first], h_small], [weight_s, weight_t], [z_s, z_t])
            chosen = slice(start, stop) if active is None else active[start:stop]
            g = g_buffer[start - first : stop - first, :v] if any(wanted) else None
            computed = torch.zeros(statistics.shape[0], stop - start, dtype=dtype, device=device)
            run_rows(z_s, z_t, b_s, b_t, rows.weights[chosen], computed, g, scratch=scratch)
            statistics[:, chosen] = computed
        if not any(wanted):
            continue
        g = g_buffer[: last - first, :v]
        if dh is not None:
            part = hidden_gradient(g, h_big, weight_s)
            if spec.group:
                sharding.sum_(part, spec.group)  # in float32, before it is rounded
            _scale(part, rows.factor)
            dh[slice(first, last) if active is None else active[first:last]] = part.to(dh.dtype)
        if dw is not None:
            add_weight_gradient(dw, g, h_big, weight_s, dw_factor, fresh=fresh and first == 0)
        if db is not None:
            db.add_(g.sum(dim=0, dtype=db.dtype))


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
    n = total if rows.active is None else rows.active.shape[0]
    dtype, device = compute_dtype(logits_s, logits_t), logits_s.device
    kl = torch.zeros(total, dtype=dtype, device=device)
    gradient = torch.zeros(logits_s.shape, dtype=returned_dtype(logits_s.dtype), device=device) if wanted else None
    if n == 0:
        return kl, gradient
    if rows.hidden:
        seen = (rows.weights != 0).unsqueeze(1)
        logits_s, logits_t = torch.where(seen, logits_s, 0), torch.where(seen, logits_t, 0)
    all_rows = rows.active is None and not rows.hidden
    if spec.backend == "native" and all_rows and _readable(logits_s) and _readable(logits_t):
        # The library reads bf16 as it is, leaves the logits alone and rounds the gradient once.
        computed = torch.zeros(len(reference.STATISTICS), n, dtype=dtype)
        weights = rows.weights * rows.factor
        row_operation(spec, n).run(logits_s, logits_t, None, None, weights, computed, gradient, scratch=None)
        return computed[0], gradient
    planes = row_operation(spec, n).planes
    chunk = min(n, max(1, LOGITS_SCRATCH // ((planes + 2) * v * dtype.itemsize)))
    run_rows = row_operation(spec, chunk).run
    pitch = pitch_of(v)
    buffer_s = torch.empty(chunk, pitch, dtype=dtype, device=device)
    buffer_t = torch.empty(chunk, pitch, dtype=dtype, device=device)
    scratch = torch.empty(planes, min(chunk, block_rows(v)), v, dtype=dtype, device=device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        chosen = slice(start, stop) if rows.active is None else rows.active[start:stop]
        z_s, z_t = buffer_s[: stop - start, :v], buffer_t[: stop - start, :v]
        z_s.copy_(logits_s[chosen])
        z_t.copy_(logits_t[chosen])
        computed = torch.zeros(len(reference.STATISTICS), stop - start, dtype=dtype, device=device)
        run_rows(z_s, z_t, None, None, rows.weights[chosen], computed, z_s if wanted else None, scratch=scratch)
        kl[chosen] = computed[0]
        if gradient is not None:
            _scale(z_s, rows.factor)
            gradient[chosen] = z_s.to(gradient.dtype)
    if rows.hidden:
        kl = torch.where(seen.squeeze(1), kl, 0)
    return kl, gradient
