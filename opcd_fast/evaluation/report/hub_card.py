"""The model card: README.md with the front matter that the Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from opcd_fast.evaluation.report.words import (
    hashes,
    mean,
    missing_arms,
    nats,
    percent,
    rate,
    rounding,
    seconds,
    tokens,
    uncounted,
)
from opcd_fast.models import SMOLLM2, SMOLLM2_ON_THE_HUB


def readme(card: Mapping[str, Any]) -> str:
    """Markdown. Holds numbers and hashes, no context and no answers: it may be published with the weights."""
    lines = [*_front_matter(card), f"# {_plain(card['run'])}", ""]
    base = card["base_model"]
    lines += [
        f"`{_plain(base)}` with a context moved into its weights by on-policy context distillation "
        "([arXiv 2602.12275](https://arxiv.org/abs/2602.12275)), with opcd-fast. It answers as the base does with the "
        "context in front, and needs no context.",
        "",
        f"> **Warning.** {card['warning']}",
        "",
        "## Did it move in?",
        "",
    ]
    with_ = card["measured_with"]
    lines += [
        f"Measured on {with_['held_out_prompts']} held-out prompts, {with_['samples_per_prompt']} sampled answer(s) "
        f"each of at most {with_['max_new_tokens']} tokens, temperature {with_['temperature']}. In brackets: 95% "
        f"intervals. {rounding(card['ran'])}".strip(),
        "",
        "| KL to base + context, nats per token | before | after | gap closed |",
        "|---|---|---|---|",
    ]
    for key, name in (("own", "on the student's own answers"), ("fixed", "on answers of base + context")):
        kl = card["kl"][key]
        lines.append(f"| {name} | {mean(kl['before'])} | {mean(kl['after'])} | {rate(kl['gap_closed'])} |")
    greedy = card["agreement"]["greedy"]
    lines += [
        "",
        f"Greedy answers identical to those of base + context: {rate(greedy['before']['identical'])} before, "
        f"{rate(greedy['after']['identical'])} after.",
        "",
        "| | " + " | ".join(card["arms"]) + " |",
        "|---|" + "---|" * len(card["arms"]),
    ]
    arms = card["arms"].values()
    for score in card["scores"]:
        cells = " | ".join(rate(score["arms"][arm]) for arm in card["arms"])
        lines.append(f"| {_plain(score['name'])} | {cells} |")
    lines.append("| tokens per answer | " + " | ".join(tokens(found["length"]) for found in arms) + " |")
    lines.append("| cut at the limit | " + " | ".join(rate(found["truncated"]) for found in arms) + " |")
    left_out = missing_arms(card)
    lines += ["", left_out] if left_out else []
    worse = sum(score["regressions"]["count"] for score in card["scores"])
    if card["scores"]:
        of = sum(score["regressions"]["of"] for score in card["scores"])
        lines += ["", f"In {worse} of {of} cases the student scored lower than base + context."]
    lines += ["", "## What it cost", ""]
    forgot = card["forgetting"]
    if forgot is None:
        lines.append("KL to the base on unrelated prompts: not measured.")
    else:
        lines.append(
            f"KL to the base on {forgot['prompts']} unrelated prompts: {mean(forgot['kl'])} nats per token, "
            f"p99 {nats(forgot['kl']['p99'])}; the most probable token is the base's in "
            f"{percent(forgot['top1_agreement']['value'])}."
        )
    saved = card["saved"]
    lines += [
        "",
        "## What it saves",
        "",
        f"{saved['tokens']:.0f} of {saved['tokens_with_context']:.0f} prompt tokens per call, and "
        f"{seconds(saved['prefill_seconds'])} of {seconds(saved['prefill_seconds_with_context'])} until the first "
        f"token ({_plain(card['ran']['device'])}, {card['ran']['dtype']}, one prompt at a time, no cache of the "
        f"context).{uncounted(saved)}",
        "",
        "## What it was made of",
        "",
        "| part | SHA-256 (first 16 digits) or version |",
        "|---|---|",
    ]
    lines += [f"| {_plain(name)} | `{value}` |" for name, value in hashes(card)]
    lines += ["", "`opcd check` compares them with what there is now. All numbers: `opcd_card.json`.", ""]
    return "\n".join(lines)


def _front_matter(card: Mapping[str, Any]) -> list[str]:
    """https://huggingface.co/docs/hub/model-cards. JSON texts are YAML texts, whatever they hold."""
    base = SMOLLM2_ON_THE_HUB if card["base_model"] == SMOLLM2 else card["base_model"]
    lines = ["---"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):  # the Hub takes no folders
        lines.append(f"base_model: {json.dumps(base)}")
        lines.append(f"base_model_relation: {'adapter' if card['adapter'] else 'finetune'}")
    lines.append(f"library_name: {'peft' if card['adapter'] else 'transformers'}")
    lines.append("pipeline_tag: text-generation")
    lines.append("tags:")
    lines += [f"- {tag}" for tag in ("opcd", "context-distillation", "on-policy-distillation")]
    if card["adapter"]:
        lines.append("- lora")
    return [*lines, "---", ""]


def _plain(text: str) -> str:
    """Text that neither ends a table's cell nor becomes markup."""
    return re.sub(r"([\\|`*_<>\[\]#])", r"\\\1", " ".join(str(text).split())).replace("\\_", "_")
