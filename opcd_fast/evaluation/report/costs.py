"""What a context in the weights costs, and whether it lasts: unrelated prompts, and what `evaluation.probes` asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opcd_fast.data import Context, Prompt, adapt_to_tokenizer, render, student_ids, whole_prompt
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Abilities, Arm, distances, tried
from opcd_fast.evaluation.report.arms import Answers, HeldOut
from opcd_fast.evaluation.report.estimates import agreement, kl_summary, share
from opcd_fast.evaluation.report.models import BOTH, SHOWN, RunModels, Side
from opcd_fast.evaluation.report.scores import Behaviour
from opcd_fast.runtime import stream_seed
from opcd_fast.training import scorer
from opcd_fast.training.step import Windows

Told = Callable[[str], None]


def forgetting(
    models: RunModels,
    general: Sequence[Prompt],
    context: Context | None,
    variables: dict[str, Any],
    sampling: Mapping[str, Any],
    seed: int,
    windows: Windows,
) -> dict[str, Any]:
    """Distances on unrelated prompts, each on the first named model's own answers: KL(student || base), KL(student ||
    base + context) with what it was before, KL(base || base + context), and the yardstick KL(base + context || base).

    All but the first are None where the context is not one for all prompts, or does not fit the window with these.
    """
    prompts, temperature = adapt_to_tokenizer(models.tokenizer, general), sampling["temperature"]
    without: list[Sequence[int]] = [student_ids(models.tokenizer, prompt, variables) for prompt in prompts]

    def written(side: Side, ids: Sequence[Sequence[int]], name: str) -> list[tuple[int, ...]]:
        return [one.token_ids for one in side.answers(ids, seed=stream_seed(seed, name, 0), **sampling)]

    answers = written(models.student, without, "report general")
    base = models.base.reader(without)
    student = models.student.reader(without).read(answers)
    found = distances(student, base.read(answers), temperature)
    numbers: dict[str, Any] = {"kl": kl_summary(found), "top1_agreement": agreement(found), "prompts": len(found)}
    numbers |= {"context_kl": None, "context_kl_before": None, "yardstick": None}
    if context is None:
        return numbers
    (rows,), prefixes = render(models.tokenizer, [prompts], context, variables)
    within = [whole_prompt(row, prefixes) for row in rows]
    if windows.teacher is not None and max(map(len, within)) + sampling["max_new_tokens"] > windows.teacher:
        return numbers
    shown = models.teacher.reader(within)
    taught = written(models.teacher, within, "report general context")
    plain = written(models.base, without, "report general base")
    more = {
        "context_kl": (student, shown.read(answers)),
        "context_kl_before": (base.read(plain), shown.read(plain)),
        "yardstick": (shown.read(taught), base.read(taught)),
    }
    return numbers | {name: kl_summary(distances(p, q, temperature)) for name, (p, q) in more.items()}


def arms_of(
    models: RunModels, arms: Sequence[str], context: Context | None, variables: dict[str, Any], windows: Windows
) -> dict[str, Arm]:
    """As they answer chats."""
    own = None if windows.student is None else windows.student - windows.virtual
    return {
        arm: Arm(
            models.tokenizer,
            models.of(arm).answers,
            (context or "") if arm in (SHOWN, BOTH) else None,
            variables,
            windows.teacher if arm == SHOWN else own,
        )
        for arm in arms
    }


def abilities(asked: Abilities, arms: Mapping[str, Arm], context: Context | None, told: Told) -> list[dict[str, Any]]:
    """Score of each arm in each. Raises InputError for a run whose prompts bring contexts of their own."""
    if asked.names and context is None:
        raise InputError("abilities need the context of the run, which has none: its prompts brought theirs")
    played = {arm: tried(f"abilities of {arm}", told, one.plays, asked) for arm, one in arms.items()}
    return [
        {"name": name, "arms": {arm: None if scores is None else share(scores[name]) for arm, scores in played.items()}}
        for name in asked.names
    ]


def other_context(
    arms: Mapping[str, Arm], held_out: HeldOut, seed: int, sampling: Mapping[str, Any], told: Told
) -> dict[str, Any]:
    """Share of answers in capital letters after turns that are, in each arm."""
    scores = {
        arm: tried(f"another context in {arm}", told, one.obeys, held_out.prompts, seed, **sampling)
        for arm, one in arms.items()
    }
    return {arm: None if found is None else share(found) for arm, found in scores.items()}


def second_turn(
    behaviours: Sequence[Behaviour],
    arms: Mapping[str, Arm],
    answers: Mapping[str, Answers],
    seed: int,
    sampling: Mapping[str, Any],
    held_out: HeldOut,
    told: Told,
) -> list[dict[str, Any]]:
    """Each behaviour of the answers to the held-out prompts as second questions, in each arm."""
    n, prompts = held_out.samples, held_out.prompts
    given = {
        arm: tried(
            f"a second turn in {arm}", told, one.second_answers, prompts, answers[arm].ids[::n], seed, **sampling
        )
        for arm, one in (arms.items() if behaviours else ())
    }
    messages, rows = next(iter(answers.values())).messages[::n], [prompt.row for prompt in prompts]

    def score(behaviour: Behaviour, arm: str) -> dict[str, Any] | None:
        if given[arm] is None:
            return None
        texts = [arms[arm].text(one.token_ids) for one in given[arm]]
        return share(scorer.scores_of(behaviour.scorer, messages, texts, rows, name=behaviour.name, share=True))

    return [{"name": one.name, "arms": {arm: score(one, arm) for arm in arms}} for one in behaviours]
