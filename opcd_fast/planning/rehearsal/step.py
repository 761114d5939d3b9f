"""The parts of a step in the order in which the loop runs them, on tensors without data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from opcd_fast.data import Sample, common_prefix_length, count_tokens, micro_batches, pack, total_weight
from opcd_fast.loss import LMHead, scratch_bytes
from opcd_fast.models import copy_for_answers, refuses_merge, refuses_pad, refuses_sharing, seam
from opcd_fast.planning.rehearsal.job import Job
from opcd_fast.planning.rehearsal.meter import Meter
from opcd_fast.planning.rehearsal.optimizer import rehearsed_optimizer
from opcd_fast.rollout import KEPT_SHARE, MOST, batch_that_fits, first_and_last_token, refuses_holding_once
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training.engines import ModelPair
from opcd_fast.training.settings import OPCDConfig, settings_with
from opcd_fast.training.step import context_kl

Rows = Sequence[tuple[int, int, int]]


class Step:
    """device, backend: "cuda" or "cpu", and of the loss, where the run will be. limit: bytes in all, for a
    rollout_batch that is sized to memory, and a copy that answers where it is small."""

    def __init__(
        self, config: OPCDConfig, job: Job, pair: ModelPair, meter: Meter, *,
        device: str, dtype: torch.dtype, backend: str, limit: int | None,
    ) -> None:  # fmt: skip
        self.config, self.job, self.pair, self.meter = config, job, pair, meter
        self.device, self.dtype, self.backend, self.limit = device, dtype, backend, limit
        self.rollout_batch = self.tokens = self.longest = 0
        body, other = seam.body_of(pair.student), seam.body_of(pair.teacher)
        self.path = config.teacher_path
        if self.path == "auto":
            refused = {"merge": refuses_merge(other), "pad": refuses_pad(other)}
            self.path = next((path for path, reason in refused.items() if reason is None), "concat")
        can_share = not config.num_virtual_tokens and refuses_sharing(body, training=True) is None
        self.shares = config.share_prompts is not False and can_share
        self.head = LMHead.from_model(pair.student)
        self._free = torch.inf if limit is None else limit - meter.held  # when the samplers are made
        self._kept: torch.Tensor | None = None
        self._away = 0  # bytes of a teacher that is on the host between its turns
        if config.teacher_offload:
            for parameter in pair.teacher.parameters():
                self._away += parameter.nbytes
                meter.elsewhere(parameter)
            with meter.phase("other", "teacher weights"):
                self._head_copy = torch.empty_like(LMHead.from_model(pair.teacher).weight)
        self.teacher = self._reader(pair.teacher, pair.teacher_adapter)

    def run(self) -> None:
        config, pair, meter = self.config, self.pair, self.meter
        trained = [p for p in pair.student.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: meter.see(p.grad, "gradients"))
        self._read_contexts()
        optimizer = rehearsed_optimizer(meter, config, trained, self.device)
        with meter.phase("other", "optimizer state"):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        answering = self._answering_model()
        if config.rollout in ("transformers", "generate"):
            self.rollout_batch = self._draw_answers(answering)
        pair.student.train()
        samples = self._samples([row for row in self._rows() for _ in range(self.job.turns)])
        groups = list(micro_batches(samples, config.micro_batch_tokens, share_prompts=self.shares))
        largest = self._largest(groups, self.shares)
        self.tokens = count_tokens(largest, share_prompts=self.shares)
        self.longest = max(count_tokens([sample]) for sample in samples)
        for _ in range(min(2, len(groups))):  # the second one finds gradients that exist already
            self._micro_batch(largest, total_weight(samples, config.normalize))
        with meter.phase("optimizer"):
            if self.device == "cpu" or config.optimizer == "adafactor":  # else one kernel, which takes nothing beside
                torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or float("inf"))
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.job.held_out:
            self._evaluate(answering)

    # ------------------------------------------------------------------------------------------ the teacher

    def _reader(self, model: Any, adapter: str) -> ContextTeacher:
        contexts = [[index % 8] * tokens for index, tokens in enumerate(self.job.contexts)]
        masters = any(p.dtype == torch.float32 for p in model.parameters()) and model is self.pair.student
        reader = ContextTeacher(
            model, contexts, path=self.path, adapter=adapter, max_prefix_bytes=self.config.max_prefix_bytes,
            max_batch_bytes=self.config.teacher_batch_bytes, frozen_weights=True,
            autocast=self._autocast if masters and self.config.teacher_mode != "frozen" else nullcontext,
        )  # fmt: skip
        _ = reader.head  # looked at once, before anything is counted
        return reader

    @contextmanager
    def _teacher_at_work(self) -> Iterator[None]:
        """An offloaded teacher is on the device."""
        copied = None
        if self._away:
            copied = next(self.pair.teacher.parameters()).new_empty(self._away, dtype=torch.uint8)
            self.meter.see(copied, "teacher weights")
        yield
        del copied

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast("cpu", dtype=self.dtype)

    def _read_contexts(self) -> None:
        if self.path == "concat":
            return
        with self.meter.phase("context"), self._teacher_at_work():
            prefixes = self.teacher.prefixes
        layers = [prefix.layer(i) for prefix in prefixes for i in range(len(prefix.keys))]
        stay = self.config.prefix_device != "cpu" or self.device == "cpu"
        for x in (x for tensors in layers for x in tensors):
            if stay:
                self.meter.see(x, "context KV")
            else:
                self.meter.elsewhere(x)
        if not stay:
            nbytes = max((sum(x.nbytes for x in tensors) for tensors in layers), default=0)
            with self.meter.phase("other", "context KV"):  # a layer at a time is on the device
                self._fetched = torch.empty(nbytes // 4)

    # ------------------------------------------------------------------------------------------- the answers

    def _answering_model(self) -> Any:
        """The copy that the run keeps, or the student."""
        config, student = self.config, self.pair.student
        make_copy, worth, _ = copy_for_answers(student, self.dtype, self.device, self._free, frozen_base=True)
        copies = worth if config.merge_for_rollout is None else config.merge_for_rollout
        if config.rollout not in ("transformers", "generate") or not copies or make_copy is None:
            return student
        with self.meter.phase("other", "copy for answers"):
            return make_copy().refresh()

    def _draw_answers(self, answering: Any) -> int:
        """By the student, by the teacher with the context in front, or by one after the other; how many at once."""
        config, rows, at_once = self.config, self._rows(), MOST
        if config.answers == "student" and config.off_policy_share < 1:
            at_once = self._rollout("rollout", answering, self._ids([student for student, _, _ in rows]))
        if not config.teacher_writes:
            return at_once
        kept = [row for row in self.job.prompts for _ in range(config.kept_answers)]  # drawn all in one go
        model = answering if config.teacher_mode == "live" else self.pair.teacher
        with self._teacher_at_work():
            return min(at_once, self._rollout("rollout", model, self._with_context(max(rows, kept, key=len))))

    def _rollout(self, phase: str, model: Any, prompts: Sequence[Sequence[int]]) -> int:
        """`TransformersRollout.generate` at its largest batch; returns that."""
        config, batch = self.config, self.config.rollout_batch or MOST
        decodes = config.rollout != "generate" and refuses_holding_once(model) is None
        if config.rollout_batch is None and self.limit is not None:
            free = max(self.limit - self.meter.held, 0)
            batch = batch_that_fits(
                model, max(map(len, prompts)), config.max_new_tokens, free, self.device,
                shared_tokens=common_prefix_length(prompts) if decodes else 0,
            )  # fmt: skip
        chosen = sorted(prompts, key=len)[-batch:]
        self._kept = None  # taken up by the next answers
        with self.meter.phase(phase):
            kept = first_and_last_token(
                model, chosen, config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
                decodes=decodes,
            )  # fmt: skip
        if self.device == "cuda" and 0 < kept <= KEPT_SHARE * (self.limit or 0):
            with self.meter.phase("other", "recorded steps"):
                self._kept = torch.empty(kept, dtype=torch.int8)
        return len(chosen)

    def _with_context(self, rows: Rows) -> list[list[int]]:
        return [[0] * self.job.contexts[context] + [i] * own for i, (_, own, context) in enumerate(rows)]

    def _rows(self) -> Rows:
        """The step's prompts, the longest of all: one set for every answer drawn."""
        longest = sorted(self.job.prompts, key=lambda row: row[0] + row[1], reverse=True)
        chosen = [longest[i % len(longest)] for i in range(self.config.batch_size)]
        return [row for row in chosen for _ in range(self.config.rollouts_per_prompt)]

    def _ids(self, lengths: Sequence[int]) -> list[list[int]]:
        """Prompts that differ after what they share; those of one prompt's answers are equal, but for later turns.
        Ids tell prompts from one another; nobody looks at them otherwise."""
        count, shared = self.config.rollouts_per_prompt if self.job.turns == 1 else 1, self.job.shared
        return [[0] * min(shared, n - 1) + [1 + i // count] * (n - min(shared, n - 1)) for i, n in enumerate(lengths)]

    def _samples(self, rows: Rows) -> list[Sample]:
        answer, prompts = [0] * self.config.max_new_tokens, self._ids([student for student, _, _ in rows])
        return [Sample(ids, [0] * own, context, answer) for ids, (_, own, context) in zip(prompts, rows, strict=True)]

    # --------------------------------------------------------------------------------------- forward, backward

    def _largest(self, groups: Sequence[list[Sample]], share: bool) -> list[Sample]:
        """The largest micro-batch. If there are several, answers that end sooner may fill it better than these do: what
        is left up to its bound is taken by a part of another sequence."""
        size = partial(count_tokens, share_prompts=share)
        largest = max(groups, key=size)
        room = (self.config.micro_batch_tokens or 0) - size(largest)
        if len(groups) == 1 or room <= 0:
            return largest
        other = next(group for group in groups if group is not largest)[0]
        part = min(room / size([other]), 1.0)

        def cut(ids: Sequence[int], least: int = 1) -> Sequence[int]:
            return ids[: max(least, int(part * len(ids)))]

        student = cut(other.student_prompt, min(self.job.shared, len(other.student_prompt) - 1) + 1)
        filled = [*largest, Sample(student, cut(other.teacher_prompt), other.context_index, cut(other.response))]
        return filled if size(filled) <= size(largest) + room else largest

    def _micro_batch(self, group: list[Sample], denominator: float) -> None:
        names = settings_with(belongs="divergence")
        loss, _ = self._context_kl(
            group, self.teacher, denominator, share_prompts=self.shares,
            divergence={name: getattr(self.config, name) for name in names},
        )  # fmt: skip
        with self.meter.phase("backward"):
            loss.backward()

    def _evaluate(self, answering: Any) -> None:
        config, rows = self.config, self.job.held_out[: self.config.eval_batch]
        self.pair.student.eval()
        if self.pair.reference is not None:
            with self._teacher_at_work():
                self._rollout("evaluation rollout", self.pair.reference, self._with_context(rows))
        if self.job.episodes:
            self._rollout("evaluation rollout", answering, self._ids([self._rows()[0][0]] * self.job.episodes))
        groups = list(micro_batches(self._samples(rows), config.micro_batch_tokens))
        reader = self._reader(self.pair.reference, self.pair.reference_adapter)
        with torch.no_grad(), self.meter.phase("evaluation"):
            self._context_kl(self._largest(groups, False), reader, 1.0, phase="evaluation")

    def _context_kl(
        self, group: list[Sample], reader: ContextTeacher, denominator: float, *, phase: str | None = None,
        share_prompts: bool = False, divergence: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """As a run calls it; its parts are phases of their own, or belong to `phase`."""
        config, options = self.config, divergence or {}
        scratch = scratch_bytes(
            sum(len(sample.response) for sample in group), self.head, reader.head, self.dtype, device=self.device,
            backend=self.backend, gradients=torch.is_grad_enabled(), workspace_bytes=config.workspace_bytes, **options,
        )  # fmt: skip

        @contextmanager
        def watch(part: str) -> Iterator[None]:
            at_work = self._teacher_at_work() if part == "teacher" else nullcontext()
            with self.meter.phase(phase or part, part, scratch if part == "loss" else 0), at_work:
                yield

        return context_kl(
            pack(group, normalize=config.normalize, share_prompts=share_prompts), self.pair.student, reader,
            temperature=config.temperature, denominator=denominator, compute_dtype=self.dtype, autocast=self._autocast,
            backend="torch",  # which of them is counted is the scratch's affair
            workspace_bytes=config.workspace_bytes, divergence=options or {"divergence": "reverse_kl"},
            student_head=self.head, stopwatch=watch,  # type: ignore[arg-type]
        )  # fmt: skip
