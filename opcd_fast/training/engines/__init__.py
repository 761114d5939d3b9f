"""What moves gradients: one process, data parallelism, FSDP2; ranks, optimizers, memory's retreat."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.training.engines.acceleration import join, make_accelerator, shards
    from opcd_fast.training.engines.engine import Engine
    from opcd_fast.training.engines.model_pair import (
        ModelPair, fingerprint, is_peft, name_of, refuse_useless_offload, shared_vocabulary, student_and_teacher,
    )  # fmt: skip
    from opcd_fast.training.engines.optimizers import make_optimizer
    from opcd_fast.training.engines.parallel import SharedSampler, make_engine
    from opcd_fast.training.engines.ranks import OtherRankError, Ranks
    from opcd_fast.training.engines.retreat import TokenBudget

__getattr__, __dir__, __all__ = door(__name__)
