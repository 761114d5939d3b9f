"""The loss computed in chunks of rows: loop, products, workspace, slices of a vocabulary."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.loss.chunks import sharding
    from opcd_fast.loss.chunks.buffers import release_workspace
    from opcd_fast.loss.chunks.differences import takes_differences
    from opcd_fast.loss.chunks.gradients import accumulation_target, placeholder
    from opcd_fast.loss.chunks.loop import linear_divergence, linear_logprobs, logits_divergence
    from opcd_fast.loss.chunks.products import exactly, scale_into
    from opcd_fast.loss.chunks.row_operations import scratch_planes
    from opcd_fast.loss.chunks.rows import refuse_capture, select_rows
    from opcd_fast.loss.chunks.spec import NOTHING, Spec, Wanted
    from opcd_fast.loss.chunks.workspace import (
        Side, compute_dtype, gradient_dtype, has_gradient_buffer, make_plan, multiprocessors_of, pitch_of,
        returned_dtype, runs_native, upcast_tile,
    )  # fmt: skip

__getattr__, __dir__, __all__ = door(__name__)
