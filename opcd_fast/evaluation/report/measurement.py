"""Every number of a run's card, measured on held-out prompts; models are loaded and the context is read once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from opcd_fast.data import GENERAL, Context, Prompt, adapt_to_tokenizer, read_prompts, render, whole_prompt
from opcd_fast.errors import InputError
from opcd_fast.evaluation import where_it_ran
from opcd_fast.evaluation.report.arms import (
    BASE,
    SHOWN,
    STUDENT,
    Answers,
    arms_that_fit,
    draw_arms,
    greedy_answers,
    identical_greedy,
    lengths,
)
from opcd_fast.evaluation.report.distances import Reader, agreement, compared, distances, forgetting, gap
from opcd_fast.evaluation.report.models import RunModels, final_files, load_run
from opcd_fast.evaluation.report.scorers import Scorer
from opcd_fast.evaluation.report.scores import behaviour, task_scores
from opcd_fast.evaluation.report.speed import saved
from opcd_fast.models import SMOLLM2, is_path, virtual_tokens
from opcd_fast.training.run import (
    PROMPTS,
    FileHashes,
    curve,
    hash_of,
    kept_held_out,
    of_code,
    of_model,
    of_tokenizer,
    read_record,
    row_of,
    run_settings,
)
from opcd_fast.training.settings import settings_with
from opcd_fast.training.step import Windows, check_lengths

SCHEMA = 1
WARNING = (
    "A context that was moved into weights can be drawn out of them again, by anybody who can use or read the weights. "
    "Do not move secrets in, and do not publish weights whose context is not public."
)


@dataclass(frozen=True)
class ReportOptions:
    """How a run is measured. None stands for the run's own setting."""

    context: Context | None = None
    prompts: Sequence[Prompt] | None = None
    general: Sequence[Prompt] | None = None
    scorers: Sequence[Scorer] = ()
    tasks: Sequence[str] = ()
    model: str | None = None
    max_prompts: int = 32
    samples: int = 1
    max_new_tokens: int | None = None
    temperature: float | None = None
    examples: int = 20
    seed: int = 0


def measure(run: Path, options: ReportOptions, told: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The card of a run, as JSON values (keys: docs/report.md). told: gets a line for each part as it begins.

    Raises InputError: no finished run, missing context or held-out prompts, another base than the run's.
    """
    started = time.perf_counter()
    record, settings = read_record(run), run_settings(run)
    context = _context(record, options.context)
    prompts, many = _held_out(run, record, options)
    general, trained_on = _general(run, options)
    told("loading the models")
    models = load_run(run, record, settings, options.model)
    variables = run_variables(settings)
    prompts = adapt_to_tokenizer(models.tokenizer, prompts)
    (rendered,), prefixes = render(models.tokenizer, [prompts], context, variables)
    kept = [index for index, row in enumerate(rendered.rows) if row.has_context]
    prompts, rows = [prompts[i] for i in kept], [rendered.rows[i] for i in kept]
    if len(rows) < 2:
        raise InputError(f"{len(rows)} held-out prompts have a context; at least 2 are needed, see --prompts")
    new_tokens = options.max_new_tokens or settings.get("max_new_tokens", 512)
    limits = windows(models)
    check_lengths(rows, prefixes, new_tokens, limits)
    arms = arms_that_fit(rows, prefixes, new_tokens, limits)
    sampling = {
        "max_new_tokens": new_tokens,
        "temperature": settings.get("temperature", 1.0) if options.temperature is None else options.temperature,
        "top_p": settings.get("top_p", 1.0),
    }
    if sampling["temperature"] <= 0:
        raise InputError("temperature must be above 0: it divides the logits that are compared")

    told(f"answers of {len(arms)} arms to {len(rows)} held-out prompts")
    answers = draw_arms(models, prompts, rows, prefixes, options.samples, options.seed, sampling, arms)
    told("KL to the teacher")
    n, temperature = options.samples, sampling["temperature"]
    many_rows = [row for row in rows for _ in range(n)]
    without, within = [row.student_ids for row in many_rows], [whole_prompt(row, prefixes) for row in many_rows]
    teacher = Reader(models.teacher, within, settings, [row.context_index for row in many_rows])
    base, student = Reader(models.base, without, settings), Reader(models.student, without, settings)
    own_before = distances(base, teacher, answers[BASE].responses, temperature, n)
    own_after = distances(student, teacher, answers[STUDENT].responses, temperature, n)
    fixed = answers[SHOWN].responses
    h_t = teacher.hidden(fixed)
    fixed_before, fixed_after = (
        compared(reader.hidden(fixed), reader, h_t, teacher, fixed, temperature, n) for reader in (base, student)
    )
    told("greedy answers of the teacher")
    wanted = greedy_answers(models, rows, prefixes, new_tokens)
    places = [wanted[index // n] for index in range(len(many_rows))]
    greedy = {
        when: identical_greedy(reader.most_probable(places)[::n], wanted)
        for when, reader in (("before", base), ("after", student))
    }
    told("distance to the base on unrelated prompts")
    forgot = forgetting(models, general, variables, sampling, options.seed, settings) if general else None
    told("scores")
    scores = [behaviour(scorer, answers, options.examples) for scorer in options.scorers]
    scores += [task_scores(name, models, context, options, sampling, arms) for name in options.tasks]
    told("prefill time")
    first = rows[0]
    time_saved = saved(models, rows, prefixes, first)

    hashes = {
        **_hashes(record, context, models, options),
        "held_out_sha256": hash_of([row_of(prompt) for prompt in prompts]),
        "weights": final_files(run),
    }
    return {
        "schema": SCHEMA,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": run.resolve().name,
        "base_model": public_name(models.base_name),
        "adapter": models.is_adapter,
        "teacher_model": public_name(record["teacher"]["name"]) if record and record.get("teacher") else None,
        "warning": WARNING,
        "ran": {**where_it_ran(), "dtype": str(models.dtype).removeprefix("torch.")},
        "measured_with": {
            "held_out_prompts": len(rows), "of": many, "samples_per_prompt": options.samples, "seed": options.seed,
            **sampling,
        },
        "kl": {"own": gap(own_before, own_after), "fixed": gap(fixed_before, fixed_after)},
        "agreement": {
            "top1": {
                "own": {"before": agreement(own_before), "after": agreement(own_after)},
                "fixed": {"before": agreement(fixed_before), "after": agreement(fixed_after)},
            },
            "greedy": greedy,
        },
        "arms": {arm: lengths(answers[arm]) for arm in arms},
        "scores": scores,
        "forgetting": None if forgot is None else {**forgot, "left_out_as_trained_on": trained_on},
        "saved": time_saved,
        "furthest": _furthest(answers, own_after),
        "training": curve(run),
        "settings": {name: value for name, value in settings.items() if name not in settings_with(belongs="machine")},
        "hashes": hashes,
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip


def run_variables(settings: dict[str, Any]) -> dict[str, Any]:
    """Variables of the chat template, as the run rendered its prompts."""
    from opcd_fast.training.settings import OPCDConfig

    return OPCDConfig(chat_template_kwargs=settings.get("chat_template_kwargs")).template_variables()


def windows(models: RunModels) -> Windows:
    return Windows.of(models.student.model, models.teacher.model, virtual_tokens(models.student.model))


def public_name(name: str | None) -> str | None:
    """A hub id as it is; of a folder its last part, as a card may be published."""
    if name is None or name == SMOLLM2 or not is_path(name):
        return name
    return Path(name).resolve().name


def _context(record: dict[str, Any] | None, given: Context | None) -> Context | None:
    kept = record["context"] if record else None
    if kept is not None and given is not None and hash_of(given) != record["context_sha256"]:  # type: ignore[index]
        raise InputError("--context is another text than the one in the run; leave it out, or see `opcd check`")
    if kept is None and given is None and record is None:
        raise InputError("the run kept no context (it is from an older version); name its file with --context")
    return kept if kept is not None else given


def _held_out(run: Path, record: dict[str, Any] | None, options: ReportOptions) -> tuple[list[Prompt], int]:
    """The first prompts, and how many there are."""
    found = list(options.prompts or ())
    if not found and record is not None:
        found = kept_held_out(run)
    if not found:
        raise InputError("the run has no held-out prompts (`opcd train --eval-prompts`); name a file with --prompts")
    if record is not None and options.prompts is not None:
        seen = {_content(prompt) for prompt in read_prompts(run / PROMPTS)}
        trained_on = sum(_content(prompt) in seen for prompt in found)
        if trained_on:
            raise InputError(
                f"prompts: {trained_on} of {len(found)} were trained on, and would not show what was learned"
            )
    return found[: options.max_prompts], len(found)


def _general(run: Path, options: ReportOptions) -> tuple[list[Prompt], int]:
    """Unrelated prompts that the run did not train on, and how many it did."""
    found = list(options.general) if options.general is not None else read_prompts(GENERAL, "general prompts")
    seen = {_content(p) for p in read_prompts(run / PROMPTS)} if (run / PROMPTS).is_file() else set()
    kept = [prompt for prompt in found if _content(prompt) not in seen]
    if len(kept) < 2:
        if options.general is not None:
            raise InputError(f"general: {len(kept)} prompts that were not trained on; at least 2 are needed")
        kept = []
    return kept[: options.max_prompts], len(found) - len(kept)


def _content(prompt: Prompt) -> str:
    return hash_of(row_of(prompt).get("messages") or prompt.text)


def _hashes(
    record: dict[str, Any] | None, context: Context | None, models: RunModels, options: ReportOptions
) -> dict[str, Any]:
    """Those of the run's beginning; for a run that kept none, those of now."""
    names = ("context_sha256", "prompts_sha256", "base", "teacher", "tokenizer", "code", "started")
    if record is not None:
        found = {name: record[name] for name in names}
    else:
        now, tokenizer = FileHashes(), models.tokenizer
        found = {
            "context_sha256": None if context is None else hash_of(context), "prompts_sha256": None,
            "base": {**of_model(models.base_name, now), "fingerprint": None}, "teacher": None,
            "tokenizer": of_tokenizer(models.base_name, getattr(tokenizer, "chat_template", None), now),
            "code": of_code(), "started": None,
        }  # fmt: skip
    for name in ("base", "teacher", "tokenizer"):
        if found[name] is not None:
            found[name] = {**found[name], "name": public_name(found[name]["name"])}
    return {**found, "recorded": "at the start of the run" if record is not None else "when the card was written"}


def _furthest(answers: dict[str, Answers], after: list[Any], count: int = 5) -> list[dict[str, Any]]:
    """The prompts on whose answers the student is furthest from the teacher."""
    order = sorted(range(len(after)), key=lambda index: -after[index].kl)[:count]
    return [
        {
            "prompt": answers[STUDENT].transcripts[index],
            "kl": after[index].kl,
            "answers": {arm: answers[arm].texts[index] for arm in (SHOWN, STUDENT)},
        }
        for index in order
    ]
