"""The kernels in Triton, each with its launcher, and the table of their launch shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "attention": ("merge_attention",),
        "logprobs": ("logprob_rows",),
        "reverse_kl": ("reverse_kl_rows",),
    },
    modules=("divergences",),
)

if TYPE_CHECKING:
    from opcd_fast.kernels.triton.attention import merge_attention
    from opcd_fast.kernels.triton.logprobs import logprob_rows
    from opcd_fast.kernels.triton.reverse_kl import reverse_kl_rows
