"""What a context in the weights costs, and whether it lasts: unrelated prompts, and what `evaluation.probes` asks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from opcd_fast.data import RenderedPrompt, adapt_to_tokenizer, micro_batches, pack, render, whole_prompt
from opcd_fast.evaluation import Arm, Reading, distances, tried
from opcd_fast.evaluation.compare.measurement import Yardstick, loss_options, with_first_weights
from opcd_fast.models import virtual_tokens
from opcd_fast.runtime import stream_seed
from opcd_fast.training import OPCDTrainer
from opcd_fast.training.step import check_prompt_length, divergence, samples_of, teacher_hidden_states

Told = Callable[[str], None]
NOT_MEASURED: dict[str, Any] = {
    "general_kl": None, "general_kls": [], "general_context_kl": None, "general_context_kls": [],
}  # fmt: skip


class Unrelated:
    """The unrelated prompts as a run's models read them. Raises InputError for one that is too long for the student.

    base: see `base_reader`. Without `taught`, the reader of base + context, where they do not fit its window.
    """

    def __init__(self, trainer: OPCDTrainer, yardstick: Yardstick, base: Any) -> None:
        self._trainer, self._yardstick, self._base = trainer, yardstick, base
        prompts = adapt_to_tokenizer(trainer.tokenizer, yardstick.general)
        (self.rows,), self.prefixes = render(
            trainer.tokenizer, [prompts], trainer.origins.context, trainer.config.template_variables()
        )
        windows, limit = trainer.parts.questions.windows, yardstick.sampling["max_new_tokens"]
        for row in self.rows:
            check_prompt_length(len(row.student_ids) + windows.virtual, limit, windows.student)
        longest = max(len(whole_prompt(row, self.prefixes)) for row in self.rows) + limit
        fits = windows.teacher is None or longest <= windows.teacher
        self.taught = trainer.teachers.reference_on(self.prefixes) if fits else None

    def of_student(self, seed: int) -> dict[str, Any]:
        """KL(student || base) and KL(student || base + context), on the student's own answers."""
        trainer, yardstick = self._trainer, self._yardstick
        answers = trainer.eval_rollout.generate(
            [row.student_ids for row in self.rows], **yardstick.sampling, seed=stream_seed(seed, "compare general", 0)
        )
        alone = [RenderedPrompt(row.student_ids, row.student_ids, 0, has_context=False) for row in self.rows]
        found: dict[str, Any] = {**NOT_MEASURED}
        for name, rows, reader in (("", alone, self._base), ("context_", self.rows, self.taught)):
            if reader is not None:
                each: list[float] = []
                options = loss_options(trainer, yardstick)
                kl = divergence(samples_of(rows, answers), trainer.model, reader, each=each, **options)["kl"]
                found |= {f"general_{name}kl": kl, f"general_{name}kls": each}
        return found

    @torch.no_grad()
    def of_context(self) -> dict[str, Any]:
        """The yardstick KL(base + context || base), on the answers of base + context."""
        if self.taught is None:
            return {"general_kl": None, "general_kls": []}
        trainer, yardstick = self._trainer, self._yardstick
        whole = [whole_prompt(row, self.prefixes) for row in self.rows]
        seed = stream_seed(0, "compare general fixed", 0)
        samples = samples_of(self.rows, with_first_weights(trainer, whole, **yardstick.sampling, seed=seed))
        hidden: tuple[list[Any], list[Any]] = ([], [])
        for some in micro_batches(samples, yardstick.micro_batch_tokens):
            batch = pack(some).to(trainer.device)
            hidden[0].append(teacher_hidden_states(self.taught, batch))
            hidden[1].append(self._base.hidden_states_packed(
                batch.student_ids, batch.student_cu_seqlens, select=batch.response_index_student))  # fmt: skip
        dtype, lengths = trainer.parts.compute_dtype, [len(sample.response) for sample in samples]
        p, q = (
            Reading(torch.cat(rows).to(dtype), reader.head.to(dtype), lengths)
            for rows, reader in zip(hidden, (self.taught, self._base))
        )
        each = [one.kl for one in distances(p, q, yardstick.sampling["temperature"])]
        return {"general_kl": statistics.fmean(each), "general_kls": each}


def student_arm(trainer: OPCDTrainer) -> Arm:
    window = trainer.parts.questions.windows.student
    room = None if window is None else window - virtual_tokens(trainer.model)
    return Arm(trainer.tokenizer, trainer.eval_rollout.generate, None, trainer.config.template_variables(), room)


def context_arm(trainer: OPCDTrainer) -> Arm:
    """base + context."""
    return Arm(
        trainer.tokenizer, partial(with_first_weights, trainer), trainer.origins.context,
        trainer.config.template_variables(), trainer.parts.questions.windows.teacher,
    )  # fmt: skip


def probes(arm: Arm, yardstick: Yardstick, firsts: Sequence[Sequence[int]], seed: int, told: Told) -> dict[str, Any]:
    """firsts: the arm's own answers to the held-out prompts, one each, as token ids."""
    prompts, found = yardstick.held_out, dict[str, Any]()
    plays = tried("abilities", told, arm.plays, yardstick.abilities) or {}
    found["abilities"] = {name: _mean(scores) for name, scores in plays.items()}
    found["other_context"] = found["second_turn"] = None
    if prompts:
        ask = {"seed": seed, **yardstick.sampling}
        found["other_context"] = _mean(tried("another context", told, arm.obeys, prompts, **ask))
        if yardstick.behaviour is not None:
            second = tried("a second turn", told, arm.second_answers, prompts, firsts, **ask)
            found["second_turn"] = _mean(second and yardstick.behaviour.shares(second))
    return found


def _mean(scores: list[float] | None) -> dict[str, Any] | None:
    return None if scores is None else {"score": statistics.fmean(scores), "scores": scores}
