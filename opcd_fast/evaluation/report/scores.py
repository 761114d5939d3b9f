"""Behaviour and task scores of the four arms, and where the student does worse than base + context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_fast.data import Context, transcript
from opcd_fast.data.tasks import load_task
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Arm
from opcd_fast.evaluation.report.arms import Answers
from opcd_fast.evaluation.report.estimates import share
from opcd_fast.evaluation.report.models import SHOWN, STUDENT
from opcd_fast.runtime import stream_seed
from opcd_fast.training import Scorer, scorer


@dataclass(frozen=True)
class Behaviour:
    """What a user calls right, a scorer from 0 to 1."""

    name: str
    kind: str  # "regex" or "function"
    scorer: Scorer


def by_pattern(pattern: str) -> Behaviour:
    """1 where the regular expression is found in the answer. Raises InputError for one that is not valid."""
    return Behaviour(pattern, "regex", scorer.pattern_scorer(pattern))


def by_function(name: str) -> Behaviour:
    """`module:function`, the same as a run's `scorer`. Raises InputError."""
    return Behaviour(name, "function", scorer.load_scorer(name))


def behaviour_scores(behaviour: Behaviour, answers: Mapping[str, Answers], examples: int) -> dict[str, Any]:
    """Score of each arm with its interval, and the regressions. Raises InputError for a scorer's mistakes."""
    scored = {
        arm: scorer.scores_of(behaviour.scorer, a.messages, a.texts, a.rows, name=behaviour.name, share=True)
        for arm, a in answers.items()
    }
    arms = {arm: share(a.by_prompt(scored[arm]), a.per_prompt) for arm, a in answers.items()}
    asked = [transcript(messages) for messages in answers[STUDENT].messages]
    told = {arm: (scored[arm], answers[arm].texts) for arm in (SHOWN, STUDENT)}
    return {"name": behaviour.name, "kind": behaviour.kind, "arms": arms, "regressions": _worse(asked, told, examples)}


def task_scores(
    name: str, arms: Mapping[str, Arm], context: Context | None, options: Any, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """The same for a task's episodes of the split "test", each played by every one of `arms`."""
    if context is None:
        raise InputError(f"task {name!r} needs the context of the run, which has none: its prompts brought theirs")
    task = load_task(name)
    seed = stream_seed(options.seed, f"report {name}", 0)
    played = {
        arm: one.play(task, task.episodes("test", options.max_prompts, options.seed), seed=seed, **sampling)
        for arm, one in arms.items()
    }
    if len(played[STUDENT]) < 2:
        raise InputError(f"task {name!r} has {len(played[STUDENT])} problems to test on; at least 2 are needed")
    scored = {arm: [episode.score for episode in episodes] for arm, episodes in played.items()}
    asked = [transcript(episode.turns[0].messages) for episode in played[STUDENT]]
    told = {arm: (scored[arm], [_answers(one) for one in played[arm]]) for arm in (SHOWN, STUDENT)}
    found = {arm: share(scores) for arm, scores in scored.items()}
    return {"name": name, "kind": "task", "arms": found, "regressions": _worse(asked, told, options.examples)}


def _worse(
    asked: Sequence[str], told: Mapping[str, tuple[Sequence[float], Sequence[str]]], examples: int
) -> dict[str, Any]:
    """Where the student scored lower than base + context, the worst first; and how often it was the other way.

    told: scores and answers of these two arms, one for each of `asked`.
    """
    pairs: list[dict[str, Any]] = [
        {
            "prompt": prompt,
            "scores": {arm: scores[index] for arm, (scores, _) in told.items()},
            "answers": {arm: texts[index] for arm, (_, texts) in told.items()},
        }
        for index, prompt in enumerate(asked)
    ]
    gains = [pair["scores"][STUDENT] - pair["scores"][SHOWN] for pair in pairs]
    worst = sorted((index for index, gain in enumerate(gains) if gain < 0), key=gains.__getitem__)
    kept = [pairs[index] for index in worst[:examples]]
    return {"count": len(worst), "better": sum(gain > 0 for gain in gains), "of": len(pairs), "examples": kept}


def _answers(episode: Any) -> str:
    """All answers of an episode; several turns are numbered."""
    texts = [turn.answer for turn in episode.turns]
    return texts[0] if len(texts) == 1 else "\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))
