"""What a fused loss holds beside its arguments and results, from shapes alone: for a plan of a run's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from opcd_fast.kernels.reference import STATISTICS
from opcd_fast.loss.chunks import (
    Side,
    Spec,
    Wanted,
    gradient_dtype,
    has_gradient_buffer,
    make_plan,
    multiprocessors_of,
    pitch_of,
    runs_native,
    scratch_planes,
    takes_differences,
    upcast_tile,
)
from opcd_fast.loss.divergences import check_divergence
from opcd_fast.loss.heads import LMHead
from opcd_fast.loss.inputs import check_projection


class Shape(NamedTuple):
    """What the workspace looks at in a tensor, on a device that need not be here."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_cuda: bool
    place: int  # of its memory

    def data_ptr(self) -> int:
        return self.place

    def stride(self) -> tuple[int, ...]:
        return (self.shape[-1], 1)


def scratch_bytes(
    rows: int,
    student: LMHead,
    teacher: LMHead,
    dtype: torch.dtype,
    *,
    device: str,
    backend: str,
    gradients: bool = True,
    workspace_bytes: int | None = None,
    divergence: str = "reverse_kl",
    projection: str = "auto",
    token_ids: bool = True,
    **parameters: Any,
) -> int:
    """Bytes at the worst moment of one call of `fused_linear_divergence` on `rows` rows, statistics included; without
    its results, of which dW is in float32 until backward.

    dtype: of hidden states and of heads, which are cast to it where they are of another. device: "cuda" or "cpu", which
    need not be here; backend: the one that will run there. gradients: of the hidden states, and of the student's head
    where it is trained. token_ids: whether they are given. parameters: the divergence's. The other arguments are those
    of the loss; of a head's values nothing is known, and "auto" takes them for what float16 holds.
    """
    v = min(student.valid_size, teacher.valid_size)
    chosen = check_divergence(divergence, parameters)
    spec = Spec(
        v, workspace_bytes, backend, True, student.scale, teacher.scale, student.softcap, teacher.softcap, 1.0, *chosen,
        projection=check_projection(projection),
    )  # fmt: skip
    wanted = Wanted(gradients, gradients and student.weight.requires_grad, False)
    shared = teacher.weight is student.weight and student.weight.dtype == dtype

    def side(head: LMHead, place: int) -> Side:
        made: Any = [Shape((n, head.weight.shape[1]), dtype, device == "cuda", place) for n in (rows, v)]
        bias: Any = None if head.bias is None else Shape((v,), dtype, False, int(head.bias is not student.bias))
        return Side(made[0], made[1], bias)

    of_student, of_teacher = sides = [side(student, 0), side(teacher, 0 if shared else 1)]
    differences = takes_differences(of_student, of_teacher, rows, spec, wanted, token_ids)
    spec = replace(spec, projection="difference" if differences else "separate")
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    size, pitch = exact.itemsize, pitch_of(v)
    scratch, own = scratch_planes(spec)
    # Of the device if it is here, else of an assumed one: a plan does not ask which kind it will be.
    place = torch.device(device if torch.cuda.is_available() else "cpu")
    plan = make_plan(rows, sides, v, spec, wanted, scratch + own, multiprocessors_of(place))
    rare = 0  # in the plan for a block in which a probability underflows, which is small and rare on a CPU
    if device == "cpu" and spec.divergence != "topk_reverse_kl":
        rare = own * plan.block_rows * v * size
    if differences:
        buffers = plan.nbytes - rare
    else:
        buffers = 2 * plan.logit_rows * pitch * size + upcast_tile(sides, exact, v)[1]
        buffers += (scratch + own) * plan.block_rows * v * size - rare
        if has_gradient_buffer(of_student, exact, spec, wanted):
            buffers += plan.gradient_rows * pitch * gradient_dtype(of_student, exact).itemsize

        def copied(of: Side) -> bool:  # to be multiplied
            return not runs_native(of) and dtype != exact

        numbers = min(rows, plan.gradient_rows) * of_student.h.shape[1]
        buffers += numbers * size * copied(of_student)
        # In the end either a chunk's teacher rows in the products' type, or its dH in float32 and rounded.
        teacher_rows = min(rows, plan.logit_rows) * of_teacher.h.shape[1] * size * copied(of_teacher)
        dh = numbers * (size + (dtype.itemsize if dtype != exact else 0)) * wanted.hidden
        buffers += max(teacher_rows, dh)
    return buffers + (2 * len(STATISTICS) + 2) * rows * size
