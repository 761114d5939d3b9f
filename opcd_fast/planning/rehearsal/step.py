"""The parts of a step in the order in which the loop runs them, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from opcd_fast.data import Sample, count_tokens, micro_batches, pack
from opcd_fast.loss import LMHead
from opcd_fast.models import refuses_merge, refuses_pad, refuses_sharing, seam
from opcd_fast.planning.rehearsal.job import Job
from opcd_fast.planning.rehearsal.meter import Meter
from opcd_fast.planning.rehearsal.optimizer import rehearsed_optimizer, works_in_place
from opcd_fast.planning.rehearsal.rollout import answering_model, rehearse_rollout
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training.engines import ModelPair
from opcd_fast.training.settings import OPCDConfig
from opcd_fast.training.step import context_kl, total_weight


@dataclass(frozen=True)
class _Reader:
    """A teacher whose head is not looked for by its numbers."""

    reader: ContextTeacher
    head: LMHead
    at_work: Callable[[], AbstractContextManager[None]] = nullcontext

    def hidden_states_packed(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.at_work():
            return self.reader.hidden_states_packed(*args, **kwargs)


def _head(model: Any) -> LMHead:
    """Of the right size; factors on hidden states or logits, which `LMHead.from_model` measures, take no memory."""
    layer = seam.causal_lm(model).get_output_embeddings()  # type: ignore[operator]
    softcap = seam.setting(seam.config_of(seam.body_of(model)), "final_logit_softcapping")
    return LMHead(layer.weight, layer.bias, softcap=softcap)


class Step:
    """The parts of a step, in the order in which the loop runs them."""

    def __init__(
        self,
        config: OPCDConfig,
        job: Job,
        pair: ModelPair,
        meter: Meter,
        device: str,
        dtype: torch.dtype,
        limit: int | None,
    ) -> None:
        self.config, self.job, self.pair, self.meter = config, job, pair, meter
        self.device, self.dtype, self.limit, self.rollout_batch = device, dtype, limit, 0
        body = seam.body_of(pair.student)
        self.path = config.teacher_path
        notes = []
        teacher_body = seam.body_of(pair.teacher)
        if self.path == "auto":
            refused = (("merge", refuses_merge), ("pad", refuses_pad))
            self.path = next((path for path, refuses in refused if refuses(teacher_body) is None), "concat")
        if self.path != "merge":
            notes.append(f"an estimate: the teacher reads its context by path {self.path!r}")
        if device == "cuda" and (seam.setting(seam.config_of(body), "sliding_window") or 0) > 0:
            notes.append("an estimate: windowed layers are counted as on a CPU")
        if config.teacher_device != "auto":
            notes.append(f"an estimate: the teacher on {config.teacher_device!r} is counted as if it were here")
        if config.rollout == "vllm":
            notes.append("not counted: what rollout='vllm' takes for itself (rollout_gpu_share)")
        if config.objective == "nll":
            notes.append("an estimate: objective='nll' is counted as the divergence, teacher included")
        if config.optimizer.startswith("paged_"):
            notes.append("not counted: the paged part of the optimizer's state, which leaves the GPU when it is full")
        if job.turns > 1:
            longest = max(student for student, _, _ in job.prompts)
            notes.append(
                f"an estimate: every episode takes all of its {job.turns} turns, each as long as the longest of those "
                f"played with random answers ({longest} tokens)"
            )
        if device == "cuda" and config.num_virtual_tokens:
            notes.append("an estimate: the student's attention after its trained prefix is counted as on a CPU")
        self.notes = tuple(notes)
        can_share = not config.num_virtual_tokens and refuses_sharing(body, training=True) is None
        self.shares = config.share_prompts is not False and can_share
        self._weights_elsewhere = 0
        if config.teacher_offload:
            self._move_teacher()
        self.teacher = self._reader(pair.teacher, pair.teacher_adapter)

    def _reader(self, model: Any, adapter: str) -> _Reader:
        contexts = [torch.full((tokens,), index % 8) for index, tokens in enumerate(self.job.contexts)]
        masters = any(p.dtype == torch.float32 for p in model.parameters()) and model is self.pair.student
        reader = ContextTeacher(
            model, contexts, path=self.path, adapter=adapter, max_prefix_bytes=self.config.max_prefix_bytes,
            max_batch_bytes=self.config.teacher_batch_bytes, frozen_weights=True,
            autocast=self.autocast if masters and self.config.teacher_mode != "frozen" else nullcontext,
        )  # fmt: skip
        reader._choice._chosen = self.path, "rehearsed"  # checking it would need numbers
        return _Reader(reader, _head(model), self._at_work)

    def _move_teacher(self) -> None:
        """To the host, but for a copy of its lm-head."""
        for parameter in self.pair.teacher.parameters():
            self._weights_elsewhere += parameter.nbytes
            self.meter.elsewhere(parameter)
        head = _head(self.pair.teacher)
        with self.meter.phase("other", "teacher weights"):
            self._head_copy = torch.empty_like(head.weight)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """An offloaded teacher is on the device."""
        copied = None
        if self._weights_elsewhere:
            copied = next(self.pair.teacher.parameters()).new_empty(self._weights_elsewhere, dtype=torch.uint8)
            self.meter.see(copied, "teacher weights")
        yield
        del copied

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.dtype)

    def everything(self) -> None:
        pair, meter = self.pair, self.meter
        self.parameters = [p for p in pair.student.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: meter.see(p.grad, "gradients"))
        self._read_contexts()
        optimizer = self._optimizer()
        self._answers = answering_model(meter, pair.student, self.config, self.device)
        if self.config.rollout in ("transformers", "generate"):
            self.rollout_batch = self._draw_answers()
        pair.student.train()
        optimizer.zero_grad(set_to_none=True)
        samples = self._samples([row for row in self._rows() for _ in range(self.job.turns)])
        groups = list(micro_batches(samples, self.config.micro_batch_tokens, share_prompts=self.shares))
        largest = self._largest(groups, self.shares)
        self.tokens = count_tokens(largest, share_prompts=self.shares)
        self.longest = max(count_tokens([sample]) for sample in samples)
        for _ in range(min(2, len(groups))):  # the second one finds gradients that exist already
            self._micro_batch(largest, total_weight(samples, self.config.normalize))
        with meter.phase("optimizer"):
            if not works_in_place(self.config, self.device):
                torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or float("inf"))
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.job.held_out:
            self._evaluate()

    def _draw_answers(self) -> int:
        """By the student, or by the teacher with the context in front; how many at once."""
        config, rows = self.config, self._rows()
        if config.answers == "student":
            prompts = self._ids([student for student, _, _ in rows])
            return rehearse_rollout(self.meter, "rollout", self._answers, config, prompts, self.limit)
        kept = [row for row in self.job.prompts for _ in range(config.kept_answers)]  # drawn all in one go
        prompts = self._with_context(max(rows, kept, key=len))
        model = self._answers if config.teacher_mode == "live" else self.pair.teacher
        with self._at_work():
            return rehearse_rollout(self.meter, "rollout", model, config, prompts, self.limit)

    def _with_context(self, rows: Sequence[tuple[int, int, int]]) -> list[list[int]]:
        contexts = self.job.contexts
        return [[0] * contexts[context] + [i] * own for i, (_, own, context) in enumerate(rows)]

    def _read_contexts(self) -> None:
        if self.path == "concat":
            return
        meter = self.meter
        with meter.phase("context"), self._at_work():
            self.prefixes = self.teacher.reader.prefixes
        layers = [prefix.layer(i) for prefix in self.prefixes for i in range(len(prefix.keys))]
        if self.config.prefix_device != "cpu" or self.device == "cpu":
            for x in (x for tensors in layers for x in tensors):
                meter.see(x, "context KV")
            return
        for x in (x for tensors in layers for x in tensors):
            meter.elsewhere(x)
        nbytes = max((sum(x.nbytes for x in tensors) for tensors in layers), default=0)
        with meter.phase("other", "context KV"):  # two layers at a time are on the device
            self._fetched = torch.empty(2 * nbytes // 4)

    def _optimizer(self) -> Any:
        optimizer = rehearsed_optimizer(self.meter, self.config, self.parameters, self.device)
        with self.meter.phase("other", "optimizer state"):
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
                self.meter.see(parameter.grad, "gradients")  # kept until after the next rollout
            optimizer.step()
        return optimizer

    def _rows(self) -> Sequence[tuple[int, int, int]]:
        """The step's prompts, the longest of all: one set for every answer drawn."""
        longest = sorted(self.job.prompts, key=lambda row: row[0] + row[1], reverse=True)
        chosen = [longest[i % len(longest)] for i in range(self.config.batch_size)]
        return [row for row in chosen for _ in range(self.config.rollouts_per_prompt)]

    def _ids(self, lengths: Sequence[int]) -> list[list[int]]:
        """Prompts that differ after what they share; those of one prompt's answers are equal, but for later turns."""
        count, shared = self.config.rollouts_per_prompt if self.job.turns == 1 else 1, self.job.shared
        return [[0] * min(shared, n - 1) + [1 + i // count] * (n - min(shared, n - 1)) for i, n in enumerate(lengths)]

    def _samples(self, rows: Sequence[tuple[int, int, int]]) -> list[Sample]:
        # Ids tell prompts from one another; nobody looks at them otherwise.
        answers, prompts = [0] * self.config.max_new_tokens, self._ids([student for student, _, _ in rows])
        return [
            Sample(ids, [0] * teacher, context, answers)
            for ids, (_, teacher, context) in zip(prompts, rows, strict=True)
        ]

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

        least = min(self.job.shared, len(other.student_prompt) - 1) + 1
        student, teacher = cut(other.student_prompt, least), cut(other.teacher_prompt)
        filled = [*largest, Sample(student, teacher, other.context_index, cut(other.response))]
        return filled if size(filled) <= size(largest) + room else largest

    def _micro_batch(self, group: list[Sample], denominator: float) -> None:
        config, meter = self.config, self.meter
        loss, stats = context_kl(
            pack(group, normalize=config.normalize, share_prompts=self.shares),
            self.pair.student,
            self.teacher,
            temperature=config.temperature,
            denominator=denominator,
            compute_dtype=self.dtype,
            autocast=self.autocast,
            backend="torch",  # which of them is counted is the scratch's affair
            workspace_bytes=config.workspace_bytes,
            divergence={name: getattr(config, name) for name in ("divergence", "beta", "alpha", "k", "tail")},
            student_head=_head(self.pair.student),
            stopwatch=meter.phase,  # type: ignore[arg-type]
        )
        with meter.phase("backward"):
            loss.backward()
        del loss, stats

    def _evaluate(self) -> None:
        rows = self.job.held_out[: self.config.eval_batch]
        self.pair.student.eval()
        if self.pair.reference is not None:
            prompts = self._with_context(rows)
            with self._at_work():
                rehearse_rollout(
                    self.meter, "evaluation rollout", self.pair.reference, self.config, prompts, self.limit
                )
        if self.job.episodes:
            longest = self._ids([self._rows()[0][0]] * self.job.episodes)
            rehearse_rollout(self.meter, "evaluation rollout", self._answers, self.config, longest, self.limit)
        groups = list(micro_batches(self._samples(rows), self.config.micro_batch_tokens))
        reader = self._reader(self.pair.reference, self.pair.reference_adapter)
        phase = self.meter.phase
        with torch.no_grad(), phase("evaluation"):
            context_kl(
                pack(self._largest(groups, False)), self.pair.student, reader, temperature=self.config.temperature,
                denominator=1.0, compute_dtype=self.dtype, autocast=self.autocast, backend="torch",
                workspace_bytes=self.config.workspace_bytes, student_head=_head(self.pair.student),
                stopwatch=lambda part: phase("evaluation", part),  # type: ignore[arg-type]
            )  # fmt: skip
