"""The fastest settings that fit: what costs least time is given up first, and only as much of it as is needed.

In order: tokens run at once down to `FEWEST_TOKENS`, where kernels still have enough to do; the loss's workspace;
contexts on the host; activations (checkpointing, a forward pass more); a teacher of its own, on the host between its
turns; tokens down to one sequence; the precision of what is kept: the optimizer's state, and with an adapter the base.
Where the optimizer's step is the peak, only what is kept counts. Sequences generated at once are halved where
generating is the peak, down to `FEWEST_ANSWERS` before anything else. What would change the method (an adapter in place
of all weights, another teacher) is left to the user.

Deep models are looked at by shallow rehearsals: where all layers are alike, every phase's peak is a straight line in
their number. That a phase has its worst moment at the same place whatever the depth is not certain: gradients that pile
up overtake activations somewhere. So what is found in this way is rehearsed with all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opcd_fast.planning.rehearsal import Peak, Rehearsal
from opcd_fast.training.settings import OPCDConfig, goes_with

FEWEST_TOKENS = 4096
FEWEST_ANSWERS = 16
SMALL_WORKSPACE = 256 << 20
_TRIES = 20
_FEW, _MORE = 2, 5  # layers of shallow rehearsals
_WORTH = 12  # layers; below, a rehearsal of the whole takes no longer
_TEACHER_AT_WORK = ("context", "teacher", "evaluation", "evaluation rollout")  # an offloaded one is there in these

Rehearse = Callable[[OPCDConfig], Rehearsal]
Changes = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The last settings tried; when they do not fit, nothing was found that would make them."""

    config: OPCDConfig
    rehearsal: Rehearsal
    fits: bool


def find(rehearse: Rehearse, config: OPCDConfig, limit: int, *, device: str) -> Found:
    """Settings like `config` whose peak is at most `limit` bytes."""
    first = config
    changes: Changes = {}
    for _ in range(_TRIES):
        config = replace(config, **changes)
        seen = rehearse(config)
        changes = {} if seen.nbytes <= limit else _Worst(config, first, seen, limit, device).smaller()
        if not changes:
            break
    return Found(config, seen, seen.nbytes <= limit)


@dataclass(frozen=True)
class _Worst:
    """A worst moment that does not fit. Each method says which settings would make it smaller; {} where none would."""

    config: OPCDConfig
    first: OPCDConfig
    seen: Rehearsal
    limit: int
    device: str

    def smaller(self) -> Changes:
        """What is given up next."""
        if self.seen.worst in ("rollout", "evaluation rollout"):
            return (
                self.fewer_answers(FEWEST_ANSWERS) or self.teacher_away() or self.fewer_answers(1) or self.fewer_bits()
            )
        if self.seen.worst == "context":
            return self.contexts_on_host() or self.fewer_bits()
        if self.seen.worst == "optimizer":  # no activations, whatever the tokens
            return self.contexts_on_host() or self.teacher_away() or self.fewer_bits()
        cheap = self.fewer_tokens(FEWEST_TOKENS) or self.small_workspace() or self.contexts_on_host()
        return cheap or self.recomputed() or self.teacher_away() or self.fewer_tokens(1) or self.fewer_bits()

    def fewer_answers(self, fewest: int) -> Changes:
        batch = self.seen.rollout_batch
        return {"rollout_batch": batch // 2} if batch > fewest else {}

    def fewer_tokens(self, fewest: int) -> Changes:
        """What grows with the tokens is above the least of the phases; at most nine tenths, so that the search ends."""
        seen, least = self.seen, max(self.seen.longest, fewest)
        kept = min(peak.nbytes for peak in seen.peaks.values())
        share = (self.limit - kept) / max(seen.nbytes - kept, 1)
        wanted = min(int(seen.tokens * share * 0.95), int(seen.tokens * 0.9))
        return {"micro_batch_tokens": max(least, wanted // 256 * 256)} if seen.tokens > least else {}

    def small_workspace(self) -> Changes:
        scratch, given = self.part("scratch"), self.config.workspace_bytes or self.limit
        return {"workspace_bytes": SMALL_WORKSPACE} if min(scratch, given) > SMALL_WORKSPACE else {}

    def contexts_on_host(self) -> Changes:
        kept_here = self.config.prefix_device is None and self.config.teacher_path != "concat"
        return {"prefix_device": "cpu"} if self.device == "cuda" and self.matters("context KV") and kept_here else {}

    def recomputed(self) -> Changes:
        if self.config.gradient_checkpointing:
            return {}
        return {"gradient_checkpointing": True, "micro_batch_tokens": self.first.micro_batch_tokens}

    def teacher_away(self) -> Changes:
        """On the host between its turns."""
        config, worst = self.config, self.seen.worst
        at_work = worst in _TEACHER_AT_WORK or (worst == "rollout" and config.teacher_writes)
        if self.device != "cuda" or at_work or not self.matters("teacher weights"):
            return {}
        if config.teacher_offload or not goes_with(config, "teacher_offload"):
            return {}
        return self.with_room("teacher_offload", True)

    def fewer_bits(self) -> Changes:
        """For what is kept."""
        if self.config.optimizer == "adamw_torch" and self.matters("optimizer state"):
            return self.with_room("optimizer", "adamw_8bit")
        if self.config.makes_adapter and self.config.quantization == "none":
            return self.with_room("quantization", "4bit")
        return {}

    def with_room(self, name: str, value: Any) -> Changes:
        """As much at once as was asked for, because what is given up now may have made room for it."""
        return {name: value, **{n: getattr(self.first, n) for n in ("micro_batch_tokens", "rollout_batch")}}

    def part(self, name: str) -> int:
        return self.seen.peaks[self.seen.worst].parts.get(name, 0)

    def matters(self, name: str) -> bool:
        return self.part(name) * 20 > sum(self.seen.peaks[self.seen.worst].parts.values())


def depth_to_extrapolate(student: Any, teacher: Any) -> int | None:
    """How many layers both configurations have, where they say that all are alike, and these are many; else None."""
    texts = [source.get_text_config() for source in (student, teacher) if source is not None]
    alike = all(len(set(getattr(text, "layer_types", None) or ["one"])) == 1 for text in texts)
    # Two depths that grow at different rates would make two slopes of one.
    depths = {text.num_hidden_layers for text in texts}
    return min(depths) if alike and len(depths) == 1 and min(depths) >= _WORTH else None


def extrapolated(rehearse: Callable[[int], Rehearsal], layers: int) -> Rehearsal:
    """What `rehearse(layers)` would say, from two shallow ones."""
    few, more = rehearse(_FEW), rehearse(_MORE)

    def line(a: int, b: int) -> int:
        return a + (b - a) * (layers - _FEW) // (_MORE - _FEW)

    peaks = {}
    for phase, low in few.peaks.items():
        high = more.peaks[phase]
        names = {**low.parts, **high.parts}
        parts = {part: max(0, line(low.parts.get(part, 0), high.parts.get(part, 0))) for part in names}
        peaks[phase] = Peak(line(low.nbytes, high.nbytes), parts)
    return replace(more, peaks=peaks)
