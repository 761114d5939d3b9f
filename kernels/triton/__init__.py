"""The kernels in Triton, each with its launcher, and the table of their launch shapes."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.kernels.triton import launch_shapes
    from opcd_fast.kernels.triton.attention import merge_attention
    from opcd_fast.kernels.triton.divergences import divergence_rows
    from opcd_fast.kernels.triton.logprobs import logprob_rows

__getattr__, __dir__, __all__ = door(__name__)
