"""Which settings of a run make sense, alone and together. Every refusal names the setting and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.errors import InputError
from opcd_fast.loss import PARAMETERS, check_divergence, unused_parameter
from opcd_fast.runtime import HIDDEN
from opcd_fast.training.settings.setting import settings_of

if TYPE_CHECKING:
    from opcd_fast.training.settings.config import OPCDConfig


def check(config: OPCDConfig) -> None:
    """Raises InputError for the first setting that is out of range or contradicts another one."""
    for field, known in settings_of(type(config)):
        value = getattr(config, field.name)
        if known.rule is not None and value is not None:
            known.rule(field.name, value)
    for field, known in settings_of(type(config)):
        for other, wanted in known.needs.items() if getattr(config, field.name) != field.default else ():
            found = getattr(config, other)
            if not wanted.allows(found):
                raise InputError(f"{field.name} is set, but {other}={found!r} {wanted} with it, or drop {field.name}")
    _check_divergence(config)
    _check_system(config)
    _check_running(config)
    if config.num_virtual_tokens:
        _check_prefix(config)
    _check_rollout(config)


def goes_with(config: OPCDConfig, name: str) -> bool:
    """Whether a value of `name` other than the default would go with the other settings that it needs."""
    known = next(known for field, known in settings_of(type(config)) if field.name == name)
    return all(wanted.allows(getattr(config, other)) for other, wanted in known.needs.items())


SECRET = ("rollout_url", "rollout_command")  # may hold passwords and keys
AUTO = "auto"  # a divergence that is not chosen
DEFAULT, BEFORE = "gated_kl", "reverse_kl"  # what it is then, and was in earlier versions


def _check_divergence(config: OPCDConfig) -> None:
    parameters = {name: getattr(config, name) for name in PARAMETERS}
    if config.divergence == AUTO:  # whatever it was in the run that goes on: it will be checked then
        return
    try:
        check_divergence(config.divergence, parameters)
    except ValueError as error:
        raise InputError(str(error)) from error
    unused = unused_parameter(config.divergence, parameters)
    if config.objective == "nll" and config.divergence in (DEFAULT, BEFORE):
        unused = next((name for name, value in parameters.items() if value != PARAMETERS[name].default), None)
    if unused is not None:
        what = "objective='nll'" if config.objective == "nll" else f"divergence={config.divergence!r}"
        raise InputError(f"{unused} is set, but {what} has no {unused}; drop one of them")


def _check_system(config: OPCDConfig) -> None:
    """Who writes, who scores, and what is minimised must make sense together."""
    if config.objective == "nll":
        if config.answers == "student" and config.rollout != "replay":
            raise InputError(
                "objective='nll' on the student's own answers teaches nothing: its gradient is zero on average; "
                "set answers='teacher', or rollout='replay' for those of a file"
            )
        if config.divergence not in (AUTO, DEFAULT, BEFORE):
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
    if config.kept_answers and config.teacher_mode != "frozen":
        raise InputError(
            f"kept_answers are written before the first step, so teacher_mode={config.teacher_mode!r} would move a "
            "teacher that writes no more; set kept_answers=0 or teacher_mode='frozen'"
        )


def _check_running(config: OPCDConfig) -> None:
    """What is kept, chosen and weighed while it runs."""
    if config.warmup_steps >= config.steps:
        raise InputError(
            f"warmup_steps={config.warmup_steps} of steps={config.steps}: the rate would not be reached; set fewer"
        )
    chooses = config.save_best or config.early_stop_patience
    if config.best_by != "kl" and not chooses:
        raise InputError(f"best_by={config.best_by!r} chooses nothing; set save_best or early_stop_patience")
    if chooses and not config.eval_every:
        raise InputError("save_best and early_stop_patience need held-out evaluations; set eval_every")
    if config.importance_correction != "none" and config.top_p < 1:
        raise InputError(
            f"importance_correction={config.importance_correction!r} needs top_p=1: with top_p={config.top_p} answers "
            "come from a truncated distribution on purpose"
        )
    if config.merge_for_rollout and config.num_virtual_tokens:
        raise InputError("merge_for_rollout=True: a trained prefix has no weights to fold in; drop merge_for_rollout")


def _check_prefix(config: OPCDConfig) -> None:
    name = f"num_virtual_tokens={config.num_virtual_tokens}"
    if config.lora_rank:
        raise InputError(f"{name} and lora_rank={config.lora_rank} are two adapters; set one of them")
    if config.teacher_mode != "frozen":
        raise InputError(f"{name}: a teacher in mode {config.teacher_mode!r} would have the prefix in front of the "
                         "context as well; set teacher_mode='frozen', or use lora_rank")  # fmt: skip
    if config.share_prompts:
        raise InputError(f"{name}: prompts are not shared behind a trained prefix; drop share_prompts")
    if config.sends_adapter:
        raise InputError(f"{name}: rollout={config.rollout!r} cannot run a trained prefix; use 'transformers', or "
                         "'server' with rollout_command")  # fmt: skip


def _check_rollout(config: OPCDConfig) -> None:
    for name in SECRET:
        if HIDDEN in (getattr(config, name) or ""):
            raise InputError(
                f"{name} is not kept in config.json with its secrets: give it again, --{name.replace('_', '-')} …"
            )
    for kind, name in (("server", "rollout_url"), ("replay", "rollout_file")):
        if config.rollout == kind and getattr(config, name) is None:
            raise InputError(f"rollout={kind!r} needs {name}")
    if config.use_dora and config.sends_adapter:
        raise InputError(
            f"use_dora: rollout={config.rollout!r} sends the adapter to vLLM, which refuses DoRA; drop use_dora, or "
            "use rollout='transformers', or 'server' with rollout_command"
        )
