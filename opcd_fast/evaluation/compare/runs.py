"""The runs of a comparison, one folder each. What is finished is skipped, what was stopped goes on."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opcd_fast.data import Context, Sample, read_context
from opcd_fast.errors import InputError
from opcd_fast.evaluation.compare.costs import NOT_MEASURED, Told, Unrelated, context_arm, probes, student_arm
from opcd_fast.evaluation.compare.measurement import Yardstick, base_reader, fixed_answers, measure
from opcd_fast.evaluation.compare.systems import System
from opcd_fast.models import pick_device, pick_dtype
from opcd_fast.runtime import digest, write_text
from opcd_fast.training import OPCDTrainer
from opcd_fast.training.answers import KEPT_COUNTS, is_task
from opcd_fast.training.run import list_checkpoints
from opcd_fast.training.settings import OPCDConfig, known_settings, settings_with

MEASURED = "measured.json"


@dataclass(frozen=True)
class Comparison:
    """What is compared, on what.

    load: gives (model, teacher model or None), fresh ones at each call; trained in place. prompts and eval_prompts: as
    for OPCDTrainer. common: settings of all; its output_dir is the comparison's folder and its seed the first one.
    name: what the models are called, so that results of other models are not mixed in.
    """

    load: Callable[[], tuple[Any, Any]]
    name: str
    tokenizer: Any
    teacher_tokenizer: Any
    context: Context
    prompts: Any
    eval_prompts: Any
    common: OPCDConfig
    systems: Sequence[System]
    seeds: int
    yardstick: Yardstick

    @property
    def folder(self) -> Path:
        return Path(self.common.output_dir)


def run_all(comparison: Comparison, told: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and measure what is missing. Returns {"baselines": by context, "runs": by label, one per seed}.

    Raises InputError: results in the folder that come from other settings.
    """
    contexts = {
        s.label: comparison.context if s.context is None else read_context(Path(s.context)) for s in comparison.systems
    }
    baselines, runs = {}, {}
    for context in contexts.values():
        key = digest(context)[:12]
        if key not in baselines:
            baselines[key] = _baseline(comparison, context, key, told)
    for system in comparison.systems:
        runs[system.label] = [
            _run(comparison, system, contexts[system.label], comparison.common.seed + k, told)
            for k in range(comparison.seeds)
        ]
    return {"baselines": baselines, "runs": runs}


def _baseline(comparison: Comparison, context: Context, key: str, told: Callable[[str], None]) -> dict[str, Any]:
    """The model before training, without the context (as every run measures) and with it."""
    folder = comparison.folder / "baseline" / key
    wanted = _identity(comparison, context, comparison.common)
    wanted["settings"] = {"max_new_tokens": comparison.common.max_new_tokens}
    found = _kept(folder, wanted)
    if found is None:
        told(f"base model, with and without the context: {folder}")
        (folder / "fixed.json").unlink(missing_ok=True)  # of a comparison that was stopped, perhaps another one
        trainer, again = _trainer(comparison, context, dataclasses.replace(comparison.common, output_dir=str(folder)))
        fixed, shown = fixed_answers(trainer, comparison.yardstick, folder)
        unrelated = _unrelated(comparison, trainer, again)
        shown |= unrelated.of_context() if unrelated else {"general_kl": None, "general_kls": []}
        shown |= probes(context_arm(trainer), comparison.yardstick, [one.response for one in fixed], 0, told)
        found = {"base": _measured(comparison, trainer, unrelated, fixed, 0, told), "base + context": shown}
        _keep(folder, wanted, found)
    return found


def _run(
    comparison: Comparison, system: System, context: Context, seed: int, told: Callable[[str], None]
) -> dict[str, Any]:
    folder = comparison.folder / system.label / f"seed-{seed}"
    resume = bool(list_checkpoints(folder / "checkpoints"))
    config = system.config(comparison.common, seed, str(folder), resume)
    wanted = _identity(comparison, context, config)
    found = _kept(folder, wanted)
    if found is not None:
        told(f"{system.label}, seed {seed}: measured already")
        return found
    told(f"{system.label}, seed {seed}: {'goes on' if resume else 'training'} in {folder}")
    trainer, again = _trainer(comparison, context, config)
    result = trainer.train()
    key = digest(context)[:12]
    fixed, _ = fixed_answers(trainer, comparison.yardstick, comparison.folder / "baseline" / key)
    found = {"seed": seed, "context": key, **_budget(folder, result.history)}
    found |= _measured(comparison, trainer, _unrelated(comparison, trainer, again), fixed, seed, told)
    _keep(folder, wanted, found)
    del trainer
    gc.collect()
    return found


def _measured(
    comparison: Comparison, trainer: OPCDTrainer, unrelated: Unrelated | None, fixed: Sequence[Sample], seed: int,
    told: Told,
) -> dict[str, Any]:  # fmt: skip
    """All numbers of the student as it is now."""
    found, answers = measure(trainer, comparison.yardstick, fixed, seed)
    found |= unrelated.of_student(seed) if unrelated else NOT_MEASURED
    firsts = [one.token_ids for one in answers]
    return found | probes(student_arm(trainer), comparison.yardstick, firsts, seed, told)


def _unrelated(comparison: Comparison, trainer: OPCDTrainer, again: Callable[[], Any] | None) -> Unrelated | None:
    yardstick = comparison.yardstick
    return Unrelated(trainer, yardstick, base_reader(trainer, again)) if yardstick.general else None


def _trainer(
    comparison: Comparison, context: Context, config: OPCDConfig
) -> tuple[OPCDTrainer, Callable[[], Any] | None]:
    """A run's trainer, and what loads the student's first weights again where the run would not keep them, or not where
    and as the student's are."""
    model, teacher = comparison.load()
    trainer = OPCDTrainer(
        model, comparison.tokenizer, context, comparison.prompts, dataclasses.replace(config, preview=0),
        teacher_model=teacher,
        eval_prompts=comparison.eval_prompts, teacher_tokenizer=comparison.teacher_tokenizer,
    )  # fmt: skip
    changed = config.teacher_offload or config.teacher_device != "auto" or config.teacher_quantization != "none"
    return trainer, (lambda: comparison.load()[0]) if teacher is not None or changed else None


def _budget(folder: Path, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the run took: answers and tokens that were drawn, tokens trained on, seconds without evaluations."""
    tokens = sum(record["response_tokens"] for record in history)
    found = {
        "answers": sum(record["answers"] for record in history), "trained_tokens": tokens,
        "seconds": round(sum(sum(record["seconds"].values()) for record in history), 2),
    }  # fmt: skip
    drawn = {"drawn_answers": found["answers"], "drawn_tokens": tokens}
    kept = folder / KEPT_COUNTS
    if kept.is_file():
        once = json.loads(kept.read_text(encoding="utf-8"))
        drawn = {"drawn_answers": once["answers"], "drawn_tokens": once["response_tokens"]}
        found["seconds"] = round(found["seconds"] + once["seconds"], 2)
    return {**found, **drawn}


def _identity(comparison: Comparison, context: Context, config: OPCDConfig) -> dict[str, Any]:
    """What decides a run's numbers, as JSON values."""
    free = {*settings_with(belongs="resume")} - {"steps", "dtype"}
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    prompts: Any
    if is_task(comparison.prompts):
        prompts = [comparison.prompts.name, *(episode.id for episode in comparison.prompts.episodes("train", 8))]
    else:
        prompts = digest([repr(prompt) for prompt in comparison.prompts])
    found = {
        "models": comparison.name, "compute type": str(pick_dtype(config.dtype, pick_device(config.device))),
        "context": digest(context), "prompts": prompts, "settings": settings,
        **comparison.yardstick.identity(),
    }  # fmt: skip
    return json.loads(json.dumps(found))


def _kept(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    path = folder / MEASURED
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    before = kept["of"]
    before["settings"] = known_settings(before["settings"], f"output_dir: {str(path)!r}", "use another one")
    plain = json.loads(json.dumps(asdict(OPCDConfig())))  # a setting that came later had its default
    pairs = [(name, before.get(name), wanted[name]) for name in wanted if name != "settings"]
    for name in wanted["settings"].keys() | before["settings"].keys():
        pairs.append((name, *(of["settings"].get(name, plain.get(name)) for of in (before, wanted))))
    for name, old, new in pairs:
        if old != new:
            raise InputError(
                f"output_dir: {str(folder)!r} holds results with {name} = {old!r:.80}, now it is {new!r:.80}; use the "
                "same, or another output_dir"
            )
    return kept["found"]


def _keep(folder: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    write_text(folder / MEASURED, json.dumps({"of": wanted, "found": found}, indent=1) + "\n")
