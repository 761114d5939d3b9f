"""`python -m benchmarks.step_worker CASE TRAINER STEPS DEVICE`: one trainer's steps in a process of its own.

One more step is run before them. The last line on stdout is a JSON object: milliseconds of each step but the first,
answer tokens of those steps, peak bytes, parts of a step, threads. `benchmarks.step` starts these processes in turn.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_cases import LEARNING_RATE, RANK, Case, Job, cases, make_job


@dataclass
class Steps:
    """What is noted of each step: when it ended, its answer tokens, its parts where the trainer tells."""

    ended: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)


def main() -> None:
    case_name, trainer, steps, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), torch.device(sys.argv[4])
    every = {case.name: case for dry in (True, False) for case in cases(device, dry)}
    case, found = every[case_name], Steps()
    job = make_job(case, device)
    with tempfile.TemporaryDirectory() as folder:
        train = TRAINERS[trainer](case, job, Path(folder), steps + 1, found)
        base = _reset_peak(device)
        train()
        peak = _peak(device) - base
    if len(found.ended) != steps + 1:
        raise RuntimeError(f"{trainer} made {len(found.ended)} steps instead of {steps + 1}")
    print(json.dumps({
        "ms": [1e3 * (after - before) for before, after in zip(found.ended, found.ended[1:], strict=False)],
        "answer_tokens": found.tokens[1:], "peak_bytes": peak, "parts": found.parts[1:],
        "context": len(job.tokenizer.apply_chat_template(job.context, return_dict=False)),
        "threads": torch.get_num_threads(),
    }))  # fmt: skip


# ------------------------------------------------------------------------------------------------- the trainers


def opcd(case: Case, job: Job, folder: Path, steps: int, found: Steps) -> Callable[[], Any]:
    def note(record: dict[str, Any]) -> None:
        found.ended.append(_now())
        found.tokens.append(float(record["response_tokens"]))
        found.parts.append(record["seconds"])

    return opcd_trainer(case, job, folder, steps, note).train


def opcd_trainer(
    case: Case, job: Job, folder: Path, steps: int, note: Callable[[dict[str, Any]], None], **settings: Any
) -> Any:
    """Ours; `note` gets the record of each step, `settings` go before those of the case."""
    from opcd_fast import OPCDConfig, OPCDTrainer

    config = OPCDConfig(**opcd_settings(case, folder, steps, job.model.device.type, **settings))
    return OPCDTrainer(job.model, job.tokenizer, job.context, job.questions, config, callbacks=[note], quiet=True)


def opcd_settings(case: Case, folder: Path, steps: int, device: str, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"), "steps": steps, "batch_size": case.prompts, "max_new_tokens": case.tokens,
        "lora_rank": RANK, "learning_rate": LEARNING_RATE, "gradient_checkpointing": case.checkpointing,
        "divergence": "reverse_kl", "dtype": case.dtype, "micro_batch_tokens": case.micro_batch_tokens,
        "eval_every": 0, "save_every": 0, "plots": False, "device": device, **settings,
    }  # fmt: skip


def sdft(case: Case, job: Job, folder: Path, steps: int, found: Steps, fused: bool = False) -> Callable[[], Any]:
    """TRL's self-distillation with a context: base model as the teacher, full vocabulary, reverse KL."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    arguments = SDFTConfig(
        **_trl_settings(case, job, folder, steps), num_generations=1, max_completion_length=case.tokens,
        max_prompt_length=None, distillation_mode="full_logits", distillation_alpha=1.0, distillation_topk=None,
        teacher_model_kind="base", teacher_prompt_template="{privileged_context}\n\n{prompt}",
    )  # fmt: skip
    context = "\n".join(message["content"] for message in job.context)
    trainer = SDFTTrainer(
        model=job.model, args=arguments, processing_class=job.tokenizer, peft_config=lora(), callbacks=[_watch(found)],
        train_dataset=_rows(job, privileged_context=context),
    )  # fmt: skip
    if fused:
        from opcd_fast.integrations.trl import use_fused_loss

        use_fused_loss(trainer)
    return trainer.train


def context_distillation(case: Case, job: Job, folder: Path, steps: int, found: Steps) -> Callable[[], Any]:
    """Ours for TRL's users."""
    from trl import DistillationConfig

    from opcd_fast.integrations.trl import ContextDistillationTrainer

    settings = _trl_settings(case, job, folder, steps)
    arguments = DistillationConfig(**settings, max_completion_length=case.tokens, beta=1.0)
    return ContextDistillationTrainer(
        job.model, job.context, arguments, _rows(job), processing_class=job.tokenizer, peft_config=lora(),
        callbacks=[_watch(found)],
    ).train  # fmt: skip


TRAINERS: dict[str, Any] = {
    "opcd_fast": opcd,
    "trl-sdft": sdft,
    "trl-sdft, our loss": partial(sdft, fused=True),
    "opcd_fast in trl": context_distillation,
}


def _trl_settings(case: Case, job: Job, folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"), "max_steps": steps, "per_device_train_batch_size": case.micro_batch,
        "gradient_accumulation_steps": case.prompts // case.micro_batch, "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "gradient_checkpointing": case.checkpointing,
        "bf16": case.dtype == "bfloat16", "temperature": 1.0, "report_to": [], "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "use_cpu": job.model.device.type == "cpu",
    }  # fmt: skip


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _rows(job: Job, **columns: str) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}], **columns} for text in job.questions])


def _watch(found: Steps) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found.ended.append(_now())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            lengths = ("completions/mean_length", "self_distillation/completion_mean_length")
            for key in [key for key in lengths if key in logs][:1]:
                found.tokens.append(logs[key] * args.per_device_train_batch_size * args.gradient_accumulation_steps)

    return Watch()


# ------------------------------------------------------------------------------------------------- clock and memory


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(device: torch.device) -> int:
    """Bytes held now, from which the peak counts on. On a CPU: resident memory, after freed pages went back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here (Linux, proc(5))
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
