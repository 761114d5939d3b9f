"""The main job on a real model: six few-shot turns move into the weights of SmolLM2-135M-Instruct.

The turns show a form ("The answer is <answer>, my friend!"). Before training the model answers in it with the turns
in front and not without them; after training it does without. Questions for training and for the rates are different
ones, and every rate comes from sampled answers.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opcd_fast.data import default_system_tokens, whole_prompt
from opcd_fast.errors import InputError
from opcd_fast.evaluation.info import where_it_ran
from opcd_fast.rollout import Rollout
from opcd_fast.runtime import check_replaceable, wilson, write_text
from opcd_fast.training.monitoring import plot_kl
from opcd_fast.training.settings import OPCDConfig

DATA = Path(__file__).parents[1] / "demo_data"
FORM = re.compile(r"The answer is (?:(?!my friend)[^\n])+, my friend!")
STEPS = 22
BATCH = 8
MAX_NEW_TOKENS = 16
TEMPERATURE = 0.7
MARKER = "opcd-demo"  # a folder with this file is a demo's own and may be replaced


def run_demo(output_dir: str = "runs/demo", steps: int | None = None, samples: int = 128, seed: int = 0) -> bool:
    """Train, measure, print and save; True when the form moved in.

    That is: at least 90 % of the sampled answers have it for base + context and for the student alone, and at most
    10 % for the base alone.

    Writes report.json, kl.png, and the run itself (adapter in run/final) under `output_dir`.
    Raises InputError: the packaged model is missing, or the folder is not a demo's.
    """
    from opcd_fast.models import load_model, load_tokenizer
    from opcd_fast.training import OPCDTrainer

    started = time.perf_counter()
    root = Path(output_dir)
    config = OPCDConfig(
        output_dir=str(root / "run"),
        steps=steps or STEPS,
        batch_size=BATCH,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        lora_rank=16,
        eval_every=steps or STEPS,
        save_every=0,
        preview=0,
        seed=seed,
    )
    check_replaceable(root, "output_dir=")
    if root.exists() and any(root.iterdir()) and not (root / MARKER).is_file():
        raise InputError(f"output_dir={str(root)!r} holds files that are not a demo's; choose another folder")
    print("Loading SmolLM2-135M-Instruct (converted once, some 20 s the first time) ...", flush=True)
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    if root.exists():
        shutil.rmtree(root)  # an earlier demo, kept until everything needed for a new one is there
    trainer = OPCDTrainer(
        model, tokenizer, DATA / "turns.json", DATA / "train_prompts.jsonl", config,
        eval_prompts=DATA / "eval_prompts.jsonl",
    )  # fmt: skip
    write_text(root / MARKER, "Written by `opcd demo`, which replaces this folder.\n")
    rows = trainer.held_out_rows
    questions = [json.loads(line)["prompt"] for line in (DATA / "eval_prompts.jsonl").read_text().splitlines()]
    per_question = -(-samples // len(rows))
    without = ([row.student_ids for row in rows] * per_question)[:samples]
    within = ([whole_prompt(row, trainer.prefixes) for row in rows] * per_question)[:samples]

    print(f"Base model: {len(without)} held-out answers with the six turns in front, and without ...", flush=True)
    with trainer.base_weights():
        answers = {
            "base + context": sampled_answers(trainer.teacher_rollout, tokenizer, within, seed + 1),
            "base alone": sampled_answers(trainer.teacher_rollout, tokenizer, without, seed + 2),
        }
    print(f"Training: {config.steps} steps, {BATCH} questions each, LoRA rank {config.lora_rank} ...", flush=True)
    result = trainer.train()
    answers["student alone"] = sampled_answers(trainer.rollout, tokenizer, without, seed + 3)

    report = _report(answers, result, rows, within, without, time.perf_counter() - started)
    report["prompt_tokens"]["the template's own system prompt"] = default_system_tokens(tokenizer)
    write_text(root / "report.json", json.dumps(report, indent=1))
    plot_kl(root / "kl.png", result.history, result.evaluations)
    _show(report, questions, answers, root)
    return report["moved_in"]


def sampled_answers(rollout: Rollout, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int) -> list[str]:
    drawn = rollout.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, seed=seed)
    return [tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip() for answer in drawn]


def has_form(answer: str) -> bool:
    """True when the whole answer is in the form that the turns show."""
    return FORM.fullmatch(answer) is not None


def _report(
    answers: dict[str, list[str]],
    result: Any,
    rows: Sequence[Any],
    within: Sequence[Sequence[int]],
    without: Sequence[Sequence[int]],
    seconds: float,
) -> dict[str, Any]:
    rates = {}
    for arm, texts in answers.items():
        hits = sum(map(has_form, texts))
        low, high = wilson(hits, len(texts))
        rates[arm] = {"rate": hits / len(texts), "low": low, "high": high, "answers": len(texts)}
    before, after = result.evaluations[0], result.evaluations[-1]
    return {
        "ran": {"command": "opcd demo", **where_it_ran()},
        "rates": rates,
        "held_out_kl": {
            "own answers": {"before": before["own_kl"], "after": after["own_kl"]},
            "teacher's answers": {"before": before["fixed_kl"], "after": after["fixed_kl"]},
        },
        "top1_agreement": {"before": before["own_top1_agreement"], "after": after["own_top1_agreement"]},
        "prompt_tokens": {
            "with context": statistics.mean(map(len, within)),
            "without": statistics.mean(map(len, without)),
        },
        "held_out_questions": min(len(rows), len(without)),
        "temperature": TEMPERATURE,
        "steps": result.steps,
        "seconds": {"training": result.seconds, "in all": seconds},
        "moved_in": min(rates["student alone"]["rate"], rates["base + context"]["rate"]) >= 0.9
        and rates["base alone"]["rate"] <= 0.1,
    }


def _show(report: dict[str, Any], questions: list[str], answers: dict[str, list[str]], root: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    count = report["rates"]["student alone"]["answers"]
    table = Table(title=f"answers in the form “The answer is …, my friend!” ({count} sampled, held-out questions)")
    for column in ("", "rate", "95 % interval"):
        table.add_column(column)
    for arm, rate in report["rates"].items():
        table.add_row(arm, f"{rate['rate']:.0%}", f"{rate['low']:.0%} to {rate['high']:.0%}")
    console.print(table)

    table = Table(title="five answers side by side", show_lines=True)
    for column in ("question", *answers):
        table.add_column(column, overflow="fold")
    picks = range(0, report["held_out_questions"], max(1, report["held_out_questions"] // 5))
    for index in list(picks)[:5]:
        table.add_row(questions[index], *(texts[index].replace("[", "\\[") for texts in answers.values()))
    console.print(table)

    for name, kl in report["held_out_kl"].items():
        console.print(f"held-out KL on the {name}: {kl['before']:.3f} before, {kl['after']:.3f} after")
    tokens = report["prompt_tokens"]
    saved = tokens["with context"] - tokens["without"]
    own = tokens["the template's own system prompt"]
    stays = f" ({own} of the others are a system prompt that the chat template puts in by itself)" if own else ""
    console.print(f"prompt tokens saved per call: {saved:.0f} of {tokens['with context']:.0f}{stays}")
    seconds = report["seconds"]
    console.print(f"{seconds['in all']:.0f} s in all, {seconds['training']:.0f} s of it training")
    console.print(f"saved: {root / 'report.json'}, {root / 'kl.png'}, the adapter in {root / 'run' / 'final'}")
    if report["moved_in"]:
        console.print("The context is in the weights: the student answers in the form without being shown it.")
    else:
        console.print("The form did NOT move in as it should (base + context and student >= 90 %, base <= 10 %).")
