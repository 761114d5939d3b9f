"""Deep models from shallow rehearsals: all layers alike, so every phase's peak is a straight line in their number.

That a phase has its worst moment at the same place whatever the depth is not certain: gradients that pile up overtake
activations somewhere. So settings are looked for with this, and the ones found are rehearsed with all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from opcd_fast.planning.rehearsal import Peak, Rehearsal

FEW, MORE = 2, 5  # layers
_WORTH = 12  # layers; below, a rehearsal of the whole takes no longer


def can_extrapolate(student: Any, teacher: Any) -> bool:
    """Whether both configurations say that all layers are alike, and there are many."""
    for source in (student,) if teacher is None else (student, teacher):
        text = source.get_text_config()
        if text.num_hidden_layers < _WORTH or len(set(getattr(text, "layer_types", None) or ["one"])) > 1:
            return False
    # Two depths that grow at different rates would make two slopes of one.
    return teacher is None or student.get_text_config().num_hidden_layers == teacher.get_text_config().num_hidden_layers


def extrapolated(rehearse: Callable[[int], Rehearsal], layers: int) -> Rehearsal:
    """What `rehearse(layers)` would say, from two shallow ones."""
    few, more = rehearse(FEW), rehearse(MORE)
    peaks = {}
    for phase, low in few.peaks.items():
        high = more.peaks[phase]

        def line(a: int, b: int) -> int:
            return a + (b - a) * (layers - FEW) // (MORE - FEW)

        parts = {
            part: max(0, line(low.parts.get(part, 0), high.parts.get(part, 0))) for part in {**low.parts, **high.parts}
        }
        peaks[phase] = Peak(line(low.nbytes, high.nbytes), parts)
    return replace(more, peaks=peaks)
