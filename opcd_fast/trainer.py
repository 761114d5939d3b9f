"""On-policy context distillation, the loop.

Each step: the student answers prompts without the context; the teacher, which sees the context, and the student
score every token of those answers; the student's weights move down the full-vocabulary reverse KL to the teacher
(arXiv 2602.12275, Eq. 1). `OPCDTrainer.train` is the method; everything above it prepares, everything below it
keeps records.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from opcd_fast import checkpoint
from opcd_fast import transformers_seam as seam
from opcd_fast.acceleration import make_accelerator
from opcd_fast.answer_sources import AnswerSource, KeptAnswers, PromptAnswers, Sampling
from opcd_fast.architectures import refuses_sharing
from opcd_fast.batch import Sample, micro_batches, pack
from opcd_fast.config import OPCDConfig
from opcd_fast.errors import InputError
from opcd_fast.heads import LMHead
from opcd_fast.held_out import fixed_sequences, held_out_record, in_words
from opcd_fast.likelihood import answer_nll
from opcd_fast.messages import Message
from opcd_fast.model_pair import fingerprint, is_peft, shared_vocabulary, student_and_teacher
from opcd_fast.models import pick_device, pick_dtype
from opcd_fast.objective import context_kl
from opcd_fast.preflight import check_context_matters, check_lengths
from opcd_fast.progress import Progress
from opcd_fast.prompts import read_context, read_prompts
from opcd_fast.records import step_record, total_weight
from opcd_fast.rendering import RenderedPrompt, adapt_to_tokenizer, render
from opcd_fast.rollout import Completion, TransformersRollout, stop_token_ids
from opcd_fast.rollout_factory import local_rollout, make_rollout
from opcd_fast.run_folder import RunFolder
from opcd_fast.seeds import digest, seeded, stream_seed
from opcd_fast.task_answers import TaskAnswers, TaskPrompts, is_task
from opcd_fast.teachers import Teachers
from opcd_fast.timing import Stopwatch

logger = logging.getLogger("opcd_fast")

# Settings that may change between a run and its continuation without changing the steps already made.
FREE_ON_RESUME = (
    "output_dir", "steps", "eval_every", "save_every", "keep_checkpoints", "resume", "device", "dtype",
    "micro_batch_tokens", "workspace_bytes", "gradient_checkpointing", "loss_backend", "prefix_store",
    "max_prefix_bytes", "prefix_device", "teacher_batch_bytes", "share_prompts", "teacher_device", "rollout_url",
    "rollout_timeout", "rollout_tries", "rollout_concurrency", "rollout_gpu_share",
)  # fmt: skip

DIVERGENCE_SETTINGS = ("divergence", "beta", "alpha", "k", "tail")


@dataclass
class TrainResult:
    """What a run did. `history` has one record per step, `evaluations` one per held-out evaluation."""

    output_dir: str
    steps: int
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)


class OPCDTrainer:
    """Trains `model` to answer as it would with `context` in front.

    Args:
        model: transformers causal LM; trained in place. With `lora_rank` it gets an adapter (see `self.model`).
        tokenizer: its tokenizer; the chat template renders prompts.
        context: text, chat messages, or a file of either; None when every prompt has a `privileged_context`.
        prompts: a file, folder, data set, data frame or list (see `opcd_fast.prompts.read_prompts`), or a task
            (`opcd_fast.tasks.load_task`), whose episodes are played for training and evaluation.
        config: settings, see OPCDConfig.
        teacher_model: another model as the teacher (same tokenizer). None: the model itself, see `teacher_mode`.
        eval_prompts: held-out prompts, same forms as `prompts`. None: no evaluation.
        teacher_tokenizer: checked against `tokenizer` when given.
        callbacks: called as `callback(record)` with each step's record.
        quiet: no display; the metrics file is written all the same.
    Raises:
        InputError: anything that cannot work, before anything is written.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        context: str | Path | Sequence[Message] | None,
        prompts: Any,
        config: OPCDConfig | None = None,
        *,
        teacher_model: Any = None,
        eval_prompts: str | Path | Iterable[Any] | None = None,
        teacher_tokenizer: Any = None,
        callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
        quiet: bool = False,
    ) -> None:
        self.config = config = config or OPCDConfig()
        self.tokenizer = tokenizer
        self.callbacks = tuple(callbacks)
        self.quiet = quiet
        self.device = pick_device(config.device)
        self.folder = RunFolder(config.output_dir, config.resume)
        shown = None if context is None else read_context(context)
        self.task_prompts: TaskPrompts | None = None
        if is_task(prompts):
            self.task_prompts = tasks = _task_prompts(prompts, tokenizer, shown, eval_prompts, config)
            rendered, self.prefixes = [tasks.first, tasks.held_out], tasks.prefixes
        else:
            if config.task_episodes != OPCDConfig.task_episodes:
                raise InputError("task_episodes is set, but the prompts are not those of a task; drop it")
            read = [read_prompts(prompts, **config.columns())]
            if eval_prompts is not None:
                read.append(read_prompts(eval_prompts, "eval_prompts", **config.columns()))
            groups = [adapt_to_tokenizer(tokenizer, group) for group in read]
            rendered, self.prefixes = render(tokenizer, groups, shown, config.template_variables())
        self.train_rows = rendered[0].rows
        self.held_out_rows = rendered[1].rows if len(rendered) > 1 else ()
        self.eval_rows = self.held_out_rows[: config.eval_batch]
        windows = [seam.longest_input(seam.body_of(m)) for m in (model, teacher_model or model)]
        check_lengths((*self.train_rows, *self.held_out_rows), self.prefixes, config.max_new_tokens, *windows)

        self.compute_dtype = pick_dtype(config.dtype, self.device) if config.dtype != "auto" else model.dtype
        self._weights = [fingerprint(m) for m in (model, teacher_model) if m is not None]
        evaluates = bool(self.eval_rows and config.eval_every)
        pair = student_and_teacher(model, teacher_model, config, self.device, self.compute_dtype, evaluates)
        self.model = pair.student
        self.share_prompts = _shares_prompts(self.model, config)
        vocab_size = shared_vocabulary(self.model, pair.teacher, tokenizer, teacher_tokenizer)
        self.accelerator = make_accelerator(self.device, self.compute_dtype)
        self.teachers = Teachers(pair, self.prefixes, config, self.device, self.accelerator.autocast)
        self.teacher = self.teachers.teacher
        stop_ids = stop_token_ids(tokenizer, model, config.stop_tokens)
        common: dict[str, Any] = {"stop_token_ids": stop_ids, "vocab_size": vocab_size}
        self.rollout = make_rollout(
            config, self.model, tokenizer=tokenizer, prompts=[row.student_ids for row in self.train_rows], **common
        )
        # Held-out answers are always the student's own.
        replayed = config.rollout == "replay"
        self.eval_rollout = local_rollout(config, self.model, **common) if replayed else self.rollout
        # `with trainer.base_weights():` teacher_rollout answers as the teacher did before training, context or not. It
        # is None when the first weights are not kept (full fine-tuning, a moving teacher, and no evaluation).
        self.teacher_rollout: Any = None
        if pair.reference is not None:
            self.teacher_rollout = TransformersRollout(
                pair.reference, max_batch=config.rollout_batch, merge_adapter=False, **common
            )
        self.base_weights = self.model.disable_adapter if pair.reference_adapter == "disabled" else nullcontext

        # Who writes where answers="teacher": what the student learns from, with its weights of that step.
        self._writer: Any = self.teacher_rollout
        self._writers_model, self._writers_weights = pair.teacher, self.base_weights
        if config.teacher_mode != "frozen":
            self._writer, self._writers_weights = self.eval_rollout, nullcontext
            if pair.teacher is not self.model:  # an average or a copy
                self._writer = TransformersRollout(
                    pair.teacher, max_batch=config.rollout_batch, merge_adapter=False, **common
                )
        self.source = self._answer_source((windows[0], windows[1]))

        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(
                self.parameters.values(),
                lr=config.learning_rate_for(adapter=is_peft(self.model)),
                weight_decay=config.weight_decay,
                fused=self.device.type == "cuda",
            )
        )

    # ------------------------------------------------------------------------------------------ the method

    def train(self) -> TrainResult:
        """Run (or go on with) the configured number of steps. Returns the records of all steps, old ones included."""
        config, started = self.config, time.perf_counter()
        objective: Any = context_kl if config.objective == "divergence" else answer_nll
        first, result = self._start_or_resume()
        self.source.prepare(config.resume)
        fixed = self._fixed_sequences()
        progress = Progress(config.steps, first, self.quiet)
        try:
            if first == 0:
                self._evaluate(0, fixed, result, progress)
            self.model.train()
            student_head = LMHead.from_model(self.model)
            for step in range(first, config.steps):
                watch = Stopwatch(self.device)
                with watch("rollout"):  # the student answers, without the context
                    drawn = self.source.draw(step)
                samples = drawn.samples

                loss, statistics = 0.0, []
                denominator = total_weight(samples, config.normalize)  # of the whole step, not of a micro-batch
                self.optimizer.zero_grad(set_to_none=True)
                with seeded(stream_seed(config.seed, "dropout", step), self.device):
                    for group in micro_batches(samples, config.micro_batch_tokens, share_prompts=self.share_prompts):
                        part, stats = objective(  # teacher with context, student without
                            pack(group, normalize=config.normalize, share_prompts=self.share_prompts).to(self.device),
                            self.model,
                            self.teacher,
                            denominator=denominator,
                            stopwatch=watch,
                            student_head=student_head,
                            divergence={name: getattr(config, name) for name in DIVERGENCE_SETTINGS},
                            **self._loss_options(),
                        )
                        with watch("backward"):
                            self.accelerator.backward(part)
                        loss += float(part.detach())
                        statistics.append(stats)

                with watch("optimizer"):
                    limit = config.max_grad_norm or math.inf
                    norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), limit))
                    _check_finite(step + 1, loss, norm)  # before the weights are touched
                    self.optimizer.step()
                    self.teachers.after_step(step + 1)

                record = step_record(step + 1, loss, norm, samples, drawn.answers, statistics, watch.seconds)
                record |= self._system() | drawn.more
                self._log(record, result.history)
                progress.step(loss, record["tokens_per_second"])
                last = step + 1 == config.steps
                if config.eval_every and (last or (step + 1) % config.eval_every == 0):
                    self._evaluate(step + 1, fixed, result, progress)
                if last or (config.save_every and (step + 1) % config.save_every == 0):
                    self._save_checkpoint(step + 1)  # after the evaluation: a checkpoint has all records up to it
        finally:
            progress.close()
            self.model.eval()
        self.save(Path(config.output_dir) / "final")
        result.steps, result.seconds = config.steps, time.perf_counter() - started
        return result

    def save(self, path: str | Path) -> None:
        """Write the trained weights (the adapter, or the whole model) and the tokenizer; whole or not at all."""

        def fill(folder: Path) -> None:
            model = self.accelerator.unwrap_model(self.model)
            # An adapter on linear layers leaves the embeddings alone; "auto" would ask the hub whether it did.
            options = {"save_embedding_layers": False} if is_peft(model) else {}
            model.save_pretrained(folder, save_function=self.accelerator.save, **options)
            self.tokenizer.save_pretrained(folder)

        checkpoint.write_folder(Path(path), fill)

    # ------------------------------------------------------------------------------------------ steps and records

    def _prompts_of(self, step: int) -> list[RenderedPrompt]:
        """The step's prompts: every epoch is a fresh permutation, and any step can be computed on its own."""
        rows, count = [], self.config.batch_size
        orders: dict[int, list[int]] = {}
        for index in range(step * count, (step + 1) * count):
            epoch, place = divmod(index, len(self.train_rows))
            if epoch not in orders:
                generator = torch.Generator().manual_seed(stream_seed(self.config.seed, "order", epoch))
                orders[epoch] = torch.randperm(len(self.train_rows), generator=generator).tolist()
            rows += [self.train_rows[orders[epoch][place]]] * self.config.rollouts_per_prompt
        return rows

    def _answer_source(self, windows: tuple[int | None, int | None]) -> AnswerSource:
        """Whose answers to which prompts are learned from."""
        config, own = self.config, self.config.answers == "student"
        write = self.student_writes if own else self.teacher_writes
        if self.task_prompts is not None:
            count, repeats = config.batch_size, config.rollouts_per_prompt
            return TaskAnswers(
                self.task_prompts, count, repeats, write, self._sampling, own, config.seed, windows
            )
        if config.kept_answers:
            return KeptAnswers(
                self.folder.path, self.train_rows, config.kept_answers, self._prompts_of, write, self._sampling,
                config.seed,
            )  # fmt: skip
        return PromptAnswers(self._prompts_of, write, self._sampling, own)

    def student_writes(self, rows: Sequence[RenderedPrompt], sampling: Sampling) -> list[Completion]:
        self.rollout.sync(self.model)
        return self.rollout.generate([row.student_ids for row in rows], **sampling)

    def teacher_writes(self, rows: Sequence[RenderedPrompt], sampling: Sampling) -> list[Completion]:
        with self._writers_weights():
            self._writer.sync(self._writers_model)
            return self._writer.generate([(*self.prefixes[r.context_index], *r.teacher_ids) for r in rows], **sampling)

    def _system(self) -> dict[str, Any]:
        """What a step's `loss` is, and of whose answers."""
        config = self.config
        objective = config.divergence if config.objective == "divergence" else config.objective
        return {"objective": objective, "answers_of": "file" if config.rollout == "replay" else config.answers}

    def _sampling(self, purpose: str, index: int) -> dict[str, Any]:
        config = self.config
        return {
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": stream_seed(config.seed, purpose, index),
        }

    def _loss_options(self) -> dict[str, Any]:
        return {
            "temperature": self.config.temperature,
            "compute_dtype": self.compute_dtype,
            "backend": self.config.loss_backend,
            "workspace_bytes": self.config.workspace_bytes,
            "autocast": self.accelerator.autocast,
        }

    def _evaluate(self, step: int, fixed: list[Sample], result: TrainResult, progress: Progress) -> None:
        """Against the teacher's first weights, whatever the teacher has become."""
        if not fixed:
            return
        self.eval_rollout.sync(self.model)
        assert self.teachers.reference is not None
        record = held_out_record(
            step, self.eval_rows, fixed, self.eval_rollout, self._sampling("evaluation", 0), self.model,
            self.teachers.reference, device=self.device, micro_batch_tokens=self.config.micro_batch_tokens,
            **self._loss_options(),
        )  # fmt: skip
        if isinstance(self.source, TaskAnswers) and self.config.task_episodes:
            sampling = self._sampling("task", 0)
            record |= self.source.score(self.student_writes, "selection", self.config.task_episodes, sampling)
        self._log(record, result.evaluations)
        progress.note(in_words(record))

    def _fixed_sequences(self) -> list[Sample]:
        if not self.eval_rows or not self.config.eval_every:
            return []
        sampling, first = self._sampling("fixed", 0), self.base_weights()
        return fixed_sequences(self.folder, self.eval_rows, self.prefixes, self.teacher_rollout, first, sampling)

    def _start_or_resume(self) -> tuple[int, TrainResult]:
        result = TrainResult(self.config.output_dir, 0, 0.0)
        if not self.config.resume:
            check_context_matters(self.train_rows, *self.teachers.first_weights(), **self._loss_options())
            self.folder.start(asdict(self.config))
            return 0, result
        step, saved, records = self.folder.restore(self._identity)
        if step > self.config.steps:
            raise InputError(f"resume: the run has made {step} steps already, steps={self.config.steps}; give more")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved.weights[name])
        self.optimizer.load_state_dict(saved.optimizer)
        self.teachers.restore(saved.teacher)
        self.folder.write_config(asdict(self.config))
        result.history = [record for record in records if record["kind"] == "step"]
        result.evaluations = [record for record in records if record["kind"] == "evaluation"]
        return step, result

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What a continued run must share with its beginning, as JSON values."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in FREE_ON_RESUME}
        rows = [[row.student_ids, row.teacher_ids, row.context_index] for row in (*self.train_rows, *self.eval_rows)]
        settings["prompts and context"] = digest([rows, self.prefixes])
        settings["the model's or teacher's first weights"] = digest(self._weights)
        settings["compute type"] = str(self.compute_dtype)
        return json.loads(json.dumps(settings))

    def _save_checkpoint(self, step: int) -> None:
        saved = checkpoint.Saved(self.parameters, self.optimizer.state_dict(), self.teachers.state())
        self.folder.save(step, saved, self._identity, self.config.keep_checkpoints)

    def _log(self, record: dict[str, Any], records: list[dict[str, Any]]) -> None:
        records.append(record)
        self.folder.log(record)
        for callback in self.callbacks:
            callback(record)


def _task_prompts(task: Any, tokenizer: Any, context: Any, eval_prompts: Any, config: OPCDConfig) -> TaskPrompts:
    if context is None:
        raise InputError("context is missing: a task's prompts have none of their own")
    if eval_prompts is not None:
        raise InputError("eval_prompts: a task is evaluated on its own split 'selection'; drop eval_prompts")
    if config.rollout == "replay":
        raise InputError("rollout='replay': a task's later turns depend on the answers; a file cannot have them")
    if config.kept_answers:
        raise InputError("kept_answers: a task's later turns depend on the answers, which are drawn at every step")
    held_out = config.eval_batch if config.eval_every else 0
    return TaskPrompts(task, tokenizer, context, config.batch_size, held_out, config.template_variables())


def _shares_prompts(model: Any, config: OPCDConfig) -> bool:
    if not (config.rollouts_per_prompt > 1 if config.share_prompts is None else config.share_prompts):
        return False
    reason = refuses_sharing(seam.body_of(model), training=True)
    if reason is not None and config.share_prompts:
        raise InputError(f"share_prompts=True: {reason}; leave it out")
    if reason is not None:
        logger.warning("student: every answer has its own copy of the prompt, because %s", reason)
    return reason is None


def _check_finite(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(
            f"loss is {loss} and gradient norm {norm} at step {step}; the weights of the last checkpoint are intact: "
            "lower learning_rate (OPCD_CHECK=1 names the first bad row)"
        )
