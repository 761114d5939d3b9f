"""An edited context moved into a run's weights, without losing the rest.

The student starts from the finished run's weights; the teacher is the base of that run with the NEW context, never the
student. Replay prompts keep the base with the OLD context as their teacher, and so hold what shall stay.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opcd_fast.data import Prompt, read_prompts
from opcd_fast.errors import InputError
from opcd_fast.models import Place, base_of_adapter, place_of
from opcd_fast.training.run.provenance import FileHashes, differing, tokenizer_files, weight_files
from opcd_fast.training.run.record import PROMPTS, Origins, question_hash, read_record
from opcd_fast.training.settings import OPCDConfig


@dataclass(frozen=True)
class Start:
    """A finished run to go on from. Made by `start_from`."""

    run: Path
    record: dict[str, Any]
    base: str
    is_adapter: bool
    columns: dict[str, Any]  # how files of prompts are read

    def models(self, **place: Any) -> tuple[Any, Any]:
        """Student, and teacher model: None for an adapter, whose base is the teacher."""
        from opcd_fast.models import load_model, with_adapter

        final = str(self.run / "final")
        if not self.is_adapter:
            return load_model(final, **place), load_model(self.base, **place)
        return with_adapter(load_model(self.base, **place), final, is_trainable=True), None

    def replayed(self, replay: str, prompts: Sequence[Prompt], held_out: Sequence[Prompt], seed: int) -> list[Prompt]:
        """Prompts whose teacher sees the old context.

        replay: a file, or the share of all training prompts that shall be replayed ones, drawn from the run's own.
        Raises InputError when there is none that the new prompts do not have as well: one prompt cannot have two
        contexts.
        """
        share = _number(replay)
        if share is not None and not 0 < share < 1:
            raise InputError(f"replay={replay} must be a file, or a share above 0 and below 1")
        source, columns = (replay, self.columns) if share is None else (self.run / PROMPTS, {})
        taken = {question_hash(prompt) for prompt in (*prompts, *held_out)}
        found = [p for p in read_prompts(source, "replay", **columns) if question_hash(p) not in taken]
        if share is not None:
            wanted = max(1, round(share / (1 - share) * len(prompts)))
            random.Random(seed).shuffle(found)
            found = found[:wanted]
        if not found:
            raise InputError(
                f"replay={replay!r}: all of its prompts are among the new ones, where the new context is their "
                "teacher's; give a file with prompts about what shall stay"
            )
        old = self.record["context"]
        if old is None and any(prompt.privileged_context is None for prompt in found):
            raise InputError("replay: the run had no context of its own, so each replayed prompt needs its own")
        return [replace(prompt, privileged_context=prompt.context_or(old)) for prompt in found]

    def described(self, origins: Origins, replayed: int) -> None:
        """Say in the new run's record where it came from."""
        origins.base, origins.teacher = self.base, None
        weights = weight_files(Place(self.run / "final"), FileHashes())
        origins.more["init"] = {
            "run": self.run.resolve().name,
            "context_sha256": self.record["context_sha256"],
            "weights": weights,
            "replayed": replayed,
        }


def start_from(run: str, model: str, config: OPCDConfig) -> Start:
    """Check that `run` can be gone on with. model: the base, which must be the run's.

    Raises InputError: no finished run with a record, another base or tokenizer, settings that do not fit.
    """
    folder = Path(run)
    record = read_record(folder)
    if record is None or not (folder / "final").is_dir():
        raise InputError(f"init={run!r} is no finished run with a run.json; give the output_dir of `opcd train`")
    if record["teacher"] is not None:
        raise InputError(f"init={run!r} learned from another model than its base; --init goes on with the base alone")
    place, hashes = place_of(model), FileHashes()
    if not record["base"]["files"]:
        raise InputError(f"init={run!r} started from a model in memory, which cannot be compared with {model!r}")
    named = record["base"]["name"]
    parts = (
        ("base", record["base"]["files"], weight_files(place, hashes)),
        ("tokenizer", record["tokenizer"]["files"], tokenizer_files(place.folder, hashes)),
    )
    for part, before, now in parts:
        changed = differing(before, now)
        if changed:
            raise InputError(
                f"init={run!r}: its {part} is not that of --model {model!r} ({changed[0]}); use --model {named!r} as "
                "it was, or train anew on the other base"
            )
    is_adapter = base_of_adapter(folder / "final") is not None
    if config.makes_adapter:
        kind = "adapter goes on as it is" if is_adapter else "whole weights go on, without an adapter"
        raise InputError(f"init: the run's {kind}; drop {'lora_rank' if config.lora_rank else 'num_virtual_tokens'}")
    return Start(folder, record, model, is_adapter, config.columns())


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
