"""opcd-fast: on-policy context distillation with exact fused losses and a shared-prefix teacher.

Importing the package imports nothing else: names load when they are first used, and `opcd_fast.loss` needs
torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LMHead": "heads",
    "LossStats": "loss",
    "fused_linear_divergence": "loss",
    "fused_linear_logprobs": "loss",
    "fused_linear_reverse_kl": "loss",
    "reverse_kl": "loss",
    "sequence_mean_weights": "loss",
    "ContextTeacher": "teacher",
    "SharedPrefix": "prefix",
    "ContinuationScores": "scoring",
    "score_continuations": "scoring",
    "packed_hidden_states": "student",
    "shared_prompt_hidden_states": "shared_prompts",
    "Batch": "batch",
    "Sample": "batch",
    "pack": "batch",
    "Completion": "rollout_protocol",
    "Rollout": "rollout_protocol",
    "TransformersRollout": "rollout",
    "ServerRollout": "rollout_server",
    "VLLMRollout": "rollout_vllm",
    "ReplayRollout": "rollout_replay",
    "OPCDConfig": "config",
    "OPCDTrainer": "trainer",
    "TrainResult": "trainer",
    "InputError": "errors",
    "load_model": "models",
    "load_tokenizer": "models",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from opcd_fast.batch import Batch, Sample, pack
    from opcd_fast.config import OPCDConfig
    from opcd_fast.errors import InputError
    from opcd_fast.heads import LMHead
    from opcd_fast.loss import (
        LossStats,
        fused_linear_divergence,
        fused_linear_logprobs,
        fused_linear_reverse_kl,
        reverse_kl,
        sequence_mean_weights,
    )
    from opcd_fast.models import load_model, load_tokenizer
    from opcd_fast.prefix import SharedPrefix
    from opcd_fast.rollout import TransformersRollout
    from opcd_fast.rollout_protocol import Completion, Rollout
    from opcd_fast.rollout_replay import ReplayRollout
    from opcd_fast.rollout_server import ServerRollout
    from opcd_fast.rollout_vllm import VLLMRollout
    from opcd_fast.scoring import ContinuationScores, score_continuations
    from opcd_fast.shared_prompts import shared_prompt_hidden_states
    from opcd_fast.student import packed_hidden_states
    from opcd_fast.teacher import ContextTeacher
    from opcd_fast.trainer import OPCDTrainer, TrainResult


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'opcd_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"opcd_fast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
