"""On-policy context distillation, the loop.

Each step: the student answers prompts without the context; the teacher, which sees the context, and the student
score every token of those answers; the student's weights move down the full-vocabulary reverse KL to the teacher
(arXiv 2602.12275, Eq. 1). `OPCDTrainer._train_step` is the method; everything above it prepares and repeats it,
everything below it keeps records.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opcd_fast.data import Message, RenderedPrompt, Sample, prompts_of_step, read_context
from opcd_fast.loss import Drift, LMHead
from opcd_fast.models import pick_device, pick_dtype, seam, shares_prompts, virtual_tokens
from opcd_fast.rollout import Completion, TransformersRollout, stop_token_ids
from opcd_fast.runtime import Stopwatch, digest, seeded, stream_seed
from opcd_fast.runtime import checkpoints as checkpoint
from opcd_fast.training.answers import TeacherWriter, answer_source, described, objective_of, read_training_prompts
from opcd_fast.training.engines import (
    Ranks,
    TokenBudget,
    fingerprint,
    make_accelerator,
    make_engine,
    name_of,
    shards,
    shared_sampler,
    shared_vocabulary,
    student_and_teacher,
)
from opcd_fast.training.interruption import Interrupted, Interruption
from opcd_fast.training.monitoring import (
    Journal,
    Progress,
    Trackers,
    TrainResult,
    check_finite,
    check_installed,
    fixed_sequences,
    held_out_record,
    mean_length,
)
from opcd_fast.training.rollout_factory import local_rollout, make_rollout
from opcd_fast.training.run import Origins, RunFolder, Snapshots, best, identity, write_record
from opcd_fast.training.scorer import HeldOutScore, Scorer
from opcd_fast.training.settings import OPCDConfig
from opcd_fast.training.step import (
    Teachers,
    Windows,
    check_context_matters,
    check_lengths,
    step_record,
    total_weight,
    warn_of_known_prompts,
)

__all__ = ["OPCDTrainer", "TrainResult"]


class OPCDTrainer:
    """Trains `model` to answer as it would with `context` in front.

    Args:
        model: transformers causal LM; trained in place. With `lora_rank` it gets an adapter (see `self.model`). Where a
            launcher asked for FSDP2 its weights stay sharded afterwards: use `save`, or load `final/`.
        tokenizer: its tokenizer; the chat template renders prompts.
        context: text, chat messages, or a file of either; None when every prompt has a `privileged_context`.
        prompts: a file, folder, data set, data frame or list (see `opcd_fast.data.read_prompts`), or a task
            (`opcd_fast.data.tasks.load_task`), whose episodes are played for training and evaluation.
        config: settings, see OPCDConfig.
        teacher_model: another model as the teacher (same tokenizer). None: the model itself, see `teacher_mode`.
        eval_prompts: held-out prompts, same forms as `prompts`. None: no evaluation.
        teacher_tokenizer: checked against `tokenizer` when given.
        callbacks: called as `callback(record)` with each step's and each evaluation's record, on rank 0 alone.
        scorer: your own measure of held-out answers, see `opcd_fast.training.Scorer`; also by name, in `config`.
        trackers: accelerate `GeneralTracker` objects, besides those named in `config`.
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
        scorer: Scorer | None = None,
        trackers: Sequence[Any] = (),
        quiet: bool = False,
    ) -> None:
        self.config = config = config or OPCDConfig()
        self.tokenizer = tokenizer
        self.callbacks = tuple(callbacks)
        self.quiet = quiet
        self.device = pick_device(config.device)
        check_installed(config.trackers)
        self.compute_dtype = pick_dtype(config.dtype, self.device) if config.dtype != "auto" else model.dtype
        self._path = Path(config.output_dir)
        log_with = (*config.trackers, *trackers)
        self.accelerator = make_accelerator(self.device, self.compute_dtype, log_with, self._path / "tensorboard")
        self.ranks = Ranks()
        self.folder: RunFolder = self.ranks.main_object(lambda: RunFolder(self._path, config.resume))
        shown = None if context is None else read_context(context)
        asked = read_training_prompts(prompts, eval_prompts, shown, tokenizer, config)
        self.train_rows, self.held_out_rows, self.prefixes = asked.rows, asked.held_out_rows, asked.prefixes
        self.eval_rows = self.held_out_rows[: config.eval_batch]
        evaluates = bool(self.eval_rows and config.eval_every)
        scored = asked.held_out_shown[: config.eval_batch] if evaluates else ()
        self._score = HeldOutScore.make(scorer, config.scorer, tokenizer, scored)
        best.check_measured(config, evaluates, self._score is not None)
        windows = Windows.of(model, teacher_model or model, config.num_virtual_tokens or virtual_tokens(model))
        check_lengths((*self.train_rows, *self.held_out_rows), self.prefixes, config.max_new_tokens, windows)
        if evaluates and asked.task is None and self.ranks.main:
            warn_of_known_prompts(self.train_rows, self.eval_rows)

        self._weights = [fingerprint(m) for m in (model, teacher_model) if m is not None]
        self.origins = Origins(
            context=shown,
            prompts=asked.given,
            held_out=asked.held_out_given,
            base=name_of(model),
            teacher=None if teacher_model is None else name_of(teacher_model) or "a model in memory",
            tokenizer=getattr(tokenizer, "name_or_path", None),
            template=getattr(tokenizer, "chat_template", None),
            weights=self._weights,
            more={} if asked.task is None else {"task": asked.task.task.name},
        )
        place = torch.device("cpu") if shards() else self.device  # whole weights may not fit one GPU
        pair = student_and_teacher(
            model, teacher_model, config, place, self.compute_dtype, evaluates, self.prefixes
        )
        self.model = pair.student
        self.share_prompts = shares_prompts(self.model, config.share_prompts, config.rollouts_per_prompt)
        vocab_size = shared_vocabulary(self.model, pair.teacher, tokenizer, teacher_tokenizer)
        self.engine = make_engine(self.accelerator, self.ranks, pair, config, self.device)
        self.parameters = self.engine.parameters
        self.teachers = Teachers(pair, self.prefixes, config, self.device, self.accelerator.autocast)
        self.teacher = self.teachers.teacher
        self.engine.check_teacher(self.teacher, self.teachers.reference)
        self.budget = TokenBudget(config.micro_batch_tokens, self.ranks, together=self.engine.sharded)
        stop_ids = stop_token_ids(tokenizer, model, config.stop_tokens)
        common: dict[str, Any] = {"stop_token_ids": stop_ids, "vocab_size": vocab_size}
        sampling = replace(config, merge_for_rollout=False) if self.engine.sharded else config
        self.rollout = make_rollout(
            sampling, self.model, tokenizer=tokenizer, prompts=[row.student_ids for row in self.train_rows], **common
        )
        # Held-out answers are always the student's own.
        replayed = config.rollout == "replay"
        self.eval_rollout = local_rollout(sampling, self.model, **common) if replayed else self.rollout
        # `with trainer.base_weights():` teacher_rollout answers as the teacher did before training, context or not. It
        # is None when the first weights are not kept (full fine-tuning, a moving teacher, and no evaluation).
        self.teacher_rollout: Any = None
        if pair.reference is not None:
            self.teacher_rollout = TransformersRollout(
                pair.reference, max_batch=config.rollout_batch, merge_adapter=False, **common
            )
        shares_base = pair.reference_adapter == "disabled"
        self.base_weights = partial(seam.without_adapters, self.model) if shares_base else self.teachers.at_work
        self.teacher_writes = TeacherWriter(
            config, pair, self.prefixes, self.teacher_rollout, self.base_weights, self.eval_rollout,
            partial(shared_sampler, engine=self.engine), **common,
        )  # fmt: skip
        self.source = answer_source(
            config, self._path, asked, self._prompts_of, self.student_writes, self.teacher_writes, self._sampling,
            windows, self.ranks,
        )  # fmt: skip
        self._objective, self._filler = objective_of(config), objective_of(config, weigh=False)
        self.snapshots = Snapshots(
            self.folder, self.engine, self.teachers, self._identity, config.keep_checkpoints
        )

    @property
    def optimizer(self) -> Any:
        """The one that the loop steps; of several ranks, see `self.engine`."""
        return self.engine.optimizer

    # ------------------------------------------------------------------------------------------ the method

    def train(self) -> TrainResult:
        """Run (or go on with) the configured number of steps. Returns the records of all steps, old ones included.

        Ctrl-C and SIGTERM save a checkpoint of the last whole step and raise `Interrupted` (a KeyboardInterrupt).
        """
        started = time.perf_counter()
        step, journal = self._start_or_resume()
        with journal, Interruption(self.ranks.first if self.ranks.world > 1 else None) as interruption:
            try:
                with interruption.abandonable():
                    self.source.prepare(step)
                    fixed = self._fixed_sequences()
                    journal.teacher_length = mean_length(fixed)
                self._evaluate(step, fixed, journal, interruption)  # before training, or where a run was stopped
                if step:
                    self._keep(step, journal)  # best/, where a run was killed before it
                self.model.train()
                while step < self.config.steps and not journal.enough:
                    record = self._train_step(step, interruption)
                    step += 1
                    journal.step(record)
                    self._evaluate(step, fixed, journal, interruption)
                    self._keep(step, journal)  # after the evaluation: a checkpoint has all records up to it
            except Interrupted as signal:
                self.snapshots.save(step)
                raise Interrupted(signal.number, f"stopped; step {step} is saved, go on with --resume") from None
            finally:
                self.model.eval()
            self.save(Path(self.config.output_dir) / "final")
            return journal.finish(step, time.perf_counter() - started)

    def _train_step(self, step: int, interruption: Interruption) -> dict[str, Any]:
        """The method: optimizer step number `step` + 1, and its record."""
        config, watch = self.config, Stopwatch(self.device)
        with interruption.abandonable():  # the weights are still those of the last step
            with watch("rollout"):
                drawn = self.source.draw(step)  # the student answers, without the context
            samples = drawn.samples  # of all ranks, each of which scores its share
            denominator = total_weight(samples, config.normalize)  # of the whole step, not of a micro-batch or a rank
            self.engine.read_contexts(self.teacher, samples)
            student_head = LMHead.from_model(self.model)

            def gradients() -> tuple[float, list[Any], Drift]:
                loss, statistics, drift = 0.0, [], Drift()
                self.engine.zero_grad()
                with seeded(stream_seed(config.seed, self.ranks.stream("dropout"), step), self.device):
                    for turn in self.budget.rounds(samples, share_prompts=self.share_prompts):
                        objective = partial(
                            self._filler if turn.empty else self._objective,  # teacher with context, student without
                            turn.pack(normalize=config.normalize, share_prompts=self.share_prompts).to(self.device),
                            self.model,
                            self.teacher,
                            denominator=denominator,
                            stopwatch=watch,
                            student_head=student_head,
                            drift=drift,
                            **self.loss_options(),
                        )
                        part, stats = self.engine.run(objective)
                        with watch("backward"):
                            self.engine.backward(part)
                        if not turn.empty:
                            loss += float(part.detach())
                            statistics.append(stats)
                        del part  # its graph keeps the inputs of checkpointed layers
                return loss, statistics, drift

            found = self.budget.retrying(gradients, f"step {step + 1}")
            loss, statistics, drift = self.engine.total(*found)

        with watch("optimizer"):
            limit = config.max_grad_norm or math.inf
            norm = self.engine.clip(limit)
            check_finite(step + 1, loss, norm)  # before the weights are touched
            self.engine.step()
            self.teachers.after_step(step + 1)
        record = step_record(step + 1, loss, norm, samples, drawn.answers, statistics, watch.seconds, drift)
        return record | described(config) | drawn.more

    def save(self, path: str | Path) -> None:
        """Write the trained weights (the adapter, or the whole model) and the tokenizer; whole or not at all."""
        fill = self.engine.weights_writer(self.tokenizer)
        self.ranks.on_main(lambda: checkpoint.write_folder(Path(path), fill))

    # ------------------------------------------------------------------------------------------ steps and records

    def _prompts_of(self, step: int) -> list[RenderedPrompt]:
        config = self.config
        return prompts_of_step(self.train_rows, step, config.batch_size, config.rollouts_per_prompt, config.seed)

    def student_writes(self, rows: Sequence[RenderedPrompt], sampling: Mapping[str, Any]) -> list[Completion]:
        """The student's answers, without the context."""
        rollout = shared_sampler(self.rollout, self.engine)
        rollout.sync(self.model)
        return rollout.generate([row.student_ids for row in rows], **sampling)

    def _sampling(self, purpose: str, index: int) -> dict[str, Any]:
        config = self.config
        return {
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": stream_seed(config.seed, purpose, index),
        }

    def loss_options(self) -> dict[str, Any]:
        """How training and evaluation compute their loss, as keywords of
        `opcd_fast.training.step.objective.context_kl`."""
        return {
            "temperature": self.config.temperature,
            "compute_dtype": self.compute_dtype,
            "backend": self.config.loss_backend,
            "workspace_bytes": self.config.workspace_bytes,
            "autocast": self.accelerator.autocast,
        }

    def _evaluate(self, step: int, fixed: list[Sample], journal: Journal, interruption: Interruption) -> None:
        """Where one is due and not made: against the teacher's first weights, whatever the teacher has become."""
        due = fixed and (step == self.config.steps or step % self.config.eval_every == 0)
        if not due or any(record["step"] == step for record in journal.evaluations):
            return
        assert self.teachers.reference is not None
        # Asked once, on rank 0: a scorer may give another number each time, and ranks must agree on the best.
        score = None if self._score is None else self.ranks.by_main(self._score)
        rollout = shared_sampler(self.eval_rollout, self.engine)
        with interruption.abandonable():
            rollout.sync(self.model)
            record = held_out_record(
                step, self.eval_rows, fixed, rollout, self._sampling("evaluation", 0), self.model,
                self.teachers.reference, score=score, device=self.device, budget=self.budget, engine=self.engine,
                **self.loss_options(),
            )  # fmt: skip
            record |= self.source.evaluate()
        journal.evaluation(record)

    def _fixed_sequences(self) -> list[Sample]:
        if not self.eval_rows or not self.config.eval_every:
            return []
        sampling, first = self._sampling("fixed", 0), self.base_weights()
        rollout = shared_sampler(self.teacher_rollout, self.engine)
        return fixed_sequences(self.folder, self.eval_rows, self.prefixes, rollout, first, sampling)

    def _keep(self, step: int, journal: Journal) -> None:
        """Save what is due. Weights go to best/ only after a checkpoint of the same step: whenever a run is killed, its
        checkpoint knows the step of best/, or is of that step itself and can write it again."""
        config = self.config
        last = step == config.steps or journal.enough
        is_best = config.save_best and journal.best_step == step
        if last or is_best or (config.save_every and step % config.save_every == 0):
            self.snapshots.save(step)
        if is_best:
            self.folder.save_best(journal.evaluations[-1], self.engine.weights_writer(self.tokenizer))

    def _start_or_resume(self) -> tuple[int, Journal]:
        config, step = self.config, 0
        records: list[dict[str, Any]] = []
        self.ranks.check_alike(self._identity())
        if config.resume:
            step, records = self.snapshots.restore(config.steps)
            self.folder.write_config(asdict(config))
        else:
            with torch.no_grad(), self.teachers.at_work():
                first = self.teachers.first_weights()
                self.engine.run(partial(check_context_matters, self.train_rows, *first, **self.loss_options()))
            self.folder.start(asdict(config))
            self.ranks.on_main(lambda: write_record(self._path, self.origins))
        trackers = self.ranks.together(lambda: Trackers(self.accelerator, self._path, asdict(config), step))
        progress = Progress(config.steps, step, self.quiet or not self.ranks.main)
        return step, Journal(self.folder, config, records, progress, trackers, self.callbacks, self.ranks)

    def _identity(self) -> dict[str, Any]:
        rows = [[row.student_ids, row.teacher_ids, row.context_index] for row in (*self.train_rows, *self.eval_rows)]
        facts = {
            "prompts and context": digest([rows, self.prefixes]),
            "the model's or teacher's first weights": digest(self._weights),
            "compute type": str(self.compute_dtype),
            "scorer": None if self._score is None else self._score.name,
        }
        return identity(self.config, facts)
