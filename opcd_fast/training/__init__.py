"""The loop."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.training import scorer
    from opcd_fast.training.interruption import Interrupted
    from opcd_fast.training.preview import Pair, changes_something, in_lines
    from opcd_fast.training.scorer import HeldOutScore, Scorer
    from opcd_fast.training.settings import OPCDConfig
    from opcd_fast.training.trainer import OPCDTrainer, TrainResult

__getattr__, __dir__, __all__ = door(__name__)
