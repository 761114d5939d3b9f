"""opcd-fast: on-policy context distillation with exact fused losses and a shared-prefix teacher.

Importing the package imports nothing else: names load when they are first used, and `opcd_fast.loss` needs
torch alone.
"""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.data import Batch, Sample, pack
    from opcd_fast.errors import InputError
    from opcd_fast.loss import (
        LMHead, LossStats, fused_linear_divergence, fused_linear_logprobs, fused_linear_reverse_kl, reverse_kl,
        sequence_mean_weights,
    )  # fmt: skip
    from opcd_fast.models import load_model, load_tokenizer, packed_hidden_states, shared_prompt_hidden_states
    from opcd_fast.rollout import Completion, ReplayRollout, Rollout, ServerRollout, TransformersRollout, VLLMRollout
    from opcd_fast.teacher import ContextTeacher, ContinuationScores, SharedPrefix, score_continuations
    from opcd_fast.training import OPCDConfig, OPCDTrainer, TrainResult

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = door(__name__)
__all__ += ["__version__"]
