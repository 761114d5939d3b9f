"""TRL 1.16: the fused loss in its own trainers, and a trainer for context distillation.

    from opcd_fast.integrations.trl import use_fused_loss
    use_fused_loss(trainer)          # DistillationTrainer, GKDTrainer or SDFTTrainer

TRL's hooks are private: another minor version is refused with the remedy.
"""

from __future__ import annotations

from opcd_fast.integrations.trl_loss import FusedLoss, use_fused_loss

__all__ = ["FusedLoss", "use_fused_loss"]
