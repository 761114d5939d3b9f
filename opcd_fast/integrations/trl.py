"""TRL 1.16: the fused loss in its own trainers, and a trainer for context distillation.

    from opcd_fast.integrations.trl import ContextDistillationTrainer, use_fused_loss
    use_fused_loss(trainer)          # DistillationTrainer, GKDTrainer or SDFTTrainer

TRL's hooks are private: another minor version is refused with the remedy.
"""

from __future__ import annotations

from opcd_fast.integrations.trl_context import ContextDistillationTrainer
from opcd_fast.integrations.trl_loss import FusedLoss, use_fused_loss

__all__ = ["ContextDistillationTrainer", "FusedLoss", "use_fused_loss"]
