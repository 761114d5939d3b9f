"""The loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "interruption": ("Interrupted",),
        "scorer": ("HeldOutScore", "Scorer"),
        "settings": ("OPCDConfig",),
        "trainer": ("OPCDTrainer", "TrainResult"),
    },
    modules=("scorer",),
)

if TYPE_CHECKING:
    from opcd_fast.training.interruption import Interrupted
    from opcd_fast.training.scorer import HeldOutScore, Scorer
    from opcd_fast.training.settings import OPCDConfig
    from opcd_fast.training.trainer import OPCDTrainer, TrainResult
