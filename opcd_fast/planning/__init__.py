"""How much memory a run will need, from its settings and the models' configurations alone.

The step that will be run is rehearsed: the same code, models and optimizer, on tensors that have shapes and no data
(torch's FakeTensorMode), while every storage that comes and goes is counted. What a kernel takes inside of itself is
not seen by that; its room says it, from the plan that the kernel follows (`scratch_bytes` of the loss, `flash_shapes`
of attention).
"""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.planning.estimate import foreseen
    from opcd_fast.planning.plan import RESERVED, Plan, changes, gpu_bytes, plan_run
    from opcd_fast.planning.report import as_json, show
    from opcd_fast.planning.search import Found, depth_to_extrapolate, extrapolated, find

__getattr__, __dir__, __all__ = door(__name__)
