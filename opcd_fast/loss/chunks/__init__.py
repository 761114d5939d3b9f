"""The loss computed in chunks of rows: loop, products, workspace, slices of a vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "exact": ("exactly",),
        "loop": ("linear_divergence", "logits_divergence"),
        "main_grad": ("accumulation_target", "placeholder"),
        "products": (
            "Weight",
            "add_weight_gradient",
            "hidden_gradient",
            "operand_dtype",
            "project",
            "scale_into",
            "take",
        ),
        "row_operations": ("row_operation",),
        "rows": ("refuse_capture", "select_rows"),
        "spec": ("NOTHING", "Spec", "Wanted"),
        "workspace": (
            "Side",
            "compute_dtype",
            "gradient_dtype",
            "has_gradient_buffer",
            "make_plan",
            "multiprocessors_of",
            "pitch_of",
            "returned_dtype",
            "runs_native",
            "upcast_tile",
        ),
    },
    modules=("sharding",),
)

if TYPE_CHECKING:
    from opcd_fast.loss.chunks.exact import exactly
    from opcd_fast.loss.chunks.loop import linear_divergence, logits_divergence
    from opcd_fast.loss.chunks.main_grad import accumulation_target, placeholder
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
    from opcd_fast.loss.chunks.rows import refuse_capture, select_rows
    from opcd_fast.loss.chunks.spec import NOTHING, Spec, Wanted
    from opcd_fast.loss.chunks.workspace import (
        Side,
        compute_dtype,
        gradient_dtype,
        has_gradient_buffer,
        make_plan,
        multiprocessors_of,
        pitch_of,
        returned_dtype,
        runs_native,
        upcast_tile,
    )
