"""The chunk loop of `projection="dual"`: both logits of a tile exist in registers only, two bytes each leave them.

Opt-in until it is measured faster somewhere. Reverse KL, Triton, whole vocabularies. Without a wanted gradient
nothing of size V is stored at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from opcd_fast.kernels import reference_dual
from opcd_fast.products import Weight, add_weight_gradient, hidden_gradient, take
from opcd_fast.rows import Rows
from opcd_fast.spec import Spec, Wanted
from opcd_fast.workspace import (
    DEFAULT_WORKSPACE,
    DEFAULT_WORKSPACE_WITH_DW,
    GRADIENT_CHUNKS,
    Side,
    gradient_dtype,
    pitch_of,
    upcast_tile,
)


class _Plan(NamedTuple):
    rows: int  # projected at once
    gradient_rows: int
    tile: int  # vocabulary rows of a weight upcast at a time, for the gradient's products


def check_dual(student: Side, teacher: Side, spec: Spec) -> None:
    """Raises ValueError, with what to do, for what this route cannot compute."""
    if spec.divergence != "reverse_kl" or spec.group:
        what = "a sharded head" if spec.group else f"divergence={spec.divergence!r}"
        raise ValueError(f"projection='dual' computes the reverse KL of a whole vocabulary, not {what}; use 'fp32'")
    if spec.backend != "triton":
        raise ValueError(f"projection='dual' needs backend='triton', not {spec.backend!r}; use projection='fp32'")
    for name, side in (("student", student), ("teacher", teacher)):
        if side.h.dtype != side.weight.dtype:
            raise ValueError(
                f"projection='dual': {name}_hidden is {side.h.dtype}, {name}_head {side.weight.dtype}; cast one of "
                "them, or use projection='fp32'"
            )
        if side.weight.stride(1) != 1 or side.weight.stride(0) * side.weight.itemsize % 16:
            raise ValueError(
                f"projection='dual': rows of {name}_head.weight must be contiguous and start at multiples of 16 bytes; "
                "use projection='fp32'"
            )


def run_dual(
    student: Side,
    b_s: Tensor | None,
    teacher: Side,
    b_t: Tensor | None,
    rows: Rows,
    spec: Spec,
    wanted: Wanted,
    statistics: Tensor,  # (5, N) written
    dh: Tensor | None,
    dw: Tensor | None,
    dw_factor: float,
    fresh: bool,
    db: Tensor | None,
) -> None:
    """As `chunks._run`: statistics of the active rows, dH scaled by the factor, dW times dw_factor (written if it is
    fresh, else added), db added up unscaled."""
    from opcd_fast.kernels.dual_projection import dual_projection
    from opcd_fast.kernels.dual_rows import dual_gradient
    from opcd_fast.kernels.linear_statistics import linear_statistics

    active, device, v = rows.active, student.h.device, spec.vocab_size
    n = student.h.shape[0] if active is None else active.shape[0]
    transforms: dict[str, Any] = {
        "scale_s": spec.scale_s, "scale_t": spec.scale_t, "softcap_s": spec.softcap_s, "softcap_t": spec.softcap_t,
        "temperature": spec.temperature, "all_statistics": spec.all_statistics,
    }  # fmt: skip
    if not any(wanted):
        computed = torch.zeros(statistics.shape[0], n, device=device)
        budget = spec.workspace_bytes or DEFAULT_WORKSPACE // 4
        linear_statistics(
            take(student.h, active, 0, n, student.h.dtype).contiguous(), student.weight,
            take(teacher.h, active, 0, n, teacher.h.dtype).contiguous(), teacher.weight,
            b_s, b_t, computed, scratch_bytes=budget, **transforms,
        )  # fmt: skip
        statistics[:, slice(None) if active is None else active] = computed
        return

    dtype = torch.float32
    g_dtype = gradient_dtype(student, dtype)
    plan = _make_plan(n, student, teacher, spec, wanted, g_dtype)
    pitch, tiles = pitch_of(v), reference_dual.tile_count(v)
    planes = reference_dual.tile_planes(True, spec.all_statistics)
    weight = Weight(student, dtype, plan.tile, spec.backend)
    operand = student.h.dtype if weight.native else dtype
    logits = torch.empty(plan.gradient_rows, pitch, dtype=torch.float16, device=device)
    difference = torch.empty(plan.rows, pitch, dtype=torch.float16, device=device)
    tile_buffer = torch.empty(planes * tiles * plan.rows, device=device)
    # A bf16 gradient takes the place of the float16 logits.
    g_buffer = logits.view(g_dtype) if g_dtype == torch.bfloat16 else torch.empty_like(logits, dtype=g_dtype)

    for first in range(0, n, plan.gradient_rows):
        last = min(first + plan.gradient_rows, n)
        h_big = take(student.h, active, first, last, student.h.dtype).contiguous()
        for start in range(first, last, plan.rows):
            stop = min(start + plan.rows, last)
            place = slice(start - first, stop - first)
            chosen = slice(start, stop) if active is None else active[start:stop]
            h_t = take(teacher.h, active, start, stop, teacher.h.dtype).contiguous()
            small = difference[: stop - start]
            of_tiles = tile_buffer[: planes * tiles * (stop - start)].view(planes, tiles, stop - start)
            dual_projection(
                h_big[place],
                student.weight,
                h_t,
                teacher.weight,
                b_s,
                b_t,
                logits[place],
                small,
                of_tiles,
                **transforms,
            )
            computed = torch.zeros(statistics.shape[0], stop - start, device=device)
            dual_gradient(
                logits[place], small, of_tiles, rows.weights[chosen], computed, g_buffer[place],
                scale_s=spec.scale_s, softcap_s=spec.softcap_s, temperature=spec.temperature,
                all_statistics=spec.all_statistics,
            )  # fmt: skip
            statistics[:, chosen] = computed
        g = g_buffer[: last - first, :v]
        if dh is not None:
            part = hidden_gradient(g, h_big.to(operand), weight)
            if isinstance(rows.factor, Tensor) or rows.factor != 1.0:
                part.mul_(rows.factor)
            dh[slice(first, last) if active is None else active[first:last]] = part.to(dh.dtype)
        if dw is not None:
            add_weight_gradient(dw, g, h_big.to(operand), weight, dw_factor, fresh=first == 0 and fresh)
        if db is not None:
            db.add_(g.sum(dim=0, dtype=db.dtype))


def _make_plan(n: int, student: Side, teacher: Side, spec: Spec, wanted: Wanted, g_dtype: torch.dtype) -> _Plan:
    """Cut `workspace_bytes`: 2 bytes a logit for the student's logits, which become G, in gradient chunks; 2 for the
    differences in projected chunks, and their tiles' floats.

    Raises ValueError when the workspace does not hold one row.
    """
    pitch = pitch_of(spec.vocab_size)
    budget = spec.workspace_bytes
    default = DEFAULT_WORKSPACE_WITH_DW if wanted.weight else DEFAULT_WORKSPACE
    tile, fixed = upcast_tile([student], torch.float32, spec.vocab_size)
    ratio = GRADIENT_CHUNKS if wanted.weight else 1
    # Merging the tiles takes about twice their size once more.
    of_tiles = (
        3 * 4 * reference_dual.tile_planes(True, spec.all_statistics) * reference_dual.tile_count(spec.vocab_size)
    )
    own_g = pitch * g_dtype.itemsize if g_dtype != torch.bfloat16 else 0
    width = student.h.shape[1]
    per_row = 2 * pitch + of_tiles + teacher.h.shape[1] * teacher.h.dtype.itemsize
    per_row += ratio * (2 * pitch + own_g + 4 * 4 * width)
    if budget is None:
        budget = max(fixed + per_row, default)
    if budget < fixed + per_row:
        raise ValueError(
            f"workspace_bytes is {budget}, too small for one row of {spec.vocab_size} logits; "
            f"give at least {fixed + per_row} (bytes), or None for the default"
        )
    fit = (budget - fixed) // per_row
    chunk = -(-n // -(-n // fit))
    if chunk > 128:
        chunk = max(128, min(fit, -(-chunk // 128) * 128) // 128 * 128)  # whole blocks of the kernel
    chunk = min(chunk, n)
    return _Plan(chunk, min(n, chunk if chunk >= n else ratio * chunk), tile)
