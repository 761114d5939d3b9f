"""(f) A real policy: four pages of the Social Security Administration, with what users asked about them (doc2dial).

The pages are those that most of the conversations are about, up to 1,300 words. A prompt is a conversation up to
a turn of the user. Conversations that begin alike are either trained on or held out.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from experiments.experiment import Experiment, run
from experiments.installed import PREPARED, data_file, write_rows
from opcd_fast.runtime import write_text

PACKAGE = ("nvidia-lm-eval", "26.3", "lm_eval")
FOLDER = "tasks/chatrag_bench/dataset"
AGENCY, MOST_WORDS, MOST_MESSAGES = "ssa", 1300, 7
DATA = PREPARED / "policy"


def prepare() -> None:
    pages = json.loads(data_file(*PACKAGE, f"{FOLDER}/documents.json").read_text(encoding="utf-8"))[AGENCY]
    file = data_file(*PACKAGE, f"{FOLDER}/nvidia_dragon_multiturn_retrieved.jsonl")
    rows = [row for row in json.loads(file.read_text(encoding="utf-8")) if row["document"] == AGENCY]
    context, train, held_out = split(pages, rows)
    write_text(DATA / "context.txt", context)
    write_rows(DATA / "train_prompts.jsonl", train)
    write_rows(DATA / "eval_prompts.jsonl", held_out)


def split(pages: list[str], rows: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """The context, prompts to train on, and held-out ones: of every third conversation."""
    chosen: list[int] = []
    for page, _ in Counter(row["ground_truth_ctx"] for row in rows).most_common():
        if sum(len(pages[one].split()) for one in [*chosen, page]) > MOST_WORDS:
            break
        chosen.append(page)
    asked: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        messages = in_turns(row["messages"])
        if row["ground_truth_ctx"] in chosen and len(messages) <= MOST_MESSAGES and messages[-1]["role"] == "user":
            conversation = asked.setdefault(messages[0]["content"], [])
            if {"messages": messages} not in conversation:
                conversation.append({"messages": messages})
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for number, conversation in enumerate(asked.values()):
        parts[number % 3 == 2].extend(conversation)
    head = "You answer questions for the Social Security Administration. Its pages say:"
    return "\n\n".join([head, *(pages[page].strip() for page in sorted(chosen))]) + "\n", *parts


def in_turns(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Two messages of the same side in a row as one."""
    found: list[dict[str, str]] = []
    for message in messages:
        if found and found[-1]["role"] == message["role"]:
            found[-1] = {"role": message["role"], "content": f"{found[-1]['content']} {message['content']}"}
        else:
            found.append({"role": message["role"], "content": message["content"]})
    return found


EXPERIMENT = Experiment(
    "policy",
    DATA / "context.txt",
    DATA / "train_prompts.jsonl",
    DATA / "eval_prompts.jsonl",
    max_new_tokens=32,
    temperature=0.7,
    prepare=prepare,
)

if __name__ == "__main__":
    run(EXPERIMENT)
