"""Every number of a run's card, measured on held-out prompts; models are loaded and the context is read once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from opcd_fast.data import GENERAL, Context, Prompt, adapt_to_tokenizer, read_prompts, render, transcript
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Abilities, Distance, distances, tried, where_it_ran
from opcd_fast.evaluation.report.arms import Answers, HeldOut, draw_arms
from opcd_fast.evaluation.report.costs import abilities, arms_of, forgetting, other_context, second_turn
from opcd_fast.evaluation.report.estimates import agreement, gap, identical_greedy
from opcd_fast.evaluation.report.models import BASE, SHOWN, STUDENT, RunModels, load_run
from opcd_fast.evaluation.report.scores import Behaviour, behaviour_scores, task_scores
from opcd_fast.evaluation.report.speed import saved
from opcd_fast.models import SMOLLM2, Place, is_path, virtual_tokens
from opcd_fast.training.run import (
    PROMPTS,
    RECORD,
    FileHashes,
    curve,
    hash_of,
    kept_held_out,
    question_hash,
    read_record,
    row_of,
    run_settings,
    weight_files,
)
from opcd_fast.training.settings import OPCDConfig, settings_with
from opcd_fast.training.step import Windows, check_lengths

SCHEMA = 1
WARNING = (
    "A context that was moved into weights can be drawn out of them again, by anybody who can use or read the weights. "
    "Do not move secrets in, and do not publish weights whose context is not public."
)


@dataclass(frozen=True)
class ReportOptions:
    """How a run is measured. None stands for the run's own setting."""

    prompts: Sequence[Prompt] | None = None
    general: Sequence[Prompt] | None = None
    behaviours: Sequence[Behaviour] = ()
    tasks: Sequence[str] = ()
    abilities: Abilities = field(default_factory=Abilities)
    model: str | None = None
    trust_remote_code: bool = False
    max_prompts: int = 32
    samples: int = 1
    max_new_tokens: int | None = None
    temperature: float | None = None
    examples: int = 20
    seed: int = 0


def measure(run: Path, options: ReportOptions, told: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The card of a run, as JSON values (keys: docs/report.md). told: gets a line for each part as it begins.

    Raises InputError: no finished run, missing held-out prompts, another base than the run's.
    """
    started = time.perf_counter()
    record, settings, training = read_record(run), run_settings(run), curve(run)
    if record is None:
        raise InputError(f"{str(run)!r} has no {RECORD}: it is no run of `opcd train`, or is not one yet")
    context: Context | None = record["context"]
    prompts, many = _held_out(run, options)
    general, trained_on = _general(run, options)
    told("loading the models")
    models = load_run(run, record, settings, options.model, options.trust_remote_code)
    variables = OPCDConfig(chat_template_kwargs=settings.get("chat_template_kwargs")).template_variables()
    held_out = _rendered(models, prompts, context, variables, options.samples)
    new_tokens = options.max_new_tokens or settings.get("max_new_tokens", 512)
    windows = Windows.of(models.student.model, models.teacher.model, virtual_tokens(models.student.model))
    check_lengths(held_out.rows, held_out.prefixes, new_tokens, windows)
    arms = held_out.arms(new_tokens, windows)
    sampling = {
        "max_new_tokens": new_tokens,
        "temperature": settings.get("temperature", 1.0) if options.temperature is None else options.temperature,
        "top_p": settings.get("top_p", 1.0),
    }
    if sampling["temperature"] <= 0:
        raise InputError("temperature must be above 0: it divides the logits that are compared")

    told(f"answers of {len(arms)} arms to {len(held_out.rows)} held-out prompts")
    answers = draw_arms(models, held_out, arms, options.seed, sampling)
    told("KL to the teacher")
    own, fixed, greedy = _against_teacher(models, held_out, answers, sampling, told)
    told("unrelated prompts")
    given = models, general, context, variables, sampling, options.seed, windows
    forgot = tried("forgetting", told, forgetting, *given) if general else None
    told("scores")
    scores = [behaviour_scores(behaviour, answers, options.examples) for behaviour in options.behaviours]
    asked, seed = arms_of(models, arms, context, variables, windows), options.seed
    scores += [task_scores(name, asked, context, options, sampling) for name in options.tasks]
    told("abilities, another context, a second turn")
    costs = {
        "abilities": abilities(options.abilities, asked, context, told),
        "other_context": other_context(asked, held_out, seed, sampling, told),
        "second_turn": second_turn(options.behaviours, asked, answers, seed, sampling, held_out, told),
    }
    told("prefill time")
    time_saved = saved(models, held_out)
    return {
        "schema": SCHEMA,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": run.resolve().name,
        "base_model": public_name(models.base_name),
        "adapter": models.is_adapter,
        "teacher_model": public_name(record["teacher"]["name"]) if record["teacher"] else None,
        "warning": WARNING,
        "ran": {**where_it_ran(), "dtype": str(models.dtype).removeprefix("torch.")},
        "measured_with": {
            "held_out_prompts": len(held_out.rows), "of": many, "samples_per_prompt": options.samples,
            "seed": options.seed, **sampling,
        },
        "kl": {"own": gap(*own), "fixed": gap(*fixed)},
        "agreement": {
            "top1": {
                name: {"before": agreement(before), "after": agreement(after)}
                for name, (before, after) in (("own", own), ("fixed", fixed))
            },
            "greedy": greedy,
        },
        "arms": {arm: answers[arm].lengths() for arm in arms},
        "scores": scores,
        "forgetting": None if forgot is None else {**forgot, "left_out_as_trained_on": trained_on},
        **costs,
        "saved": time_saved,
        "side_by_side": _side_by_side(answers),
        "furthest": _furthest(answers, own[1]),
        "training": training,
        "settings": {name: value for name, value in settings.items() if name not in settings_with(belongs="machine")},
        "hashes": {
            **_hashes(record),
            "held_out_sha256": hash_of([row_of(prompt) for prompt in held_out.prompts]),
            "weights": weight_files(Place(run / "final"), FileHashes()),
        },
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip


Pair = tuple[list[Distance], list[Distance]]
SIDES = (BASE, SHOWN, STUDENT)


def _against_teacher(
    models: RunModels,
    held_out: HeldOut,
    answers: Mapping[str, Answers],
    sampling: Mapping[str, Any],
    told: Callable[[str], None],
) -> tuple[Pair, Pair, dict[str, Any]]:
    """Distances before and after training, on each model's own answers and on the teacher's; and greedy agreement."""
    n, temperature = held_out.samples, sampling["temperature"]
    groups = held_out.times([row.context_index for row in held_out.rows])
    teacher = models.teacher.reader(held_out.times(held_out.within), groups)
    base, student = (side.reader(held_out.times(held_out.without)) for side in (models.base, models.student))
    before, after = (
        distances(reader.read(answers[arm].ids), teacher.read(answers[arm].ids), temperature, n)
        for reader, arm in ((base, BASE), (student, STUDENT))
    )
    shown = answers[SHOWN].ids
    by_teacher = teacher.read(shown)
    fixed_before, fixed_after = (
        distances(reader.read(shown), by_teacher, temperature, n) for reader in (base, student)
    )
    told("greedy answers of the teacher")
    most = {"max_new_tokens": sampling["max_new_tokens"], "temperature": 0.0}
    wanted = [one.token_ids for one in models.teacher.answers(held_out.within, **most)]
    greedy = {
        when: identical_greedy(reader.read(held_out.times(wanted)).most_probable()[::n], wanted)
        for when, reader in (("before", base), ("after", student))
    }
    return (before, after), (fixed_before, fixed_after), greedy


def public_name(name: str | None) -> str | None:
    """A hub id as it is; of a folder its last part, as a card may be published."""
    if name is None or name == SMOLLM2 or not is_path(name):
        return name
    return Path(name).resolve().name


def _held_out(run: Path, options: ReportOptions) -> tuple[list[Prompt], int]:
    """The first prompts, and how many there are."""
    found = list(options.prompts or kept_held_out(run))
    if not found:
        raise InputError("the run has no held-out prompts (`opcd train --eval-prompts`); name a file with --prompts")
    fresh = _not_trained_on(run, found)
    if not fresh or (options.prompts and len(fresh) < len(found)):
        wrong = f"{len(found) - len(fresh)} of {len(found)} were trained on, and would not show what was learned"
        raise InputError(f"prompts: {wrong}; name a file with others by --prompts")
    return fresh[: options.max_prompts], len(fresh)


def _general(run: Path, options: ReportOptions) -> tuple[list[Prompt], int]:
    """Unrelated prompts that the run did not train on, and how many it did."""
    found = list(options.general) if options.general is not None else read_prompts(GENERAL, "general prompts")
    kept = _not_trained_on(run, found)
    if len(kept) < 2:
        if options.general is not None:
            raise InputError(f"general: {len(kept)} prompts that were not trained on; at least 2 are needed")
        kept = []
    return kept[: options.max_prompts], len(found) - len(kept)


def _not_trained_on(run: Path, prompts: Sequence[Prompt]) -> list[Prompt]:
    seen = {question_hash(prompt) for prompt in read_prompts(run / PROMPTS)}
    return [prompt for prompt in prompts if question_hash(prompt) not in seen]


def _rendered(
    models: RunModels, prompts: Sequence[Prompt], context: Context | None, variables: dict[str, Any], samples: int
) -> HeldOut:
    """The prompts that have a context."""
    prompts = adapt_to_tokenizer(models.tokenizer, prompts)
    (rendered,), prefixes = render(models.tokenizer, [prompts], context, variables)
    kept = [(prompt, row) for prompt, row in zip(prompts, rendered, strict=True) if row.has_context]
    if len(kept) < 2:
        raise InputError(f"{len(kept)} held-out prompts have a context; at least 2 are needed, see --prompts")
    return HeldOut([prompt for prompt, _ in kept], [row for _, row in kept], prefixes, samples)


def _hashes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the run's beginning."""
    names = ("context_sha256", "prompts_sha256", "base", "teacher", "tokenizer", "code", "started")
    found = {name: record[name] for name in names}
    for name in ("base", "teacher", "tokenizer"):
        if found[name] is not None:
            found[name] = {**found[name], "name": public_name(found[name]["name"])}
    return found


def _side_by_side(answers: Mapping[str, Answers], count: int = 5) -> list[dict[str, Any]]:
    """Prompts from all over the list, each with its first answers."""
    student = answers[STUDENT]
    firsts = range(0, len(student.texts), student.per_prompt)
    return [
        {"prompt": transcript(student.messages[index]), "answers": {arm: answers[arm].texts[index] for arm in SIDES}}
        for index in firsts[:: max(1, len(firsts) // count)][:count]
    ]


def _furthest(answers: Mapping[str, Answers], after: Sequence[Distance], count: int = 5) -> list[dict[str, Any]]:
    """The prompts on whose answers the student is furthest from the teacher, each once, with its first answers."""
    order = sorted(range(len(after)), key=lambda prompt: -after[prompt].kl)
    student = answers[STUDENT]
    found: dict[str, dict[str, Any]] = {}
    for prompt in order:
        index = prompt * student.per_prompt
        texts = {arm: answers[arm].texts[index] for arm in (SHOWN, STUDENT)}
        asked = transcript(student.messages[index])
        found.setdefault(asked, {"prompt": asked, "kl": after[prompt].kl, "answers": texts})
    return list(found.values())[:count]
