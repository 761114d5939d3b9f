"""Hidden states and heads in, loss and gradients out."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.loss.api import LossStats, fused_linear_divergence, fused_linear_reverse_kl, reverse_kl
    from opcd_fast.loss.chunks import release_workspace
    from opcd_fast.loss.divergences import (
        ALPHA, BETA, DIVERGENCES, GATE, PARAMETERS, TAIL, K, check_divergence, unused_parameter,
    )  # fmt: skip
    from opcd_fast.loss.heads import LMHead, same_vocabulary
    from opcd_fast.loss.importance import Drift, importance_weights, trainer_logprobs
    from opcd_fast.loss.inputs import check_others, resolve_backend
    from opcd_fast.loss.logprobs import fused_linear_logprobs
    from opcd_fast.loss.scratch import scratch_bytes
    from opcd_fast.loss.sequence_weights import sequence_mean_weights

__getattr__, __dir__, __all__ = door(__name__)
