"""Who answers in a run: the student, and the teacher with the context in front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from opcd_fast.data import RenderedPrompt, whole_prompt
from opcd_fast.errors import InputError
from opcd_fast.models import SMOLLM2, resolve, seam
from opcd_fast.rollout import Choice, Completion, Rollout, TransformersRollout
from opcd_fast.training.engines import Engine, SharedSampler
from opcd_fast.training.settings import OPCDConfig
from opcd_fast.training.step import Teachers

AtWork = Callable[[], AbstractContextManager[Any]]


class Samplers:
    """The samplers of a run, made once, before anything is written. With several ranks all methods are collective.

    student: in training. held_out: at evaluations, always the student's own. first: `with first_weights()` it answers
    as the teacher did before training, context or not; None when these weights are not kept (full fine-tuning, a moving
    teacher, and no evaluation).

    Args:
        prompts: all that will be asked for in training; a file for replay must have answers to every one of them.
        held_out: and at evaluations. first_turns: both are only the beginnings of longer ones, a task's.
        contexts: tokens of the prompts' contexts.
        common: of all samplers `stop_token_ids`, `vocab_size`, and as `dtype` the run's compute type.
    Raises:
        InputError: the settings cannot work with this model.
    """

    def __init__(
        self,
        config: OPCDConfig,
        teachers: Teachers,
        engine: Engine,
        prompts: Sequence[RenderedPrompt],
        held_out: Sequence[RenderedPrompt],
        contexts: Sequence[Sequence[int]],
        tokenizer: Any,
        *,
        first_turns: bool,
        **common: Any,
    ) -> None:
        self._pair, self._engine, self._contexts, self.common = teachers.pair, engine, contexts, common
        model = self._pair.student
        if engine.sharded:
            config = replace(config, merge_for_rollout=False)
        asked, every = [row.student_ids for row in prompts], (*prompts, *held_out)
        whole = self._whole(every) if config.teacher_writes and config.teacher_mode == "live" else ()
        longest = max(map(len, (*whole, *(row.student_ids for row in every)))) + config.max_new_tokens
        self.student: Rollout = make_rollout(
            config, model, tokenizer=tokenizer, prompts=asked, longest=None if first_turns else longest, **common
        )
        self.held_out = local_rollout(config, model, **common) if config.rollout == "replay" else self.student

        def reads(other: Any) -> Rollout:
            return _in_process(config, other, merge_adapter=False, **common)

        self.first: Any = None if self._pair.reference is None else reads(self._pair.reference)
        shares_base = self._pair.reference_adapter == "disabled"
        self.first_weights: AtWork = partial(seam.without_adapters, model) if shares_base else teachers.at_work
        self._teacher: Any = self.first
        self._teacher_weights: AtWork = self.first_weights
        if config.teacher_mode != "frozen":  # whatever weights it has at that moment
            self._teacher_weights = nullcontext
            self._teacher = self.held_out if self._pair.teacher is model else reads(self._pair.teacher)

    def student_writes(self, rows: Sequence[RenderedPrompt], sampling: Mapping[str, Any]) -> list[Completion]:
        """The student's answers, without the context."""
        return self._written(self.student, self._pair.student, [row.student_ids for row in rows], sampling)

    def held_out_writes(self, rows: Sequence[RenderedPrompt], sampling: Mapping[str, Any]) -> list[Completion]:
        """The same at an evaluation."""
        return self._written(self.held_out, self._pair.student, [row.student_ids for row in rows], sampling)

    def teacher_writes(self, rows: Sequence[RenderedPrompt], sampling: Mapping[str, Any]) -> list[Completion]:
        """Answers with the context in front, of what the student learns from."""
        with self._teacher_weights():
            return self._written(self._teacher, self._pair.teacher, self._whole(rows), sampling)

    def first_writes(self, rows: Sequence[RenderedPrompt], sampling: Mapping[str, Any]) -> list[Completion]:
        """The same of its first weights."""
        with self.first_weights():
            return self._written(self.first, self._pair.reference, self._whole(rows), sampling)

    def _whole(self, rows: Sequence[RenderedPrompt]) -> list[Sequence[int]]:
        return [whole_prompt(row, self._contexts) for row in rows]

    def _written(
        self, sampler: Rollout, model: Any, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any]
    ) -> list[Completion]:
        if not prompts:  # all answers are another's
            return []
        several = self._engine.sharded or self._engine.ranks.world > 1
        shared: Any = SharedSampler(sampler, self._engine) if several else sampler
        shared.sync(model)
        return shared.generate(prompts, **sampling)


def make_rollout(
    config: OPCDConfig,
    model: Any,
    *,
    stop_token_ids: Sequence[int],
    vocab_size: int | None,
    dtype: Any,
    tokenizer: Any = None,
    prompts: Sequence[Sequence[int]] = (),
    longest: int | None = None,
) -> Rollout:
    """What `config.rollout` names; see `Samplers`. The weights are given by `sync` later. longest: tokens of a prompt
    with its answer, where known."""
    if seam.prompt_learner(model) is not None and config.sends_adapter:
        raise InputError(
            f"rollout={config.rollout!r} cannot run the model's trained prefix; use 'transformers', or 'server' with "
            "rollout_command"
        )
    if not hasattr(model, "peft_config") and config.sends_adapter:
        raise InputError(
            f"rollout={config.rollout!r} sends a LoRA adapter, and the model has none: set lora_rank, or use "
            "rollout='server' with rollout_command"
        )
    common: dict[str, Any] = {"stop_token_ids": stop_token_ids, "vocab_size": vocab_size}
    folder = Path(config.output_dir)
    if config.rollout == "server":
        return _server(config, model, folder, longest, common)
    if config.rollout == "vllm":
        from opcd_fast.rollout import VLLMRollout

        return VLLMRollout(
            config.rollout_model or model.name_or_path,
            folder=folder / "rollout_weights",
            max_lora_rank=config.lora_rank or max(c.r for c in model.peft_config.values()),
            gpu_memory_utilization=config.rollout_gpu_share,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=longest,
            **common,
        )
    if config.rollout == "replay":
        from opcd_fast.rollout import ReplayRollout

        common["vocab_size"] = common["vocab_size"] or seam.config_of(seam.body_of(model)).vocab_size
        replay = ReplayRollout(
            config.rollout_file or "", tokenizer=tokenizer, template_kwargs=config.template_variables(), **common
        )
        replay.check(prompts)
        if config.importance_correction != "none":
            replay.check_logprobs()
        return replay
    return local_rollout(config, model, dtype=dtype, **common)


def local_rollout(config: OPCDConfig, model: Any, **common: Any) -> TransformersRollout:
    """The student in this process, also when the training answers come from elsewhere."""
    file = Path(config.output_dir) / "rollout.json"
    choice = Choice.of_file(file) if config.resume else Choice(file)
    return _in_process(
        config, model, merge_adapter=config.merge_for_rollout, choice=choice, frozen_base=True, **common
    )


def _in_process(config: OPCDConfig, model: Any, **options: Any) -> TransformersRollout:
    engine = "generate" if config.rollout == "generate" else "auto"
    sizes: dict[str, Any] = {"max_batch": config.rollout_batch, "sized_for": config.max_new_tokens}
    return TransformersRollout(model, engine=engine, **sizes, **options)


def _server(config: OPCDConfig, model: Any, folder: Path, longest: int | None, common: dict[str, Any]) -> Rollout:
    from opcd_fast.rollout import CommandWeights, LoRAWeights, ServerRollout, Weights

    weights: Weights
    name, base = config.rollout_model or model.name_or_path, None
    if config.rollout_command is not None:
        weights = CommandWeights(folder / "rollout_weights", name, config.rollout_command)
    else:
        weights, base = LoRAWeights(folder / "rollout_weights"), resolve(name) if name == SMOLLM2 else name
    return ServerRollout(
        config.rollout_url or "",
        weights=weights,
        timeout=config.rollout_timeout,
        tries=config.rollout_tries,
        patience=config.rollout_patience,
        base=base,
        longest=longest,
        concurrency=config.rollout_concurrency,
        logprobs_are=config.rollout_logprobs,
        **common,
    )
