"""Which settings of a run make sense, alone and together. Every refusal names the setting and what to do."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from opcd_fast.errors import InputError
from opcd_fast.loss import PARAMETERS, check_divergence, unused_parameter

if TYPE_CHECKING:
    from opcd_fast.training.settings.config import OPCDConfig

OFFLOAD_NEEDS = {"teacher_mode": "frozen", "teacher_device": "auto", "teacher_quantization": "none"}
TRACKERS = ("tensorboard", "wandb", "trackio")  # each also the name of its package

# Which kinds of rollout use which settings; setting another one is an error.
ROLLOUT_SETTINGS = {
    ("transformers", "generate", "replay"): ("merge_for_rollout",),  # replay: its evaluations
    ("server",): (
        "rollout_url", "rollout_command", "rollout_timeout", "rollout_tries", "rollout_concurrency",
        "rollout_logprobs",
    ),
    ("server", "vllm"): ("rollout_model",),
    ("vllm",): ("rollout_gpu_share",),
    ("replay",): ("rollout_file",),
}  # fmt: skip


def check(config: OPCDConfig) -> None:
    """Raises InputError for the first setting that is out of range or contradicts another one."""
    rules = _Rules(config)
    _check_numbers(config, rules)
    _check_divergence(config)
    rules.one_of("teacher_mode", "frozen", "live", "ema", "periodic")
    _check_system(config, rules)
    _check_teacher(config, rules)
    rules.one_of("teacher_quantization", "none", "4bit")
    rules.one_of("quantization", "none", "4bit")
    rules.one_of("optimizer", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor")
    rules.one_of("normalize", "sequence", "token")
    rules.one_of("dtype", "auto", "float32", "bfloat16")
    rules.one_of("loss_backend", "auto", "triton", "native", "torch")
    _check_running(config, rules)
    _check_caches(config, rules)
    _check_adapter(config)
    _check_rollout(config, rules)
    if config.merge_for_rollout and not config.lora_rank:
        remedy = "drop merge_for_rollout" if config.num_virtual_tokens else "set lora_rank or drop merge_for_rollout"
        raise InputError(f"merge_for_rollout=True needs weights to merge, those of LoRA; {remedy}")


class _Rules:
    """What a single setting may be."""

    def __init__(self, config: OPCDConfig) -> None:
        self._config = config
        self._defaults = {field.name: field.default for field in dataclasses.fields(config)}

    def is_default(self, name: str) -> bool:
        return getattr(self._config, name) == self._defaults[name]

    def at_least(self, name: str, least: int) -> None:
        value = getattr(self._config, name)
        if value < least:
            raise InputError(f"{name}={value!r} must be a whole number of at least {least}")

    def one_of(self, name: str, *allowed: str) -> None:
        value = getattr(self._config, name)
        if value not in allowed:
            raise InputError(f"{name}={value!r} is not available; use {' or '.join(map(repr, allowed))}")

    def within(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self._config, name)
        if not ((low < value if open_low else low <= value) and value <= high):  # refuses NaN too
            start = "above" if open_low else "from"
            raise InputError(f"{name}={value!r} must be a number {start} {low} up to {high}")


def _check_numbers(config: OPCDConfig, rules: _Rules) -> None:
    for name in ("steps", "batch_size", "rollouts_per_prompt", "max_new_tokens", "eval_batch"):
        rules.at_least(name, 1)
    for name in ("lora_rank", "num_virtual_tokens", "eval_every", "save_every", "seed"):
        rules.at_least(name, 0)
    for name in ("early_stop_patience", "kept_answers", "task_episodes"):
        rules.at_least(name, 0)
    rules.at_least("keep_checkpoints", 1)
    bounds = ("micro_batch_tokens", "workspace_bytes", "max_prefix_bytes", "teacher_batch_bytes", "rollout_batch")
    for name in (*bounds, "lora_alpha"):
        if getattr(config, name) is not None:
            rules.at_least(name, 1)
    rules.within("temperature", 0, 100, open_low=True)
    rules.within("top_p", 0, 1, open_low=True)
    if config.learning_rate is not None:
        rules.within("learning_rate", 0, 1, open_low=True)
    rules.within("weight_decay", 0, 1)
    rules.within("max_grad_norm", 0, 1e9)


def _check_divergence(config: OPCDConfig) -> None:
    parameters = {name: getattr(config, name) for name in PARAMETERS}
    try:
        check_divergence(config.divergence, parameters)
    except ValueError as error:
        raise InputError(str(error)) from error
    unused = unused_parameter(config.divergence, parameters)
    if unused is not None:
        raise InputError(f"{unused} is set, but divergence={config.divergence!r} has no {unused}; drop one of them")


def _check_teacher(config: OPCDConfig, rules: _Rules) -> None:
    rules.within("teacher_ema_decay", 0, 1)
    rules.at_least("teacher_sync_every", 1)
    for name, mode in (("teacher_ema_decay", "ema"), ("teacher_sync_every", "periodic")):
        if config.teacher_mode != mode and not rules.is_default(name):
            raise InputError(
                f"{name} is set, but teacher_mode={config.teacher_mode!r} has none; drop it, or set "
                f"teacher_mode={mode!r}"
            )
    if config.teacher_offload:
        for name, only in OFFLOAD_NEEDS.items():
            if getattr(config, name) != only:
                raise InputError(
                    f"teacher_offload needs {name}={only!r}, not {getattr(config, name)!r}; drop one of them"
                )


def _check_caches(config: OPCDConfig, rules: _Rules) -> None:
    rules.one_of("teacher_path", "auto", "merge", "pad", "concat")
    if config.teacher_path == "concat" and config.prefix_device is not None:
        raise InputError("prefix_device is set, but teacher_path='concat' keeps no caches; drop one of them")


def _check_adapter(config: OPCDConfig) -> None:
    if config.lora_alpha is not None and not config.lora_rank:
        raise InputError("lora_alpha is set but lora_rank is 0; set lora_rank or drop lora_alpha")
    if config.use_dora and not config.lora_rank:
        raise InputError("use_dora is set but lora_rank is 0; set lora_rank, or drop use_dora")
    if config.num_virtual_tokens:
        _check_prefix(config)


def _check_running(config: OPCDConfig, rules: _Rules) -> None:
    rules.one_of("best_by", "kl", "fixed_kl", "score")
    rules.one_of("importance_correction", "none", "token", "sequence")
    rules.within("importance_clip", 0, 1e9, open_low=True)
    if config.early_stop_delta is not None:
        rules.within("early_stop_delta", 0, 1e9)
        if not config.early_stop_patience:
            raise InputError("early_stop_delta is set, but early_stop_patience is 0; set it, or drop the delta")
    chooses = config.save_best or config.early_stop_patience
    if config.best_by != "kl" and not chooses:
        raise InputError(f"best_by={config.best_by!r} chooses nothing; set save_best or early_stop_patience")
    if chooses and not config.eval_every:
        raise InputError("save_best and early_stop_patience need held-out evaluations; set eval_every")
    if config.importance_correction == "none" and not rules.is_default("importance_clip"):
        raise InputError("importance_clip is set, but importance_correction is 'none'; drop one of them")
    if config.importance_correction != "none" and config.top_p < 1:
        raise InputError(
            f"importance_correction={config.importance_correction!r} needs top_p=1: with top_p={config.top_p} answers "
            "come from a truncated distribution on purpose"
        )
    for name in config.trackers:
        if name not in TRACKERS:
            raise InputError(f"trackers: {name!r} is not available; use {', '.join(map(repr, TRACKERS))}")


def _check_system(config: OPCDConfig, rules: _Rules) -> None:
    """Who writes, who scores, and what is minimised must make sense together."""
    rules.one_of("answers", "student", "teacher")
    rules.one_of("objective", "divergence", "nll")
    if config.objective == "nll":
        if config.answers == "student" and config.rollout != "replay":
            raise InputError(
                "objective='nll' on the student's own answers teaches nothing: its gradient is zero on average; "
                "set answers='teacher', or rollout='replay' for those of a file"
            )
        if config.divergence != "reverse_kl":
            raise InputError(f"divergence={config.divergence!r} is set, but objective='nll' has none; drop one")
        if config.answers != "teacher" and config.teacher_mode != "frozen":
            raise InputError(f"teacher_mode={config.teacher_mode!r}: with objective='nll' the teacher scores nothing")
    if config.answers == "teacher" and config.rollout == "replay":
        raise InputError("answers='teacher' and rollout='replay' both say who answers; drop one of them")
    if config.answers == "teacher" and config.rollout in ("server", "vllm") and config.teacher_mode != "live":
        raise InputError(
            f"rollout={config.rollout!r} samples the student, and answers='teacher' with teacher_mode="
            f"{config.teacher_mode!r} other weights; set rollout='transformers' or teacher_mode='live'"
        )
    off_policy = "objective='nll'" if config.objective == "nll" else "answers='teacher'"
    if config.importance_correction != "none" and (config.objective == "nll" or config.answers == "teacher"):
        raise InputError(
            f"importance_correction={config.importance_correction!r} weighs the student's own answers; {off_policy} "
            "has none: drop one of them"
        )
    if config.kept_answers and config.answers != "teacher":
        raise InputError("kept_answers is set, but the student's answers are always fresh; set answers='teacher'")
    if config.kept_answers and config.teacher_mode != "frozen":
        raise InputError(
            f"kept_answers are written before the first step, so teacher_mode={config.teacher_mode!r} would move a "
            "teacher that writes no more; set kept_answers=0 or teacher_mode='frozen'"
        )


def _check_prefix(config: OPCDConfig) -> None:
    name = f"num_virtual_tokens={config.num_virtual_tokens}"
    if config.lora_rank:
        raise InputError(f"{name} and lora_rank={config.lora_rank} are two adapters; set one of them")
    if config.teacher_mode != "frozen":
        raise InputError(f"{name}: a teacher in mode {config.teacher_mode!r} would have the prefix in front of the "
                         "context as well; set teacher_mode='frozen', or use lora_rank")  # fmt: skip
    if config.share_prompts:
        raise InputError(f"{name}: prompts are not shared behind a trained prefix; drop share_prompts")
    sends_adapter = config.rollout == "vllm" or (config.rollout == "server" and config.rollout_command is None)
    if sends_adapter:
        raise InputError(f"{name}: rollout={config.rollout!r} cannot run a trained prefix; use 'transformers', or "
                         "'server' with rollout_command")  # fmt: skip


def _check_rollout(config: OPCDConfig, rules: _Rules) -> None:
    rules.one_of("rollout", "transformers", "generate", "server", "vllm", "replay")
    rules.one_of("rollout_logprobs", "raw", "processed")
    rules.at_least("rollout_tries", 1)
    rules.at_least("rollout_concurrency", 1)
    rules.within("rollout_timeout", 0, 86400, open_low=True)
    rules.within("rollout_gpu_share", 0, 1, open_low=True)
    for kind, name in (("server", "rollout_url"), ("replay", "rollout_file")):
        if config.rollout == kind and getattr(config, name) is None:
            raise InputError(f"rollout={kind!r} needs {name}")
    sends_adapter = config.rollout == "vllm" or (config.rollout == "server" and config.rollout_command is None)
    if config.use_dora and sends_adapter:
        raise InputError(
            f"use_dora: rollout={config.rollout!r} sends the adapter to vLLM, which refuses DoRA; drop use_dora, or "
            "use rollout='transformers', or 'server' with rollout_command"
        )
    for kinds, names in ROLLOUT_SETTINGS.items():
        for name in names:
            if config.rollout not in kinds and not rules.is_default(name):
                raise InputError(f"{name} is set, but rollout={config.rollout!r} does not use it; drop one of them")
