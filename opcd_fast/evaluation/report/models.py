"""Base, student and teacher of a finished run, each loaded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opcd_fast.errors import InputError
from opcd_fast.evaluation import MICRO_BATCH_TOKENS, Reader
from opcd_fast.models import base_of_adapter, load_model, load_tokenizer, pick_device, place_of, seam, with_adapter
from opcd_fast.rollout import Completion, TransformersRollout, stop_token_ids
from opcd_fast.training.engines import fingerprint, shared_vocabulary
from opcd_fast.training.run import FileHashes, differing, weight_files

BASE, SHOWN, STUDENT, BOTH = "base", "base + context", "student", "student + context"
ARMS = (BASE, SHOWN, STUDENT, BOTH)


@dataclass
class Side:
    """A model as it answers and scores: all of it, or without its adapters."""

    model: Any
    off: bool  # adapters off
    rollout: TransformersRollout
    reading: Mapping[str, Any]  # how a `Reader` reads: path, micro_batch_tokens

    def acting(self) -> AbstractContextManager[None]:
        return seam.without_adapters(self.model) if self.off else nullcontext()

    def answers(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Completion]:
        with self.acting():
            return self.rollout.generate(prompts, **sampling)

    def reader(self, prompts: Sequence[Sequence[int]], groups: Sequence[int] | None = None) -> Reader:
        adapter = "disabled" if self.off else "active"
        return Reader(self.model, prompts, adapter=adapter, groups=groups, **self.reading)


@dataclass
class RunModels:
    """teacher is base unless the run had another model as its teacher."""

    base: Side
    student: Side
    teacher: Side
    tokenizer: Any
    dtype: torch.dtype
    base_name: str
    is_adapter: bool

    def of(self, arm: str) -> Side:
        """Who answers in an arm: a run's other teacher has "base + context"."""
        return {BASE: self.base, SHOWN: self.teacher}.get(arm, self.student)


def load_run(
    run: Path, record: Mapping[str, Any], settings: dict[str, Any], model: str | None,
    trust_remote_code: bool = False,
) -> RunModels:  # fmt: skip
    """The models of `run`. model: where the base is now; None: where the run found it. trust_remote_code: see
    `load_model`; what the run's settings say of it does not count.

    Raises InputError: no final weights, a base that is not here or not the one the run started from.
    """
    final = run / "final"
    if not final.is_dir():
        raise InputError(f"{str(run)!r} has no final/ (the trained weights); finish the run, with --resume")
    for name in ("quantization", "teacher_quantization"):
        if settings.get(name, "none") != "none":
            raise InputError(f"the run has {name}={settings[name]!r}; reports on packed weights are not available yet")
    adapter_of = base_of_adapter(final)
    base_name = model or record["base"]["name"] or adapter_of
    if base_name is None:
        raise InputError("the run does not say what it started from; name the base model with --model")
    if record["base"]["files"]:
        changed = differing(record["base"]["files"], weight_files(place_of(base_name), FileHashes()))
        if changed:
            raise InputError(f"base {base_name!r} is not what the run started from: {changed[0]}; give it with --model")
    place: dict[str, Any] = {name: settings.get(name, "auto") for name in ("dtype", "device")}
    try:
        pick_device(place["device"], make_current=False)
    except InputError:  # it was another machine's
        place["device"] = "auto"
    place["trust_remote_code"] = trust_remote_code
    base = load_model(base_name, **place)
    if not record["base"]["files"] and record["base"]["fingerprint"] not in (None, fingerprint(base)):
        raise InputError(f"base {base_name!r} has other weights than the model in memory that the run started from")
    tokenizer = load_tokenizer(final, trust_remote_code)
    if adapter_of is not None:
        # On a CPU memory is there for a second copy, and a base without PEFT's layers in it is faster.
        own = base if base.device.type == "cuda" else load_model(base_name, **place)
        student = with_adapter(own, final).eval()
    else:
        student = load_model(final, **place)
    teacher, other = base, record["teacher"]
    if other is not None:
        if other["name"] is None:
            raise InputError("the run's teacher was a model in memory, which cannot be loaded again")
        teacher = load_model(other["name"], **place)

    size = shared_vocabulary(student, teacher, tokenizer, tokenizer)
    stop = stop_token_ids(tokenizer, base, settings.get("stop_tokens") or ())
    batch = settings.get("rollout_batch", 64)
    sampler: dict[str, Any] = {"stop_token_ids": stop, "max_batch": batch, "vocab_size": size}
    tokens = settings.get("micro_batch_tokens") or MICRO_BATCH_TOKENS
    reading = {"path": settings.get("teacher_path", "auto"), "micro_batch_tokens": tokens}

    def side(one: Any, off: bool) -> Side:
        rollout = TransformersRollout(one, merge_adapter=False if off else None, **sampler)
        return Side(one, off, rollout, reading)

    shared = adapter_of is not None and base.device.type == "cuda"
    base_side = side(student if shared else base, shared)
    return RunModels(
        base=base_side,
        student=side(student, False),
        teacher=base_side if teacher is base else side(teacher, False),
        tokenizer=tokenizer,
        dtype=base.dtype,
        base_name=base_name,
        is_adapter=adapter_of is not None,
    )
