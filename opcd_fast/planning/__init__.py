"""How much memory a run will need, from its settings and the models' configurations alone.

The step that will be run is rehearsed: the same code, models and optimizer, on tensors that have shapes and no data
(torch's FakeTensorMode), while every storage that comes and goes is counted. What a kernel takes inside of itself is
not seen by that and is counted from the same plan that the kernel follows (`loss_scratch`, `gpu_attention`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "extrapolation": ("can_extrapolate", "extrapolated"),
        "report": ("as_json", "show"),
        "search": ("Found", "find"),
    },
)

if TYPE_CHECKING:
    from opcd_fast.planning.extrapolation import can_extrapolate, extrapolated
    from opcd_fast.planning.report import as_json, show
    from opcd_fast.planning.search import Found, find
