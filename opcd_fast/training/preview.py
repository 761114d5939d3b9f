"""Answers side by side: what a run is to teach, before it starts, and what it has taught so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.data import Prompt, whole_prompt
from opcd_fast.rollout import TransformersRollout
from opcd_fast.runtime import printable
from opcd_fast.training.step import divergence, samples_of

LONGEST, WIDTH = 64, 200  # tokens of an answer, characters of it that are shown
NOTHING_TO_LEARN = 0.05  # nats per token; of the contexts in experiments/results none has less than 0.4


@dataclass(frozen=True)
class Pair:
    """The most probable answers to one prompt, of at most `LONGEST` tokens.

    without: the student's. within: the teacher's, with the context. kl: mean over the tokens of `within` of
    KL(student || teacher), nats. first_token: the student's probability of its first token. same: token by token.
    """

    prompt: str
    without: str
    within: str
    kl: float
    first_token: float
    same: bool


def preview(trainer: Any, count: int) -> list[Pair]:
    """Of an `OPCDTrainer` that has made no step, on its first held-out prompts with a context (training prompts, where
    it has none).

    The samplers are its own, and nothing of the run depends on whether this was called.
    """
    asked = trainer.parts.questions.asked
    rows, given = (trainer.eval_rows, asked.held_out_given) if trainer.eval_rows else (trainer.train_rows, asked.given)
    chosen = [(row, prompt) for row, prompt in zip(rows, given) if row.has_context][:count]
    rows = [row for row, _ in chosen]
    tokens = min(LONGEST, trainer.config.max_new_tokens)

    def most_probable(model: Any, prompts: Sequence[Sequence[int]]) -> Any:
        sampler = TransformersRollout(model, engine="generate", max_batch=8, **trainer.samplers.common)
        return sampler.generate(prompts, max_new_tokens=tokens, temperature=0.0)

    plains = most_probable(trainer.model, [row.student_ids for row in rows])
    with trainer.base_weights():
        teacher, _ = trainer.teachers.first_weights()
        shown = most_probable(teacher.model, [whole_prompt(row, trainer.prefixes) for row in rows])
    pairs = []
    for (_, prompt), sample, plain, said in zip(chosen, samples_of(rows, shown), plains, shown):
        found = divergence(
            [sample], trainer.model, trainer.teachers.reference or trainer.teacher,
            device=trainer.device, engine=trainer.engine, **trainer.loss_options(),
        )  # fmt: skip
        without, within = (
            trainer.tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in (plain, said)
        )
        same = plain.token_ids == said.token_ids
        pairs.append(Pair(question(prompt), without, within, found["kl"], found["first_token"], same))
    return pairs


def in_lines(pairs: Sequence[Pair]) -> Iterator[str]:
    """For people."""
    yield f"what the context changes ({len(pairs)} prompts, most probable answers):"
    for pair in pairs:
        yield from side_by_side(pair.prompt, {"base": pair.without, "base + context": pair.within})
        yield f"    KL {pair.kl:.3g} nats per token; base begins so with probability {pair.first_token:.2g}"
    yield verdict(pairs)


def side_by_side(prompt: str, answers: dict[str, str]) -> Iterator[str]:
    """A prompt, and the answers to it by who gave them."""
    yield f"  {one_line(prompt)}"
    width = max(map(len, answers))
    yield from (f"    {name:{width}}  {one_line(answer)}" for name, answer in answers.items())


def changes_something(pairs: Sequence[Pair]) -> bool:
    return not all(pair.same for pair in pairs) and statistics.fmean(pair.kl for pair in pairs) >= NOTHING_TO_LEARN


def verdict(pairs: Sequence[Pair]) -> str:
    kl = statistics.fmean(pair.kl for pair in pairs)
    if kl < NOTHING_TO_LEARN:
        return f"Your context hardly changes this model's answers (KL {kl:.2g} nats per token): little is to be learnt."
    if all(pair.same for pair in pairs):
        return (
            "This model does not follow your context: its most probable answers are the same without it. Show the "
            "behaviour in chat turns (.json) as well, or take a larger model."
        )
    return f"The context changes the answers (KL {kl:.2g} nats per token). Are these the answers you want? Then train."


def question(prompt: Prompt) -> str:
    """What a prompt asks: its text, or the last message of its user."""
    if prompt.text is not None:
        return prompt.text
    said = [message.get("content") or "" for message in prompt.messages or () if message["role"] == "user"]
    return said[-1] if said else str((prompt.messages or ({"content": ""},))[-1].get("content") or "")


def one_line(text: str) -> str:
    """Of at most `WIDTH` characters, none of which a terminal obeys."""
    plain = " ".join(printable(text).split())
    return plain if len(plain) <= WIDTH else plain[: WIDTH - 1] + "…"
