"""Does a run fit on a GPU, and with which settings: what was asked, rehearsed and searched."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from opcd_fast.errors import InputError
from opcd_fast.loss import resolve_backend
from opcd_fast.models import pick_dtype, seam
from opcd_fast.planning.rehearsal import Job, Rehearsal, rehearse
from opcd_fast.planning.search import Found, depth_to_extrapolate, extrapolated, find
from opcd_fast.rollout import MOST
from opcd_fast.teacher import default_batch_bytes
from opcd_fast.training.settings import OPCDConfig
from opcd_fast.training.step import Windows, check_length

RESERVED = 768 << 20  # bytes of a GPU that no tensor gets: driver, kernels, libraries' workspaces. Not measured.
USABLE = 0.94  # of the rest; the allocator's pieces do not fill it. Not measured.


@dataclass(frozen=True)
class Plan:
    """asked: settings as given; found: the ones that fit, or the last tried. gpu: bytes it has; limit: for tensors."""

    asked: OPCDConfig
    found: Found
    gpu: int
    limit: int


def plan_run(
    config: OPCDConfig, job: Job, student: Any, teacher: Any = None, *, gpu: str, search: bool = True,
    told: Callable[[str], None] = lambda line: None,
) -> Plan:  # fmt: skip
    """Whether a run fits into `gpu` ("24GB"), with `search` perhaps with other settings.

    student, teacher: transformers configurations; teacher None where it is the student's own base. With device="cpu"
    in the config, `gpu` is the main memory. told: gets a line before each rehearsal of all layers.

    Raises InputError for a memory that is no size, prompts that no window holds, and what `rehearse` refuses.
    """
    from transformers import AutoModelForCausalLM

    on_cpu, available = config.device == "cpu", gpu_bytes(gpu)
    limit = int(available if on_cpu else (available - RESERVED) * USABLE)
    if limit <= 0:
        raise InputError(f"gpu={gpu!r} is less than the {RESERVED >> 20} MiB that CUDA itself takes")
    own, other = (seam.longest_input_of(source.get_text_config()) for source in (student, teacher or student))
    windows = Windows(own, other, config.num_virtual_tokens)
    for prompt, suffix, index in (*job.prompts, *job.held_out):
        check_length(prompt, job.contexts[index], suffix, config.max_new_tokens, windows)
    # A GPU computes in bf16 unless told otherwise; it need not be here for that.
    cpu = torch.device("cpu")
    dtype = pick_dtype(config.dtype, cpu) if on_cpu or config.dtype != "auto" else torch.bfloat16
    device, settings = "cpu" if on_cpu else "cuda", config
    if config.teacher_batch_bytes is None:
        # Its default is a share of the weights: of all layers, also in a rehearsal of a few.
        how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
        with torch.device("meta"):
            body = seam.body_of(AutoModelForCausalLM.from_config(teacher or student, **how))
        settings = replace(config, teacher_batch_bytes=default_batch_bytes(body))
    asked = settings

    def whole(settings: OPCDConfig, layers: int | None = None) -> Rehearsal:
        if layers is None:
            other = ", ".join(f"{name} {value}" for name, value in changes(asked, settings).items())
            told(f"rehearsing a step {f'with {other}' if other else 'as given'}, without data")
        backend = settings.loss_backend
        if on_cpu:
            backend = resolve_backend(backend, cpu, torch.float32)
        elif backend == "auto":
            backend = "triton"
        return rehearse(
            settings, job, student, teacher, device=device, dtype=dtype, backend=backend, layers=layers,
            limit=limit if layers is None else 0,  # no copy that depends on the memory of all layers
        )  # fmt: skip

    if not search:
        seen = whole(settings)
        return Plan(settings, Found(settings, seen, seen.nbytes <= limit), available, limit)
    start, layers = settings, depth_to_extrapolate(student, teacher)
    if layers is not None:
        # A batch sized to memory would be sized to that of a few layers.
        sized = config.rollout_batch or min(config.batch_size * config.rollouts_per_prompt, MOST)
        quick = find(
            lambda tried: extrapolated(lambda few: whole(tried, few), layers), replace(settings, rollout_batch=sized),
            limit, device=device,
        )  # fmt: skip
        if not quick.fits:
            return Plan(settings, quick, available, limit)
        start = quick.config
    return Plan(settings, find(whole, start, limit, device=device), available, limit)


def changes(asked: OPCDConfig, found: OPCDConfig) -> dict[str, Any]:
    """Settings that differ, as the run should have them."""
    before, after = dataclasses.asdict(asked), dataclasses.asdict(found)
    return {name: value for name, value in after.items() if value != before[name]}


def gpu_bytes(text: str) -> int:
    """ "24GB", "23.5 GiB", "800MB" in bytes. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])i?B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise InputError(f"gpu={text!r} is no size of memory; write 24GB or 800MB")
    return int(float(match[1]) * (2**30 if match[2].upper() == "G" else 2**20))
