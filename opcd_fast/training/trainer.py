"""On-policy context distillation, the loop.

Each step: the student answers prompts without the context; the teacher, which sees the context, and the student
score every token of those answers; the student's weights move down the full-vocabulary KL to the teacher, the reverse
one (arXiv 2602.12275, Eq. 1) where they are near it. `OPCDTrainer._train_step` is the method; everything above it
prepares and repeats it, everything below it keeps records.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opcd_fast.data import Message, Sample, pack, total_weight
from opcd_fast.loss import Drift, LMHead
from opcd_fast.rollout import ServerGone
from opcd_fast.runtime import Stopwatch, seeded, stream_seed, write_folder
from opcd_fast.training.answers import answer_source, sampling_of
from opcd_fast.training.assembly import Given, assemble
from opcd_fast.training.engines import OtherRankError
from opcd_fast.training.interruption import Interrupted, Interruption
from opcd_fast.training.monitoring import Journal, TrainResult, check_finite, fixed_sequences, held_out_record
from opcd_fast.training.preview import Pair, in_lines, preview, question, side_by_side
from opcd_fast.training.run import Saved, as_started, write_record
from opcd_fast.training.scorer import Scorer
from opcd_fast.training.settings import OPCDConfig
from opcd_fast.training.step import check_context_matters, objective_of, step_record

__all__ = ["OPCDTrainer", "TrainResult"]

SHOWN = 3  # held-out answers at the end; one at each evaluation before


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
        self.config = config = as_started(config or OPCDConfig())
        self.tokenizer, self.callbacks, self.quiet = tokenizer, tuple(callbacks), quiet
        given = Given(
            model, tokenizer, context, prompts, teacher_model, eval_prompts, teacher_tokenizer, scorer, trackers
        )
        self.parts = parts = assemble(given, config)
        self.device, self.ranks, self.folder, self.budget = parts.device, parts.ranks, parts.folder, parts.budget
        self.origins, self.share_prompts = parts.origins, parts.share_prompts
        asked = parts.questions.asked
        self.train_rows, self.held_out_rows, self.prefixes = asked.rows, asked.held_out_rows, asked.prefixes
        self.eval_rows = parts.questions.eval_rows
        self.engine, self.teachers, self.teacher = parts.engine, parts.teachers, parts.teachers.teacher
        self.model, self.parameters = self.engine.student, self.engine.parameters
        self.samplers = samplers = parts.samplers
        self.rollout, self.eval_rollout = samplers.student, samplers.held_out
        # `with trainer.base_weights():` teacher_rollout answers as the teacher did before training, context or not. It
        # is None when the first weights are not kept (full fine-tuning, a moving teacher, and no evaluation).
        self.teacher_rollout, self.base_weights = samplers.first, samplers.first_weights
        self.source = answer_source(
            config, asked, parts.questions.windows, self.ranks,
            student=samplers.student_writes, teacher=samplers.teacher_writes,
        )  # fmt: skip
        self._objective = self.engine.inside(objective_of(config))

    @property
    def optimizer(self) -> Any:
        """The one that the loop steps; of several ranks, see `self.engine`."""
        return self.engine.optimizer

    # ------------------------------------------------------------------------------------------ the method

    def train(self) -> TrainResult:
        """Run (or go on with) the configured number of steps. Returns the records of all steps, old ones included.

        Ctrl-C and SIGTERM save a checkpoint of the last whole step and raise `Interrupted` (a KeyboardInterrupt); so
        does a rollout server that stays away, which raises `ServerGone`.
        """
        started = time.perf_counter()
        with contextlib.closing(self.folder):  # nobody else writes there meanwhile
            step, journal = self._start_or_resume()
            return self._train(step, journal, started)

    def _train(self, step: int, journal: Journal, started: float) -> TrainResult:
        config = self.config
        with journal, Interruption(self.ranks.first if self.ranks.world > 1 else None) as interruption:
            try:
                with interruption.abandonable():
                    self.source.prepare(step)
                    fixed = self._fixed_sequences()
                    journal.know(fixed)
                self._evaluate(step, fixed, journal, interruption)  # before training, or where a run was stopped
                if step:
                    self._keep(step, journal)  # best/, where a run was killed before it
                if config.resume and step == config.steps:
                    journal.show([f"{step} steps are made already: nothing is left to do; raise steps to go on"])
                self.model.train()
                while step < config.steps and not journal.enough:
                    record = self._train_step(step, interruption)
                    step += 1
                    journal.step(record)
                    self._evaluate(step, fixed, journal, interruption)
                    self._keep(step, journal)  # after the evaluation: a checkpoint has all records up to it
            except Interrupted as signal:
                self._save_checkpoint(step)
                raise Interrupted(signal.number, f"stopped; step {step} is saved, go on with --resume") from None
            except (ServerGone, OtherRankError) as error:  # where answers are drawn: the weights are those of `step`
                if ServerGone.__name__ not in f"{type(error).__name__}: {error}":
                    raise
                self._save_checkpoint(step)
                raise type(error)(f"{error} (step {step} is saved)") from error
            finally:
                self.model.eval()
            self.save(Path(self.config.output_dir) / "final")
            return journal.finish(step, time.perf_counter() - started)

    def preview(self, count: int = 3) -> list[Pair]:
        """Before `train`, in one process: the first held-out prompts (training prompts, where there are none) with the
        most probable answers of the student, and of the teacher with the context. Nothing of the run depends on it."""
        return preview(self, count)

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
                        batch = pack(turn.samples, normalize=config.normalize, share_prompts=self.share_prompts)
                        part, stats = self._objective(  # the teacher scores with the context, the student without
                            (batch.without_weight() if turn.empty else batch).to(self.device),
                            self.model,
                            self.teacher,
                            denominator=denominator,
                            stopwatch=watch,
                            student_head=student_head,
                            drift=None if turn.empty else drift.add,
                            **self.loss_options(),
                        )
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
            norm = self.engine.clip(config.max_grad_norm or math.inf)
            check_finite(step + 1, loss, norm)  # before the weights are touched
            rate = self.engine.step(step)
            self.engine.zero_grad()  # nor held while answers are drawn
            self.teachers.after_step(step + 1)
        record = step_record(
            step + 1, config, loss, norm, rate, samples, drawn.answers, statistics, watch.seconds, drift
        )
        return record | drawn.more

    def save(self, path: str | Path) -> None:
        """Write the trained weights (the adapter, or the whole model) and the tokenizer; whole or not at all."""
        fill = self.engine.weights_writer(self.tokenizer)
        self.ranks.on_main(lambda: write_folder(Path(path), fill))

    # ------------------------------------------------------------------------------------------ steps and records

    def loss_options(self) -> dict[str, Any]:
        """How training and evaluation compute their loss, as keywords of
        `opcd_fast.training.step.objective.context_kl`."""
        return {
            "temperature": self.config.temperature,
            "compute_dtype": self.parts.compute_dtype,
            "backend": self.config.loss_backend,
            "workspace_bytes": self.config.workspace_bytes,
            "autocast": self.parts.accelerator.autocast,
        }

    def _fixed_sequences(self) -> list[Sample]:
        if not self.eval_rows or not self.config.eval_every:
            return []
        sampling = sampling_of(self.config, "fixed", 0)
        return fixed_sequences(self.folder, self.eval_rows, partial(self.samplers.first_writes, sampling=sampling))

    def _evaluate(self, step: int, fixed: list[Sample], journal: Journal, interruption: Interruption) -> None:
        """Where one is due and not made: against the teacher's first weights, whatever the teacher has become."""
        due = fixed and (step == self.config.steps or step % self.config.eval_every == 0)
        if not due or any(record["step"] == step for record in journal.evaluations):
            return
        assert self.teachers.reference is not None
        watch, asked = Stopwatch(self.device), self.parts.questions.asked
        with interruption.abandonable():
            with watch("rollout"):
                answers = self.samplers.held_out_writes(self.eval_rows, sampling_of(self.config, "evaluation", 0))
            record = held_out_record(
                step, self.eval_rows, answers, fixed, self.model, self.teachers.reference, device=self.device,
                budget=self.budget, engine=self.engine, watch=watch, **self.loss_options(),
            )  # fmt: skip
            score = self.parts.questions.score
            if score is not None:  # asked once: it may give another number each time, and ranks must agree on the best
                record |= self.ranks.on_main(lambda: score(answers))
            record |= self.source.evaluate()
        journal.evaluation(record)
        if not step and asked.task is None:
            journal.foresee(watch.seconds, len(answers))
        for given, shown, answer in list(zip(asked.held_out_given, fixed, answers))[
            : SHOWN if step == self.config.steps else 1
        ]:
            texts = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (shown.response, answer.token_ids))
            journal.show(side_by_side(question(given), dict(zip(("base + context", "student"), texts))))

    def _keep(self, step: int, journal: Journal) -> None:
        """Save what is due. Weights go to best/ only after a checkpoint of the same step: whenever a run is killed, its
        checkpoint knows the step of best/, or is of that step itself and can write it again."""
        config = self.config
        last = step == config.steps or journal.enough
        is_best = config.save_best and journal.best_step == step
        if last or is_best or (config.save_every and step % config.save_every == 0):
            self._save_checkpoint(step)
        if is_best:
            self.folder.save_best(journal.evaluations[-1], self.engine.weights_writer(self.tokenizer))

    def _save_checkpoint(self, step: int) -> None:
        """Everything that a later step depends on: trained weights, optimizer, a moving teacher, and the records."""
        weights, optimizer = self.engine.state()
        saved = Saved(weights, optimizer, self.engine.gathered(self.teachers.state()))
        self.folder.save(step, saved, self.parts.identity, self.config.keep_checkpoints)

    def _start_or_resume(self) -> tuple[int, Journal]:
        config, step = self.config, 0
        records: list[dict[str, Any]] = []
        self.ranks.check_alike(self.parts.identity)
        if config.resume:
            step, saved, records = self.folder.restore(self.parts.identity, config.steps)
            self.engine.restore(saved.weights, saved.optimizer)
            self.teachers.restore(saved.teacher)  # after the student's weights
            self.folder.write_config(config.public())
        else:
            with torch.no_grad(), self.teachers.at_work():
                check = self.engine.inside(check_context_matters)
                check(self.train_rows, *self.teachers.first_weights(), **self.loss_options())
            if config.preview and not self.quiet and self.ranks.world == 1:
                print("\n".join(in_lines(self.preview(config.preview))), flush=True)
            self.folder.start(config.public())
            self.ranks.on_main(lambda: write_record(self.folder.path, self.origins))
        quiet = self.quiet or not self.ranks.main
        return step, Journal(
            self.folder, config, records, step, self.parts.accelerator, self.callbacks, self.ranks, quiet
        )
