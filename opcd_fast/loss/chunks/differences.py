"""The logits of a head that student and teacher share, as the student's and their differences, in float16.

A row's logits are shifted by that of one token, `kernels.reference.differences` says why, and scaled by powers of two
where hidden states or head would leave float16. Both ride on the products:

    z' = [h_s, 1, 1, -k] [W, b, b', 1]^T        d' = [h_s - h_t, 0, 0, -k'] [W, b, b', 1]^T

k, k': the token's own logit and difference. b + b' is the bias, in two parts. Which token is named, and whether one is,
decides over speed alone: rows whose numbers float16 does not hold well are given back to be computed in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from opcd_fast.kernels.reference import DIVERGENCES, Logits
from opcd_fast.loss.chunks import sharding
from opcd_fast.loss.chunks.buffers import borrowed
from opcd_fast.loss.chunks.gradients import Gradients
from opcd_fast.loss.chunks.products import Weight, half_product, operand_dtype, take
from opcd_fast.loss.chunks.row_operations import divergence_rows, scratch_planes
from opcd_fast.loss.chunks.rows import Rows, capturing, refuse_capture
from opcd_fast.loss.chunks.spec import Spec, Wanted
from opcd_fast.loss.chunks.workspace import Plan, Side, default_workspace, operand_width, pitch_of, same_memory

LARGEST = 65_504.0  # of float16
TINIEST = 2.0**-60  # for a head's largest number: powers of two are not to leave float32
# By weight: as what it was looked at, and what was found. By the tensor itself, whose memory others get after it.
_known = WeakIdKeyDictionary()


def refusal(student: Side, teacher: Side, spec: Spec, shifted: bool) -> str | None:
    """Why the logits cannot be formed from differences, for a caller who has asked for it; None where they can.

    shifted: there are ids of tokens.
    """
    bias = student.bias, teacher.bias
    if not shifted:
        return "needs token_ids=, for each row the token that was drawn there"
    if not same_memory(student.weight, teacher.weight) or spec.scale_s != spec.scale_t:
        return "needs one head: give student_head and teacher_head the same weight tensor and scale"
    if (bias[0] is None) != (bias[1] is None) or (bias[0] is not None and not same_memory(*bias)):  # type: ignore
        return "needs one head: give student_head and teacher_head the same bias tensor"
    if spec.softcap_s is not None or spec.softcap_t is not None:
        return "does not exist for a head with a softcap"
    if DIVERGENCES[spec.divergence].code is None:
        return f"does not exist for divergence={spec.divergence!r}"
    kinds = [tensor.dtype for tensor in (student.h, teacher.h, student.weight)]
    if set(kinds) != {torch.bfloat16}:
        return f"needs bf16 hidden states and weight, but they are {kinds[0]} (student), {kinds[1]} and {kinds[2]}"
    return None


def pays(rows: int, student: Side, spec: Spec, wanted: Wanted) -> bool:
    """Whether "auto" takes differences that are possible: with the Triton kernels, where copying the head, 4 bytes a
    weight, costs less than the 12 bytes that each logit saves, and where the copy takes at most half of the workspace.
    """
    (v, width), on_device = student.weight.shape, spec.backend == "triton" and student.h.is_cuda
    room = spec.workspace_bytes or default_workspace(any(wanted), wanted)
    return on_device and 3 * rows >= width and 4 * v * operand_width(width) <= room


def takes_differences(student: Side, teacher: Side, rows: int, spec: Spec, wanted: Wanted, shifted: bool) -> bool:
    """Whether a call forms its logits so, from shapes, types and places alone. Raises ValueError where differences are
    asked for and cannot be."""
    asked = spec.projection == "difference"
    if not asked and (spec.projection != "auto" or not pays(rows, student, spec, wanted)):
        return False
    reason = refusal(student, teacher, spec, shifted)
    if asked and reason is not None:
        raise ValueError(f"projection='difference' {reason}; with projection='auto' it is taken where it can be")
    return reason is None


def largest_in_head(student: Side, teacher: Side, rows: int, spec: Spec, wanted: Wanted, shifted: bool) -> float:
    """The largest number in a head of whose logits differences are formed; inf where they are not.

    Looks at a head's values once, which synchronises with a device. Raises as `takes_differences`, and RuntimeError
    where differences are asked for while a CUDA graph is captured.
    """
    if not takes_differences(student, teacher, rows, spec, wanted, shifted):
        return float("inf")
    if spec.projection == "difference":
        refuse_capture(student.h.device, "projection='difference'")
    return float("inf") if capturing(student.h.device) else largest_of(student.weight)


def largest_of(weight: Tensor) -> float:
    seen = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    if weight not in _known or _known[weight][0] != seen:
        largest = float(torch.stack(torch.aminmax(weight)).abs().amax())  # NaN where there is one
        _known[weight] = seen, largest if TINIEST <= largest <= LARGEST else float("inf")
    return _known[weight][1]


def half_head(side: Side, exponent: int, head: Tensor) -> None:
    """Write (v, operand_width) float16: [2^exponent W, b, b', 1, 0 ...]."""
    v, width = side.weight.shape
    head[:, width:].zero_()
    rows = v if side.weight.is_cuda else 4096  # a CPU casts through temporaries
    for weight, out in zip(side.weight.split(rows), head[:, :width].split(rows), strict=True):
        torch.mul(weight, 2.0**exponent, out=out)
    if side.bias is not None:
        head[:, width] = side.bias
        rest = side.bias - head[:, width].float()
        head[:, width + 1] = torch.where(rest.isfinite(), rest, 0.0)  # a forbidden token is -inf in the first
    head[:, width + 2] = 1.0


def operand(h: Tensor, shift: Tensor, with_bias: bool, exponent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n, operand_width) float16 of a product with `half_head`; what undoes their scaling (n,); and the shift (n,)
    as float16 has it. h: (n, D) float32; shift: (n,)."""
    n, width = h.shape
    rows = torch.zeros(n, operand_width(width), dtype=torch.float16, device=h.device)
    _, high = torch.frexp(h.abs().amax(-1))  # |h| < 2^high
    # The head's scaling is undone where that leaves a row between 2^-9, where float16 has digits enough, and 2^15.
    scaling = torch.full_like(high, -exponent).clamp(min=-8 - high, max=15 - high).clamp(-14 - exponent, 64)
    unit, undo = _power_of_two(scaling + exponent), _power_of_two(-scaling - exponent)
    torch.mul(h, _power_of_two(scaling).unsqueeze(-1), out=rows[:, :width])
    if with_bias:
        rows[:, width : width + 2] = unit.unsqueeze(-1)
    rows[:, width + 2] = -shift * unit
    return rows, undo, rows[:, width + 2].float() * -undo


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def run_differences(
    sides: list[Side],  # the student first; the valid rows of their head
    token_ids: Tensor,  # (N,) int64
    rows: Rows,
    spec: Spec,
    wanted: Wanted,
    plan: Plan,
    largest: float,  # in the head, over all ranks
    statistics: Tensor,  # (planes, N) written
    gradients: Gradients,
    first_column: int,
) -> None:
    """As `run_chunks`. Rows that float16 does not hold well get NaN for their value and no gradient."""
    student = sides[0]
    v, n, device, dtype = len(student.weight), rows.count, statistics.device, statistics.dtype
    # The head's largest number is made at least 2^-4, so that what float16 drops is 2^-20 of it.
    exponent = max(0, -4 - math.frexp(largest)[1])
    weight, pitch = Weight(student, dtype, plan.tile, spec.backend), pitch_of(v)
    with borrowed(
        device,
        ((v, operand_width(student.weight.shape[1])), torch.float16),
        ((plan.gradient_rows, pitch), torch.float16),
        ((plan.logit_rows, pitch), torch.float16),
        ((scratch_planes(spec)[0] // 2, plan.block_rows, v), torch.float64),
        keep=spec.keep,
    ) as (head, z_buffer, d_buffer, scratch):
        half_head(student, exponent, head)
        g_buffer = z_buffer.view(torch.bfloat16)  # each element is written by what has read it last
        for first in range(0, n, plan.gradient_rows):
            last = min(first + plan.gradient_rows, n)
            for start in range(first, last, plan.logit_rows):
                stop = min(start + plan.logit_rows, last)
                inside, chosen = slice(start - first, stop - first), rows.chosen(start, stop)
                h, moved = (take(side.h, rows.active, start, stop, torch.float32) for side in sides)
                torch.sub(h, moved, out=moved)
                ids = token_ids[chosen] - first_column
                here = (ids >= 0) & (ids < v)
                own = torch.where(here, ids, 0)
                row = student.weight[own].float()
                shifts = torch.stack([torch.linalg.vecdot(h, row), torch.linalg.vecdot(moved, row)])
                if student.bias is not None:
                    shifts[0] += student.bias[own]
                shifts.masked_fill_(~here, 0.0)
                if spec.group:
                    sharding.sum_(shifts, spec.group)  # one rank has the token
                buffers = z_buffer[inside, :v], d_buffer[: stop - start, :v]
                halves, known = [], []
                for x, shift, out in zip((h, moved), shifts, buffers):
                    with_bias = x is h and student.bias is not None
                    operands, undo, shifted = operand(x, shift, with_bias, exponent)
                    half_product(operands, head, out, plan.tile)
                    halves.append(Logits(out, None, spec.scale_s, None, spec.temperature, undo))
                    known.append(shifted * halves[-1].derivative)
                computed = torch.zeros(len(statistics), stop - start, dtype=dtype, device=device)
                g = g_buffer[inside, :v] if any(wanted) else None
                divergence_rows(spec, halves[0], halves[1], rows.weights[chosen], computed, g, scratch, first_column)
                if spec.all_statistics:
                    computed[2] += known[0]
                    computed[3] += known[0] - known[1]
                statistics[:, chosen] = computed
            if any(wanted):
                h_big = take(student.h, rows.active, first, last, operand_dtype(student, dtype))
                g = g_buffer[: last - first, :v]
                gradients.add(g if weight.native else g.to(dtype), h_big, weight, rows.chosen(first, last))
