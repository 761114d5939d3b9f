"""Behaviour and task scores of the four arms, and where the student does worse than base + context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opcd_fast.data import Context
from opcd_fast.errors import InputError
from opcd_fast.evaluation.report.arms import ARMS, BASE, BOTH, SHOWN, STUDENT, Answers, share, transcript
from opcd_fast.evaluation.report.models import RunModels
from opcd_fast.evaluation.report.scorers import Scorer
from opcd_fast.runtime import stream_seed


def behaviour(scorer: Scorer, answers: Mapping[str, Answers], examples: int) -> dict[str, Any]:
    """Score of each arm with its interval, and the regressions."""
    scored = {
        arm: [scorer(*asked) for asked in zip(found.messages, found.texts, found.rows, strict=True)]
        for arm, found in answers.items()
    }
    per_prompt = answers[STUDENT].per_prompt
    arms = {arm: share(answers[arm].by_prompt(values), per_prompt) for arm, values in scored.items()}
    shown, student = answers[SHOWN], answers[STUDENT]
    pairs = [
        {
            "prompt": student.transcripts[index],
            "scores": {SHOWN: scored[SHOWN][index], STUDENT: scored[STUDENT][index]},
            "answers": {SHOWN: shown.texts[index], STUDENT: student.texts[index]},
        }
        for index in range(len(student.texts))
    ]
    return {"name": scorer.name, "kind": scorer.kind, "arms": arms, "regressions": regressions(pairs, examples)}


def regressions(pairs: Sequence[dict[str, Any]], examples: int) -> dict[str, Any]:
    """Those of the pairs in which the student scored lower, the worst first; and how many went the other way."""
    worse = [pair for pair in pairs if pair["scores"][STUDENT] < pair["scores"][SHOWN]]
    better = sum(pair["scores"][STUDENT] > pair["scores"][SHOWN] for pair in pairs)
    worse.sort(key=lambda pair: pair["scores"][STUDENT] - pair["scores"][SHOWN])
    return {"count": len(worse), "better": better, "of": len(pairs), "examples": worse[:examples]}


def task_scores(
    name: str,
    models: RunModels,
    context: Context | None,
    options: Any,
    sampling: Mapping[str, Any],
    arms: Sequence[str] = ARMS,
) -> dict[str, Any]:
    """The same for a task's episodes of the split "test", each played by every one of `arms`."""
    from opcd_fast.data.tasks import load_task, play

    if context is None:
        raise InputError(f"task {name!r} needs the context of the run, which has none: its prompts brought theirs")
    task = load_task(name)
    sides = {BASE: models.base, SHOWN: models.teacher, STUDENT: models.student, BOTH: models.student}
    played = {}
    for arm in arms:
        side = sides[arm]
        with side.acting():
            played[arm] = play(
                task.episodes("test", options.max_prompts, options.seed),
                side.rollout,
                models.tokenizer,
                context=context if arm in (SHOWN, BOTH) else None,
                max_turns=task.max_turns,
                seed=stream_seed(options.seed, f"report {name}", 0),
                **sampling,
            )
    if len(played[STUDENT]) < 2:
        raise InputError(f"task {name!r} has {len(played[STUDENT])} problems to test on; at least 2 are needed")
    found = {arm: share([episode.score for episode in episodes]) for arm, episodes in played.items()}
    pairs = []
    for shown, student in zip(played[SHOWN], played[STUDENT], strict=True):
        pairs.append(
            {
                "prompt": transcript(student.turns[0].messages),
                "scores": {SHOWN: shown.score, STUDENT: student.score},
                "answers": {SHOWN: _answers(shown), STUDENT: _answers(student)},
            }
        )
    return {"name": name, "kind": "task", "arms": found, "regressions": regressions(pairs, options.examples)}


def _answers(episode: Any) -> str:
    """All answers of an episode; several turns are numbered."""
    texts = [turn.answer for turn in episode.turns]
    return texts[0] if len(texts) == 1 else "\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))
