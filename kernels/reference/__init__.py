"""Device code in plain PyTorch: the executable specification of every kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "attention": ("merge_attention",),
        "divergence_merge": (
            "NORMALISERS",
            "TERMS",
            "Gather",
            "Rows",
            "merge_normalisers",
            "merge_terms",
            "normalise",
            "write_statistics",
        ),
        "divergences": ("DIVERGENCES", "check_divergence"),
        "reverse_kl": ("STATISTICS",),
    },
    modules=("attention", "divergences", "logprobs", "reverse_kl", "topk"),
)

if TYPE_CHECKING:
    from opcd_fast.kernels.reference.attention import merge_attention
    from opcd_fast.kernels.reference.divergence_merge import (
        NORMALISERS,
        TERMS,
        Gather,
        Rows,
        merge_normalisers,
        merge_terms,
        normalise,
        write_statistics,
    )
    from opcd_fast.kernels.reference.divergences import DIVERGENCES, check_divergence
    from opcd_fast.kernels.reference.reverse_kl import STATISTICS
