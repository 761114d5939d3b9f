"""Device code in plain PyTorch: the executable specification of every kernel."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.kernels.reference import attention, differences, divergences, logprobs, topk
    from opcd_fast.kernels.reference.attention import merge_attention
    from opcd_fast.kernels.reference.logits import Logits
    from opcd_fast.kernels.reference.statistics import (
        FARTHEST, NORMALISERS, STATISTICS, TERMS, Gather, merge_normalisers, merge_terms,
    )  # fmt: skip
    from opcd_fast.kernels.reference.table import DIVERGENCES, PARAMETERS, Divergence, Parameter, is_number, row_of

__getattr__, __dir__, __all__ = door(__name__)
