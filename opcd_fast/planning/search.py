"""The fastest settings that fit: what costs least time is given up first, and only as much of it as is needed.

In order: tokens run at once down to `FEWEST_TOKENS`, where kernels still have enough to do; the loss's workspace;
contexts on the host; activations (checkpointing, a forward pass more); a teacher of its own, on the host between its
turns; tokens down to one sequence; the precision of what is kept: the optimizer's state, and with an adapter the base.
Where the optimizer's step is the peak, only what is kept counts. Sequences generated at once are halved where
generating is the peak, down to `FEWEST_ANSWERS` before anything else. What would change the method (an adapter in place
of all weights, another teacher) is left to the user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opcd_fast.planning.rehearsal import Rehearsal
from opcd_fast.training.settings import OPCDConfig, goes_with

FEWEST_TOKENS = 4096
FEWEST_ANSWERS = 16
SMALL_WORKSPACE = 256 << 20
_TRIES = 20
_TEACHER_AT_WORK = ("context", "teacher", "evaluation", "evaluation rollout")  # an offloaded one is there in these

Rehearse = Callable[[OPCDConfig], Rehearsal]


@dataclass(frozen=True)
class Found:
    """The last settings tried; when they do not fit, nothing was found that would make them."""

    config: OPCDConfig
    rehearsal: Rehearsal
    fits: bool


def find(rehearse: Rehearse, config: OPCDConfig, limit: int, *, device: str) -> Found:
    """Settings like `config` whose peak is at most `limit` bytes."""
    first, next_one = config, config
    for _ in range(_TRIES):
        config = next_one
        seen = rehearse(config)
        smaller = None if seen.nbytes <= limit else _smaller(config, first, seen, limit, device)
        if smaller is None:
            break
        next_one = smaller
    return Found(config, seen, seen.nbytes <= limit)


def _smaller(
    config: OPCDConfig, first: OPCDConfig, seen: Rehearsal, limit: int, device: str
) -> OPCDConfig | None:
    parts = seen.peaks[seen.worst].parts
    if seen.worst in ("rollout", "evaluation rollout"):
        away = _teacher_away(config, first, seen, device) if seen.rollout_batch <= FEWEST_ANSWERS else None
        if away is None and seen.rollout_batch > 1:
            return replace(config, rollout_batch=seen.rollout_batch // 2)
        return away or _rounded(config, first, seen)
    if seen.worst == "context":
        return _on_host(config, parts, device) or _rounded(config, first, seen)
    if seen.worst == "optimizer":  # no activations, whatever the tokens
        away = _on_host(config, parts, device) or _teacher_away(config, first, seen, device)
        return away or _rounded(config, first, seen)
    least = min(seen.tokens, max(seen.longest, FEWEST_TOKENS))
    if seen.tokens > least:
        return replace(config, micro_batch_tokens=_tokens_that_fit(seen, limit, least))
    if parts.get("scratch", 0) > SMALL_WORKSPACE and (config.workspace_bytes or limit) > SMALL_WORKSPACE:
        return replace(config, workspace_bytes=SMALL_WORKSPACE)
    moved = _on_host(config, parts, device)
    if moved is not None:
        return moved
    if not config.gradient_checkpointing:
        return replace(config, gradient_checkpointing=True, micro_batch_tokens=first.micro_batch_tokens)
    away = _teacher_away(config, first, seen, device)
    if away is not None:
        return away
    if seen.tokens > seen.longest:
        return replace(config, micro_batch_tokens=_tokens_that_fit(seen, limit, seen.longest))
    return _rounded(config, first, seen)


def _tokens_that_fit(seen: Rehearsal, limit: int, least: int) -> int:
    """What grows with the tokens is above the least of the phases; at most nine tenths, so that the search ends."""
    kept = min(peak.nbytes for peak in seen.peaks.values())
    share = (limit - kept) / max(seen.nbytes - kept, 1)
    wanted = min(int(seen.tokens * share * 0.95), int(seen.tokens * 0.9))
    return max(least, wanted // 256 * 256)


def _matters(parts: dict[str, int], part: str) -> bool:
    return parts.get(part, 0) * 20 > sum(parts.values())


def _on_host(config: OPCDConfig, parts: dict[str, int], device: str) -> OPCDConfig | None:
    if device != "cuda" or not _matters(parts, "context KV"):
        return None
    if config.prefix_device is not None or config.teacher_path == "concat":
        return None
    return replace(config, prefix_device="cpu")


def _teacher_away(config: OPCDConfig, first: OPCDConfig, seen: Rehearsal, device: str) -> OPCDConfig | None:
    """On the host between its turns, which may leave room for more at once again."""
    at_work = seen.worst in _TEACHER_AT_WORK or (seen.worst == "rollout" and config.answers == "teacher")
    if device != "cuda" or at_work or not _matters(seen.peaks[seen.worst].parts, "teacher weights"):
        return None
    if config.teacher_offload or not goes_with(config, "teacher_offload"):
        return None
    return _with_room(config, first, teacher_offload=True)


def _rounded(config: OPCDConfig, first: OPCDConfig, seen: Rehearsal) -> OPCDConfig | None:
    """What is kept, in fewer bits."""
    if config.optimizer == "adamw_torch" and _matters(seen.peaks[seen.worst].parts, "optimizer state"):
        return _with_room(config, first, optimizer="adamw_8bit")
    if config.makes_adapter and config.quantization == "none":
        return _with_room(config, first, quantization="4bit")
    return None


def _with_room(config: OPCDConfig, first: OPCDConfig, **given_up: Any) -> OPCDConfig:
    """As much at once as was asked for, because what is given up now may have made room for it."""
    given_up |= {name: getattr(first, name) for name in ("micro_batch_tokens", "rollout_batch")}
    return replace(config, **given_up)
