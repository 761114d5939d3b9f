"""`opcd compare`: systems trained with the same budget, measured in the same way."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from opcd_fast.commands.arguments import check_at_least, context_in, parse, quiet_libraries
from opcd_fast.commands.train import TrainOptions, load_teacher, loading, prompts_or_task
from opcd_fast.errors import InputError
from opcd_fast.runtime import launched
from opcd_fast.training.settings import OPCDConfig


@dataclass(frozen=True)
class CompareCommand:
    """Train several systems with several seeds and put their held-out numbers into one table.

    Writes compare.json, compare.md and compare.png into the output folder, and every run into a folder of its own
    there. The same command again goes on where it was stopped; finished runs are not made again.
    """

    model: str
    """Folder, hub id, or "smollm2" (the packaged SmolLM2-135M-Instruct)."""
    context: str
    """What the teacher sees: a text file, or chat turns as .json or .jsonl."""
    prompts: str | None = None
    """As for `opcd train`."""
    eval_prompts: str | None = None
    """Held-out prompts, on which everything is measured."""
    task: str | None = None
    """A task in place of prompts; the score is that of its split "test"."""
    task_options: str | None = None
    """Options of the task as JSON, such as {"size": 4}."""
    teacher_model: str | None = None
    """Another model as the teacher (same tokenizer)."""
    systems: tuple[str, ...] = ("opcd,off-policy,sft,live,ema",)
    """Names with commas between: opcd, off-policy, seq-kd, sft, live, ema, periodic. One with settings of its own is
    a word by itself: LABEL=NAME:setting=value,setting=value; context=FILE is a setting here."""
    seeds: int = 3
    """Runs of each system, with the seeds from --seed on."""
    regex: str | None = None
    """Pattern to be found in a good answer (Python's re.search; ^ and $ for the whole). In its place --scorer, a
    function that gives an answer 0 to 1."""
    answers_per_prompt: int = 1
    """Answers to each held-out prompt when measuring."""
    general: str = "builtin"
    """Unrelated prompts for the distance to the base: a file, "builtin" or "none"."""
    task_problems: int = 128
    """Episodes of the task's split "test" when measuring."""
    abilities: tuple[str, ...] = ()
    """Tasks of opcd, played greedily by each model on their test split: arithmetic (nothing to install), ifbench ..."""
    ability_problems: int = 64
    """Problems of each ability."""
    ability_tokens: int = 64
    """Longest answer to them, in tokens; ifbench needs 256 or so."""
    run: TrainOptions = dataclasses.field(default_factory=lambda: TrainOptions(output_dir="runs/compare"))


def run(arguments: list[str]) -> int:
    compare(parse(CompareCommand, "compare", arguments))
    return 0


def compare(command: CompareCommand) -> dict[str, Any]:
    """Run, print, save; returns what compare.json holds. Raises InputError before anything is written."""
    config = command.run.checked()
    if launched() > 1:
        raise InputError("compare: it runs in one process, and was started in several; start it without a launcher")
    counts = ("seeds", "answers_per_prompt", "task_problems", "ability_problems", "ability_tokens")
    check_at_least(1, command, *counts)
    from opcd_fast.evaluation import where_it_ran
    from opcd_fast.evaluation.compare import (
        Comparison,
        as_markdown,
        check_common,
        parse_systems,
        plot_comparison,
        run_all,
        summarize,
    )
    from opcd_fast.models import load_model, load_tokenizer, pick_device, pick_dtype
    from opcd_fast.runtime import write_text
    from opcd_fast.training.answers import check_goes_with_task

    quiet_libraries()
    check_common(config)
    systems = parse_systems(command.systems)
    context, prompts = context_in(command.context), prompts_or_task(command)
    for system in systems:
        own = system.config(config, config.seed, config.output_dir, resume=False)  # contradictions are errors now
        context_in(system.context)
        try:
            if command.task is not None:
                check_goes_with_task(own)
        except InputError as error:
            raise InputError(f"systems: {system.label!r} does not go with a task: {error}") from error
    tokenizer, trust = load_tokenizer(command.model, config.trust_remote_code), config.trust_remote_code
    held_out, yardstick = _yardstick(command, config, tokenizer)

    def load() -> tuple[Any, Any]:
        teacher = None if command.teacher_model is None else load_teacher(command.teacher_model, config)
        return load_model(command.model, **loading(config, config.quantization)), teacher

    comparison = Comparison(
        load, f"{command.model} {command.teacher_model or ''}".strip(), tokenizer,
        None if command.teacher_model is None else load_tokenizer(command.teacher_model, trust),
        context, prompts, held_out, config, systems, command.seeds, yardstick,
    )  # fmt: skip
    found = summarize(run_all(comparison, lambda text: print(text, flush=True)))
    options = {**dataclasses.asdict(command), "run": config.public()}
    dtype = str(pick_dtype(config.dtype, pick_device(config.device))).removeprefix("torch.")
    ran = {**where_it_ran(), "dtype": dtype}
    found = {"ran": ran, "command": options, "scorer": yardstick.identity()["scorer"], **found}
    page = as_markdown(found, f"{', '.join(found['systems'])}: {command.model}")
    write_text(comparison.folder / "compare.json", json.dumps(found, indent=1) + "\n")
    write_text(comparison.folder / "compare.md", page)
    plot_comparison(comparison.folder / "compare.png", found)
    print(page)
    print(f"saved: {', '.join(str(comparison.folder / f'compare.{kind}') for kind in ('json', 'md', 'png'))}")
    return found


def _yardstick(command: CompareCommand, config: OPCDConfig, tokenizer: Any) -> tuple[Any, Any]:
    """The held-out prompts (None for a task, which has its own) and what is measured on them."""
    from opcd_fast.data import GENERAL, read_prompts
    from opcd_fast.evaluation import Abilities
    from opcd_fast.evaluation.compare import Yardstick
    from opcd_fast.training import HeldOutScore, scorer

    if command.regex is not None and config.scorer is not None:
        raise InputError("regex and scorer both say what a good answer is; drop one of them")
    scores = command.regex is not None or config.scorer is not None
    if command.task is not None and (command.eval_prompts is not None or scores):
        raise InputError("task: it has held-out problems and a score of its own; drop eval_prompts, regex and scorer")
    if command.task is None and command.eval_prompts is None:
        raise InputError("eval_prompts is missing: held-out prompts are what everything is measured on")
    abilities = Abilities(command.abilities, command.ability_problems, command.ability_tokens)
    abilities.check()
    held_out = None
    if command.eval_prompts is not None:
        held_out = read_prompts(command.eval_prompts, "eval_prompts", **config.columns())
        if any(prompt.privileged_context is not None for prompt in held_out):
            raise InputError("eval_prompts: rows with a privileged_context are not compared; take the column out")
    general: Any = []
    if command.general == "builtin":
        general = read_prompts(GENERAL, "general")
    elif command.general != "none":
        general = read_prompts(command.general, "general", **config.columns())
    behaviour = HeldOutScore.make(None, config.scorer, tokenizer, held_out or ())
    if command.regex is not None:
        found = scorer.pattern_scorer(command.regex)
        behaviour = HeldOutScore(found, f"regex {command.regex}", tokenizer, held_out or ())
    return held_out, Yardstick(
        general, behaviour, held_out or (), command.answers_per_prompt,
        {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "top_p": config.top_p},
        config.micro_batch_tokens or 8192, command.task_problems if command.task is not None else 0, abilities,
    )  # fmt: skip
