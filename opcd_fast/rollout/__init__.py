"""Token ids in, token ids out: protocol, decoding loop, `generate`, server, vLLM, replay."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.rollout.choice import Choice
    from opcd_fast.rollout.decoding import refuses_holding_once
    from opcd_fast.rollout.http import ServerGone
    from opcd_fast.rollout.memory import KEPT_SHARE, MOST, batch_that_fits, first_and_last_token
    from opcd_fast.rollout.protocol import Completion, Rollout, stop_token_ids
    from opcd_fast.rollout.replay import ReplayRollout, write_replay
    from opcd_fast.rollout.server import ServerRollout, Weights
    from opcd_fast.rollout.transformers import TransformersRollout
    from opcd_fast.rollout.vllm import VLLMRollout
    from opcd_fast.rollout.weights import CommandWeights, LoRAWeights

__getattr__, __dir__, __all__ = door(__name__)
