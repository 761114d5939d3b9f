"""Device code in plain PyTorch: the executable specification of every kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "attention": ("merge_attention",),
        "logits": ("Logits",),
        "statistics": (
            "NORMALISERS",
            "STATISTICS",
            "TERMS",
            "Gather",
            "Rows",
            "merge_normalisers",
            "merge_terms",
            "normalise",
            "write_statistics",
        ),
        "table": ("DIVERGENCES", "PARAMETERS", "Divergence", "Parameter", "row_of"),
    },
    modules=("attention", "divergences", "logprobs", "topk"),
)

if TYPE_CHECKING:
    from opcd_fast.kernels.reference.attention import merge_attention
    from opcd_fast.kernels.reference.logits import Logits
    from opcd_fast.kernels.reference.statistics import (
        NORMALISERS,
        STATISTICS,
        TERMS,
        Gather,
        Rows,
        merge_normalisers,
        merge_terms,
        normalise,
        write_statistics,
    )
    from opcd_fast.kernels.reference.table import DIVERGENCES, PARAMETERS, Divergence, Parameter, row_of
