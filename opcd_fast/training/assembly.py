"""The parts of a run, made of what its user gave: prompts as the models read them, models, engine, samplers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opcd_fast.data import Context, Message, RenderedPrompt, read_context
from opcd_fast.models import pick_device, pick_dtype, shares_prompts, virtual_tokens
from opcd_fast.rollout import stop_token_ids
from opcd_fast.runtime import digest
from opcd_fast.training.answers import TrainingPrompts, read_training_prompts
from opcd_fast.training.engines import (
    Engine,
    Ranks,
    TokenBudget,
    fingerprint,
    make_accelerator,
    make_engine,
    name_of,
    shards,
    shared_vocabulary,
    student_and_teacher,
)
from opcd_fast.training.monitoring import check_installed
from opcd_fast.training.run import Origins, RunFolder, best, identity
from opcd_fast.training.samplers import Samplers
from opcd_fast.training.scorer import HeldOutScore, Scorer
from opcd_fast.training.settings import OPCDConfig
from opcd_fast.training.step import Teachers, Windows, check_lengths, warn_of_known_prompts, warn_of_thinking


@dataclass(frozen=True)
class Given:
    """What the user of a run gave besides its settings; see `OPCDTrainer`."""

    model: Any
    tokenizer: Any
    context: str | Path | Sequence[Message] | None
    prompts: Any
    teacher_model: Any = None
    eval_prompts: str | Path | Iterable[Any] | None = None
    teacher_tokenizer: Any = None
    scorer: Scorer | None = None
    trackers: Sequence[Any] = ()


@dataclass(frozen=True)
class Questions:
    """What is asked in training and at evaluations. eval_rows: the held-out prompts of an evaluation."""

    asked: TrainingPrompts
    eval_rows: tuple[RenderedPrompt, ...]
    windows: Windows
    score: HeldOutScore | None

    def facts(self) -> dict[str, Any]:
        """What a run that goes on must ask as well, as JSON values."""
        every = (*self.asked.rows, *self.eval_rows)
        rows = [[row.student_ids, row.teacher_ids, row.context_index] for row in every]
        return {
            "prompts and context": digest([rows, self.asked.prefixes]),
            "scorer": None if self.score is None else self.score.name,
        }


@dataclass(frozen=True)
class Assembly:
    """A run's parts. identity: what a run that goes on must have as well."""

    device: torch.device
    compute_dtype: torch.dtype
    accelerator: Any
    ranks: Ranks
    folder: RunFolder
    questions: Questions
    origins: Origins
    engine: Engine
    teachers: Teachers
    samplers: Samplers
    budget: TokenBudget
    share_prompts: bool
    identity: dict[str, Any]


def assemble(given: Given, config: OPCDConfig) -> Assembly:
    """Raises InputError for anything that cannot work; nothing is written."""
    check_installed(config.trackers)
    device, model = pick_device(config.device), given.model
    dtype = pick_dtype(config.dtype, device) if config.dtype != "auto" else model.dtype
    path = Path(config.output_dir)
    accelerator = make_accelerator(device, dtype, (*config.trackers, *given.trackers), path / "tensorboard")
    ranks = Ranks()
    folder = RunFolder(path, config.resume, ranks)
    context = None if given.context is None else read_context(given.context)
    questions = _questions(given, context, config, ranks)
    asked = questions.asked
    weights = [fingerprint(m) for m in (model, given.teacher_model) if m is not None]
    origins = _origins(given, context, asked, weights)
    pair = student_and_teacher(
        model,
        given.teacher_model,
        config,
        torch.device("cpu") if shards() else device,  # whole weights may not fit one GPU
        dtype,
        keep_reference=bool(questions.eval_rows and config.eval_every),
        contexts=asked.prefixes,
    )
    share_prompts = shares_prompts(pair.student, config.share_prompts, config.rollouts_per_prompt)
    vocab_size = shared_vocabulary(pair.student, pair.teacher, given.tokenizer, given.teacher_tokenizer)
    engine = make_engine(accelerator, ranks, pair, config, device)
    teachers = Teachers(pair, asked.prefixes, config, device, accelerator.autocast)
    engine.check_teacher(teachers.teacher, teachers.reference)
    stop_ids = stop_token_ids(given.tokenizer, model, config.stop_tokens)
    samplers = Samplers(
        config, teachers, engine, asked.rows, questions.eval_rows, asked.prefixes, given.tokenizer,
        first_turns=asked.task is not None, stop_token_ids=stop_ids, vocab_size=vocab_size, dtype=dtype,
    )  # fmt: skip
    facts = {"the model's or teacher's first weights": digest(weights), "compute type": str(dtype)}
    return Assembly(
        device, dtype, accelerator, ranks, folder, questions, origins, engine, teachers, samplers,
        TokenBudget(config.micro_batch_tokens, ranks, together=engine.sharded), share_prompts,
        identity(config, questions.facts() | facts),
    )  # fmt: skip


def _questions(given: Given, context: Context | None, config: OPCDConfig, ranks: Ranks) -> Questions:
    asked = read_training_prompts(given.prompts, given.eval_prompts, context, given.tokenizer, config)
    eval_rows = asked.held_out_rows[: config.eval_batch]
    evaluates = bool(eval_rows and config.eval_every)
    scored = asked.held_out_shown[: config.eval_batch] if evaluates else ()
    score = HeldOutScore.make(given.scorer, config.scorer, given.tokenizer, scored)
    best.check_measured(config, evaluates, score is not None)
    virtual = config.num_virtual_tokens or virtual_tokens(given.model)
    windows = Windows.of(given.model, given.teacher_model or given.model, virtual)
    check_lengths((*asked.rows, *asked.held_out_rows), asked.prefixes, config.max_new_tokens, windows)
    if evaluates and asked.task is None and ranks.main:
        warn_of_known_prompts(asked.rows, eval_rows)
    if ranks.main and config.objective == "divergence":
        warn_of_thinking(given.tokenizer, asked.rows[0], config.template_variables())
    return Questions(asked, eval_rows, windows, score)


def _origins(given: Given, context: Context | None, asked: TrainingPrompts, weights: Sequence[str]) -> Origins:
    teacher = given.teacher_model
    return Origins(
        context=context,
        prompts=asked.given,
        held_out=asked.held_out_given,
        base=name_of(given.model),
        teacher=None if teacher is None else name_of(teacher) or "a model in memory",
        tokenizer=getattr(given.tokenizer, "name_or_path", None),
        template=getattr(given.tokenizer, "chat_template", None),
        weights=weights,
        more={} if asked.task is None else {"task": asked.task.task.name},
    )
