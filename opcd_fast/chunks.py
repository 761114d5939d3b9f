"""The chunk loop of the fused losses: two projections, one row operation, two gradient products.

A flat operation on tensors, scalars and a mask of wanted gradients; no autograd, no modules. Logits exist for
a few rows at a time, in the buffers that workspace.py plans.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opcd_fast.kernels import reference
from opcd_fast.workspace import (
    LOGITS_SCRATCH,
    Spec,
    Wanted,
    block_rows,
    compute_dtype,
    gradient_dtype,
    has_gradient_buffer,
    make_plan,
    pitch_of,
    runs_native,
    same_memory,
)


class _Weight:
    """A head's weight, handed to GEMMs in tiles of the dtype they need."""

    def __init__(self, weight: Tensor, native: bool, dtype: torch.dtype, tile: int, buffer: Tensor | None = None):
        self.weight, self.native, self.tile, self.buffer = weight, native, tile, buffer
        if buffer is None and not native and weight.dtype != dtype:
            self.buffer = torch.empty(tile, weight.shape[1], dtype=dtype, device=weight.device)

    def tiles(self) -> range:
        return range(0, self.weight.shape[0], self.tile)

    def at(self, start: int) -> Tensor:
        part = self.weight[start : start + self.tile]
        if self.buffer is None:
            return part
        return self.buffer[: part.shape[0]].copy_(part)


def _project(h: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = h @ weight.T, accumulated and stored in out's dtype."""
    if h.dtype == out.dtype:
        torch.mm(h, weight.t(), out=out)
    else:
        torch.mm(h, weight.t(), out_dtype=out.dtype, out=out)


def _project_both(h_s: Tensor, w_s: _Weight, z_s: Tensor, h_t: Tensor, w_t: _Weight, z_t: Tensor) -> None:
    """Both projections by the same GEMMs over the same tiles: a different accumulation order on one side
    alone would be an error of up to 1 % of the gradient at small KL."""
    shared = w_s.buffer is not None and same_memory(w_s.weight, w_t.weight)
    for start in w_s.tiles():
        columns = slice(start, start + w_s.tile)
        tile = w_s.at(start)
        _project(h_s, tile, z_s[:, columns])
        _project(h_t, tile if shared else w_t.at(start), z_t[:, columns])


def _take(h: Tensor, active: Tensor | None, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    rows = h[start:stop] if active is None else h.index_select(0, active[start:stop])
    return rows.to(dtype)


def row_operation(spec: Spec) -> Callable[..., None]:
    """The backend's row operation; both have the signature of `reference.reverse_kl_rows`."""
    if spec.backend == "triton":
        from opcd_fast.kernels.reverse_kl_rows import reverse_kl_rows

        return reverse_kl_rows
    return reference.reverse_kl_rows


def linear_reverse_kl(
    h_s: Tensor,  # (N, D_s)
    w_s: Tensor,  # (V_s, D_s)
    b_s: Tensor | None,  # (V_s,)
    h_t: Tensor,  # (N, D_t)
    w_t: Tensor,  # (V_t, D_t)
    b_t: Tensor | None,  # (V_t,)
    row_weights: Tensor,  # (N,) in the compute dtype
    active: Tensor | None,  # (n,) int64 rows to compute; None for all
    factor: float | Tensor,  # multiplies the gradients after their last GEMM, so that G keeps its range
    spec: Spec,
    wanted: Wanted,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Statistics (5, N) of every row and the gradients of factor * sum(row_weights * KL).

    Rows that are not active have statistics 0 and gradient 0 and cost nothing. Gradients come in the dtype of
    what they belong to; dW is accumulated in the compute dtype and rounded once.
    """
    total, v = h_s.shape[0], spec.vocab_size
    n = total if active is None else active.shape[0]
    dtype, device = compute_dtype(h_s, w_s, h_t, w_t), h_s.device
    statistics = torch.zeros(len(reference.STATISTICS), total, dtype=dtype, device=device)
    dh = torch.zeros_like(h_s, memory_format=torch.contiguous_format) if wanted.hidden else None
    dw = torch.zeros(w_s.shape, dtype=dtype, device=device) if wanted.weight else None
    db = torch.zeros(w_s.shape[0], dtype=dtype, device=device) if wanted.bias else None
    if n > 0:
        _run(
            h_s, w_s[:v], _valid(b_s, v, dtype), h_t, w_t[:v], _valid(b_t, v, dtype), row_weights, active,
            factor, spec, wanted, statistics,
            dh, None if dw is None else dw[:v], None if db is None else db[:v],
        )  # fmt: skip
    for total_gradient in (dw, db):
        if total_gradient is not None:
            _scale(total_gradient, factor)
    return (
        statistics,
        dh,
        None if dw is None else dw.to(w_s.dtype),
        None if db is None or b_s is None else db.to(b_s.dtype),
    )


def _valid(bias: Tensor | None, v: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[:v].to(dtype).contiguous()


def _scale(tensor: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor) or factor != 1.0:
        tensor.mul_(factor)


def _run(
    h_s: Tensor,
    w_s: Tensor,
    b_s: Tensor | None,
    h_t: Tensor,
    w_t: Tensor,
    b_t: Tensor | None,
    row_weights: Tensor,
    active: Tensor | None,
    factor: float | Tensor,
    spec: Spec,
    wanted: Wanted,
    statistics: Tensor,
    dh: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    n = h_s.shape[0] if active is None else active.shape[0]
    v, pitch, device = spec.vocab_size, pitch_of(spec.vocab_size), h_s.device
    dtype = compute_dtype(h_s, w_s, h_t, w_t)
    plan = make_plan(n, h_s, w_s, h_t, w_t, spec, wanted)
    native_s, native_t = runs_native(h_s, w_s), runs_native(h_t, w_t)
    type_s, type_t = h_s.dtype if native_s else dtype, h_t.dtype if native_t else dtype
    student = _Weight(w_s, native_s, dtype, plan.tile)
    shared_buffer = student.buffer if same_memory(w_s, w_t) else None
    teacher = _Weight(w_t, native_t, dtype, plan.tile, shared_buffer)
    run_rows = row_operation(spec)

    logits_s = torch.empty(plan.logit_rows, pitch, dtype=dtype, device=device)
    logits_t = torch.empty(plan.logit_rows, pitch, dtype=dtype, device=device)
    g_dtype = gradient_dtype(h_s, w_s, dtype)
    if has_gradient_buffer(h_s, w_s, dtype, spec, wanted):
        g_buffer = torch.empty(plan.gradient_rows, pitch, dtype=g_dtype, device=device)
    else:
        g_buffer = logits_s if g_dtype == dtype else logits_t.view(g_dtype)
    scratch = torch.empty((reference.scratch_planes(spec.softcap_s), plan.block_rows, v), dtype=dtype, device=device)

    for first in range(0, n, plan.gradient_rows):
        last = min(first + plan.gradient_rows, n)
        h_big = _take(h_s, active, first, last, type_s)
        for start in range(first, last, plan.logit_rows):
            stop = min(start + plan.logit_rows, last)
            z_s, z_t = logits_s[: stop - start, :v], logits_t[: stop - start, :v]
            h_small = _take(h_t, active, start, stop, type_t)
            _project_both(h_big[start - first : stop - first], student, z_s, h_small, teacher, z_t)
            rows = slice(start, stop) if active is None else active[start:stop]
            g = g_buffer[start - first : stop - first, :v]
            computed = torch.zeros(statistics.shape[0], stop - start, dtype=dtype, device=device)
            run_rows(
                z_s, z_t, b_s, b_t, row_weights[rows], computed, g if any(wanted) else None,
                scale_s=spec.scale_s, scale_t=spec.scale_t, softcap_s=spec.softcap_s,
                softcap_t=spec.softcap_t, temperature=spec.temperature, all_statistics=spec.all_statistics,
                scratch=scratch,
            )  # fmt: skip
            statistics[:, rows] = computed
        if any(wanted):
            g = g_buffer[: last - first, :v]
            _gradients(g, h_big, student, factor, active, slice(first, last), dh, dw, db)


def _gradients(
    g: Tensor,  # (m, V)
    h: Tensor,  # (m, D_s)
    weight: _Weight,
    factor: float | Tensor,
    active: Tensor | None,
    rows: slice,
    dh: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """dH rows = factor * G W, dW += G.T h, db += column sums of G."""
    if dh is not None:
        if weight.native:
            part = torch.mm(g, weight.weight, out_dtype=torch.float32)
        else:
            part = torch.zeros(h.shape, dtype=g.dtype, device=g.device)
            for start in weight.tiles():
                part.addmm_(g[:, start : start + weight.tile], weight.at(start))
        _scale(part, factor)
        dh[rows if active is None else active[rows]] = part.to(dh.dtype)
    if dw is not None:
        if weight.native:
            torch.addmm(dw, g.t(), h, out_dtype=dw.dtype, out=dw)
        else:
            dw.addmm_(g.t(), h)
    if db is not None:
        db.add_(g.sum(dim=0, dtype=db.dtype))


def logits_reverse_kl(
    logits_s: Tensor,  # (N, V)
    logits_t: Tensor,  # (N, V)
    row_weights: Tensor,
    active: Tensor | None,
    factor: float | Tensor,
    spec: Spec,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Per-row KL (N,) and the gradient (N, V) of factor * sum(row_weights * KL), from logits that exist
    already."""
    total, v = logits_s.shape
    n = total if active is None else active.shape[0]
    dtype, device = compute_dtype(logits_s, logits_t), logits_s.device
    kl = torch.zeros(total, dtype=dtype, device=device)
    gradient = torch.zeros_like(logits_s, memory_format=torch.contiguous_format) if wanted else None
    if n == 0:
        return kl, gradient
    planes = reference.scratch_planes(None)
    chunk = min(n, max(1, LOGITS_SCRATCH // ((planes + 2) * v * dtype.itemsize)))
    block = min(chunk, block_rows(v))
    pitch = pitch_of(v)
    buffer_s = torch.empty(chunk, pitch, dtype=dtype, device=device)
    buffer_t = torch.empty(chunk, pitch, dtype=dtype, device=device)
    scratch = torch.empty(planes, block, v, dtype=dtype, device=device)
    run_rows = row_operation(spec)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        rows = slice(start, stop) if active is None else active[start:stop]
        z_s, z_t = buffer_s[: stop - start, :v], buffer_t[: stop - start, :v]
        z_s.copy_(logits_s[rows])
        z_t.copy_(logits_t[rows])
        computed = torch.zeros(len(reference.STATISTICS), stop - start, dtype=dtype, device=device)
        run_rows(
            z_s, z_t, None, None, row_weights[rows], computed, z_s if wanted else None,
            scale_s=1.0, scale_t=1.0, softcap_s=None, softcap_t=None,
            temperature=spec.temperature, all_statistics=False, scratch=scratch,
        )  # fmt: skip
        kl[rows] = computed[0]
        if gradient is not None:
            _scale(z_s, factor)
            gradient[rows] = z_s.to(gradient.dtype)
    return kl, gradient
