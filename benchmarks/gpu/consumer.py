"""The job of a consumer's card: LoRA at Qwen3-4B's shape behind a context of 8k, under the memory of 24 GB.

What the allocator held at the worst moment is compared with what `opcd plan` says of the same settings.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.step import Steps
from benchmarks.models import SHAPES
from benchmarks.schema import Values, value
from benchmarks.session import Session
from benchmarks.step_cases import Case, cases, make_job
from benchmarks.step_worker import opcd_settings

CARD = 24 << 30
JOB = Case(
    "lora on 24 GB", "main", "Qwen3-4B", prompts=32, tokens=512, dtype="bfloat16", checkpointing=True,
    micro_batch=8, micro_batch_tokens=16_384, context_words=8160,  # 12.5 GiB by the plan
)  # fmt: skip


def run(session: Session) -> None:
    case = cases(session.device, dry=True)[0] if session.dry else JOB
    session.row("cap", lambda: _cap(session))
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(session, case, Path(folder), traced=False, rollout_batch=case.prompts)
        steps.run()
        session.row("plan", lambda: _plan(session, case, Path(folder), steps.peak), needs=5)


def _cap(session: Session) -> Values:
    """What of a card of 24 GB a process's tensors can have."""
    from opcd_fast.planning import RESERVED

    session.on_device("a limit on its memory")
    total = torch.cuda.get_device_properties(session.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (CARD - RESERVED) / total))
    return {"bytes": value(CARD - RESERVED, "bytes")}


def _plan(session: Session, case: Case, folder: Path, measured: int) -> Values:
    """The worst moment of every part of a step as the plan has it, and the plan over what was measured."""
    from opcd_fast import OPCDConfig
    from opcd_fast.planning import extrapolated
    from opcd_fast.planning.rehearsal import job_of, rehearse
    from opcd_fast.training.answers import read_training_prompts

    job = make_job(case, torch.device("meta"))
    config = OPCDConfig(**opcd_settings(case, folder, 1, "cuda", rollout_batch=case.prompts))
    planned = job_of(read_training_prompts(job.questions, None, job.context, job.tokenizer, config), config)

    def whole(layers: int) -> Any:
        return rehearse(config, planned, job.model.config, device="cuda", dtype=getattr(torch, case.dtype),
                        backend="triton", layers=layers)  # fmt: skip

    found = extrapolated(whole, SHAPES[case.model].layers)
    values = {"plan": value(found.nbytes, "bytes")}
    if measured:
        values = {"plan over measured": value(found.nbytes / measured, "1"), "measured": value(measured, "bytes"),
                  **values}  # fmt: skip
    return values | {part: value(peak.nbytes, "bytes") for part, peak in found.peaks.items()}
