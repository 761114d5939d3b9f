"""The yardstick: every trained model of a comparison is measured by this, and the model before training too."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opcd_fast.data import Prompt, Sample
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Abilities
from opcd_fast.runtime import digest, stream_seed, write_text
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training import HeldOutScore, OPCDTrainer
from opcd_fast.training.engines import is_peft
from opcd_fast.training.step import divergence, samples_of


@dataclass(frozen=True)
class Yardstick:
    """What all are measured with."""

    general: Sequence[Prompt]  # unrelated prompts; empty: forgetting is not measured
    behaviour: HeldOutScore | None  # of the held-out prompts, in the order of the trainer's rows; 0 to 1
    held_out: Sequence[Prompt]
    answers: int  # per held-out prompt
    sampling: dict[str, Any]  # max_new_tokens, temperature, top_p
    micro_batch_tokens: int = 8192
    task_episodes: int = 0  # of the split "test", where the prompts are a task's
    abilities: Abilities = field(default_factory=Abilities)

    def identity(self) -> dict[str, Any]:
        """What results of the same comparison have in common."""
        # Named only where there are any: results of an earlier version are without, and stay good.
        asked = {"abilities": asdict(self.abilities)} if self.abilities.names else {}
        return {
            "scorer": self.behaviour.name if self.behaviour else None,
            "general prompts": digest([repr(prompt) for prompt in self.general]),
            "held-out prompts": digest([repr(prompt) for prompt in self.held_out]),
            "answers per prompt": self.answers, "sampling": self.sampling, "task episodes": self.task_episodes,
            **asked,
        }  # fmt: skip


def measure(
    trainer: OPCDTrainer, yardstick: Yardstick, fixed: Sequence[Sample], seed: int
) -> tuple[dict[str, Any], list[Any]]:
    """Numbers of the student as it is now, on the held-out prompts; and its answers to them, in rounds over all.

    Args:
        trainer: its student is measured, against its teacher's first weights with the context.
        fixed: answers that these wrote; the same ones for all.
        seed: of the student's answers.
    Returns:
        own_kl, fixed_kl (mean over answers of the mean token KL, nats; each answer's in own_kls, fixed_kls), own_top1,
        fixed_top1; score (None without a scorer) and each answer's; length, finished.
    """
    options, reference = loss_options(trainer, yardstick), trainer.teachers.reference
    assert reference is not None, "check_common lets no run through that keeps none"
    rows = list(trainer.held_out_rows) * yardstick.answers
    trainer.eval_rollout.sync(trainer.model)
    answers = trainer.eval_rollout.generate(
        [row.student_ids for row in rows], **yardstick.sampling, seed=stream_seed(seed, "compare own", 0)
    )
    own_kls: list[float] = []
    fixed_kls: list[float] = []
    own = divergence(samples_of(rows, answers), trainer.model, reference, each=own_kls, **options)
    taught = divergence(fixed, trainer.model, reference, each=fixed_kls, **options)
    found: dict[str, Any] = {
        "own_kl": own["kl"], "own_kls": own_kls, "own_top1": own["top1_agreement"],
        "fixed_kl": taught["kl"], "fixed_kls": fixed_kls, "fixed_top1": taught["top1_agreement"],
        "length": statistics.fmean(len(a.token_ids) for a in answers),
        "finished": statistics.fmean(a.finished for a in answers),
        **behaviour_of(yardstick, answers),
    }  # fmt: skip
    if yardstick.task_episodes:
        found |= task_score(trainer, yardstick, trainer.samplers.student_writes)
    return found, list(answers)


def behaviour_of(yardstick: Yardstick, answers: Sequence[Any]) -> dict[str, Any]:
    """Mean score of answers to the held-out prompts, in rounds over all of them, and each one's.

    Raises InputError for a scorer that gives no number from 0 to 1: the table shows shares.
    """
    if yardstick.behaviour is None:
        return {"score": None, "scores": []}
    count = len(yardstick.held_out)
    rounds = (answers[start : start + count] for start in range(0, len(answers), count))
    scores = [score for one in rounds for score in yardstick.behaviour.shares(one)]
    return {"score": statistics.fmean(scores), "scores": scores}


def task_score(trainer: OPCDTrainer, yardstick: Yardstick, write: Any) -> dict[str, Any]:
    """Score on the split "test" of the trainer's task; each episode's is not kept."""
    sampling = {**yardstick.sampling, "seed": stream_seed(0, "compare task", 0)}
    found = trainer.source.score(write, "test", yardstick.task_episodes, sampling)  # type: ignore[attr-defined]
    return {"task_score": found["task_score"], "task_episodes": found["task_episodes"]}


def fixed_answers(trainer: OPCDTrainer, yardstick: Yardstick, folder: Path) -> tuple[list[Sample], dict[str, Any]]:
    """The first weights' answers with the context in front, from disk where they are, and how they score."""
    path = folder / "fixed.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return [Sample(**row) for row in kept["samples"]], kept["found"]
    rows, write = list(trainer.held_out_rows) * yardstick.answers, trainer.samplers.first_writes
    answers = write(rows, {**yardstick.sampling, "seed": stream_seed(0, "compare fixed", 0)})
    samples = samples_of(rows, answers)
    found = behaviour_of(yardstick, answers)
    if yardstick.task_episodes:
        found |= task_score(trainer, yardstick, write)
    write_text(path, json.dumps({"found": found, "samples": [asdict(sample) for sample in samples]}))
    return samples, found


def with_first_weights(trainer: OPCDTrainer, prompts: Sequence[Sequence[int]], **sampling: Any) -> Any:
    """Answers of the model as it was before training."""
    with trainer.base_weights():
        return trainer.teacher_rollout.generate(prompts, **sampling)


def base_reader(trainer: OPCDTrainer, load_base: Callable[[], Any] | None = None) -> ContextTeacher:
    """Reads prompts without any context with the student's first weights.

    load_base: loads these once more. Needed where the run keeps no copy of them (full fine-tuning with another model as
    the teacher), or keeps it elsewhere or packed.
    """
    reference = trainer.teachers.first_weights()[0]
    adapter, model, autocast = "active", reference.model, reference.autocast
    if is_peft(trainer.model):
        adapter, model, autocast = "disabled", trainer.model, nullcontext
    elif load_base is not None:
        model, autocast = load_base().to(trainer.device).eval(), nullcontext
    try:
        return ContextTeacher(model, [[]], path=trainer.config.teacher_path, adapter=adapter, autocast=autocast)
    except ValueError as error:
        raise InputError(str(error)) from error


def loss_options(trainer: OPCDTrainer, yardstick: Yardstick) -> dict[str, Any]:
    """How a run computes its loss, at the yardstick's temperature."""
    return {
        **trainer.loss_options(), "temperature": yardstick.sampling["temperature"],
        "device": trainer.device, "micro_batch_tokens": yardstick.micro_batch_tokens,
    }  # fmt: skip
