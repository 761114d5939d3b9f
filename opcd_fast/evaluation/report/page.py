"""report.html: one file that needs nothing else, no network and no script. Text of models and users is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from opcd_fast.data import Context
from opcd_fast.evaluation.report import charts
from opcd_fast.evaluation.report.arms import SHOWN, STUDENT, transcript
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

# The policy lets nothing in and nothing run, should an escape ever be forgotten.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --panel: #fff; --text: #1d2327; --soft: #5d6870; --rule: #dfe3e6;
  --accent: #0f766e; --second: #c2570c; --muted: #98a2aa; --bad: #fdecea; --good: #e8f5f1; --warn: #fff6dd; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181b; --panel: #1c2226; --text: #e6eaed; --soft: #9aa6ae;
  --rule: #313a40; --accent: #3fbfae; --second: #f0945a; --muted: #75828b; --bad: #3a2422; --good: #1b322d;
  --warn: #37301a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 1.8rem; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 44px 0 8px; }
h3 { font-size: 1rem; margin: 24px 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0 12px; } .soft { color: var(--soft); font-size: .92rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin: 22px 0; }
.tile { background: var(--panel); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; } .tile span { color: var(--soft); font-size: .86rem; }
.warning { background: var(--warn); border-radius: 10px; padding: 12px 16px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; background: var(--panel);
  border: 1px solid var(--rule); font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { text-align: left; padding: 8px 12px; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.hash { font-family: ui-monospace, monospace; font-size: .84rem; }
figure { margin: 12px 0; background: var(--panel); border: 1px solid var(--rule); border-radius: 10px; padding: 16px; }
figcaption { color: var(--soft); font-size: .88rem; margin-bottom: 10px; } svg { display: block; width: 100%; }
svg text { fill: var(--text); font: 12.5px system-ui, sans-serif; } svg .tick { fill: var(--soft); }
svg .strong { font-weight: 600; } .grid { stroke: var(--rule); } .link { stroke: var(--muted); stroke-width: 2; }
.line { fill: none; stroke-width: 2; } .line.s1 { stroke: var(--muted); } .line.s2 { stroke: var(--accent); }
.line.s3 { stroke: var(--second); } .dot.s1, .muted { fill: var(--muted); } .s2 { fill: var(--accent); }
.dot.s3 { fill: var(--second); } .line.s2, .line.s3 { fill: none; } .track { fill: var(--rule); opacity: .5; }
.whisker { stroke: var(--text); stroke-width: 1.5; }
.pair { border: 1px solid var(--rule); border-radius: 10px; margin: 14px 0; overflow: hidden;
  background: var(--panel); }
.pair > .asked { padding: 10px 14px; border-bottom: 1px solid var(--rule); }
.sides { display: grid; grid-template-columns: 1fr 1fr; } .sides > div { padding: 10px 14px; min-width: 0; }
.sides > .worse { background: var(--bad); } .sides > .shown { background: var(--good); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0; } .who { color: var(--soft); font-size: .84rem; }
@media (max-width: 640px) { .sides { grid-template-columns: 1fr; } }
details { margin: 10px 0; } summary { cursor: pointer; }
"""


def page(card: Mapping[str, Any], context: Context | None) -> str:
    """The whole page. context: shown folded up; None: the prompts brought theirs."""
    parts = [
        _head(card), _tiles(card), f'<p class="warning"><b>Warning.</b> {escape(card["warning"])}</p>',
        _kl(card), _arms(card), _regressions(card), _furthest(card), _forgetting(card), _saved(card),
        _training(card), _context(context), _made_of(card),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(card['run'])}: context in the weights</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(card: Mapping[str, Any]) -> str:
    ran = card["ran"]
    kind = "adapter on" if card["adapter"] else "fine-tuned from"
    where = f"{card['written']} on {ran['device']}, {ran['dtype']}, in {card['seconds']:.0f} s"
    said = f"{kind} {card['base_model']}; measured {where}"
    return f'<h1>{escape(card["run"])}</h1><p class="soft">{escape(said)}</p>'


def _tiles(card: Mapping[str, Any]) -> str:
    tiles = [
        (percent(card["kl"]["own"]["gap_closed"]["value"]), "of the KL gap closed, on the student's own answers"),
        (percent(card["kl"]["fixed"]["gap_closed"]["value"]), "of the KL gap closed, on answers of base + context"),
    ]
    for score in card["scores"][:2]:
        student, shown = score["arms"][STUDENT]["value"], score["arms"][SHOWN]["value"]
        tiles.append((percent(student), f"{score['name'][:60]}: student; base + context {percent(shown)}"))
    if card["forgetting"]:
        tiles.append((nats(card["forgetting"]["kl"]["value"]), "nats per token from the base on unrelated prompts"))
    tiles.append((f"{card['saved']['tokens']:.0f}", "prompt tokens saved per call"))
    shown_tiles = (f'<div class="tile"><b>{value}</b><span>{escape(label)}</span></div>' for value, label in tiles)
    return f'<div class="tiles">{"".join(shown_tiles)}</div>'


def _kl(card: Mapping[str, Any]) -> str:
    with_ = card["measured_with"]
    rows = []
    for key, name in (("own", "the student's own answers"), ("fixed", "answers of base + context")):
        kl = card["kl"][key]
        for when in ("before", "after"):
            found = kl[when]
            top1 = card["agreement"]["top1"][key][when]
            rows.append([
                f"{name}, {when}", mean(found), nats(found["p50"]), nats(found["p90"]), nats(found["p99"]), rate(top1),
                rate(kl["gap_closed"]) if when == "after" else "",
            ])  # fmt: skip
    columns = ["on", "mean KL", "median", "p90", "p99", "same most probable token", "gap closed"]
    greedy = card["agreement"]["greedy"]
    said = []
    for when in ("before", "after"):
        median = greedy[when]["first_difference"]["median"]
        where = "" if median is None else f"; the others differ first at token {median + 1:.0f} (median)"
        said.append(f"{when} {rate(greedy[when]['identical'])}{where}")
    return (
        "<h2>How far is it from the teacher?</h2>"
        f'<p class="soft">KL(student || {_teacher(card)}) in nats per token, on {with_["held_out_prompts"]} of '
        f"{with_['of']} held-out prompts, {with_['samples_per_prompt']} answer(s) each of at most "
        f"{with_['max_new_tokens']} tokens, temperature {with_['temperature']:g}. In brackets: 95% intervals over "
        "prompts. Percentiles are over tokens.</p>"
        f"<figure><figcaption>Token KL before and after training, logarithmic</figcaption>"
        f"{charts.before_after(card['kl'])}</figure>{_table(columns, rows)}"
        f"<p>Greedy answers identical to those of base + context: {escape('. '.join(said))}.</p>"
    )


def _teacher(card: Mapping[str, Any]) -> str:
    return "base with the context" if not card["teacher_model"] else f"{escape(card['teacher_model'])} with the context"


def _arms(card: Mapping[str, Any]) -> str:
    arms = card["arms"]
    rows = [[score["name"], *(rate(score["arms"][arm]) for arm in arms)] for score in card["scores"]]
    rows.append(["tokens per answer", *(tokens(found["length"]) for found in arms.values())])
    rows.append(["cut at the limit", *(rate(found["truncated"]) for found in arms.values())])
    chart = charts.scores(card["scores"], list(arms))
    figure = f"<figure><figcaption>Scores with 95% intervals</figcaption>{chart}</figure>" if chart else ""
    left_out = missing_arms(card)
    missing = f'<p class="soft">{escape(left_out)}</p>' if left_out else ""
    hint = "" if chart else '<p class="soft">No behaviour was named; --regex, --scorer or --task measures one.</p>'
    return f"<h2>Does it behave?</h2>{hint}{figure}{_table(['', *arms], rows)}{missing}"


def _regressions(card: Mapping[str, Any]) -> str:
    if not card["scores"]:
        return ""
    parts = ["<h2>Where it does worse than base + context</h2>"]
    for score in card["scores"]:
        found = score["regressions"]
        shown = f", the worst {len(found['examples'])} of them below" if found["count"] > len(found["examples"]) else ""
        parts.append(f"<h3>{escape(score['name'])}</h3>")
        parts.append(
            f"<p>Lower in {found['count']} of {found['of']} cases{shown}, higher in {found['better']}. Answers are "
            "sampled, so that some differ by chance.</p>"
        )
        for example in found["examples"]:
            said = {arm: f"{arm}, score {example['scores'][arm]:g}" for arm in (SHOWN, STUDENT)}
            parts.append(_pair(example, said))
    return "".join(parts)


def _furthest(card: Mapping[str, Any]) -> str:
    parts = ["<h2>Where it is furthest from the teacher</h2>"]
    for example in card["furthest"]:
        said = {SHOWN: SHOWN, STUDENT: f"{STUDENT}, KL {nats(example['kl'])}"}
        parts.append(_pair(example, said, neutral=True))
    return "".join(parts)


def _pair(example: Mapping[str, Any], said: Mapping[str, str], neutral: bool = False) -> str:
    """A prompt, and below it two answers side by side."""
    sides = "".join(
        f'<div class="{"" if neutral else "shown" if arm == SHOWN else "worse"}"><div class="who">{escape(said[arm])}'
        f'</div><div class="text">{escape(example["answers"][arm]) or "(nothing)"}</div></div>'
        for arm in (SHOWN, STUDENT)
    )
    asked = f'<div class="asked"><div class="who">prompt</div><div class="text">{escape(example["prompt"])}</div></div>'
    return f'<div class="pair">{asked}<div class="sides">{sides}</div></div>'


def _forgetting(card: Mapping[str, Any]) -> str:
    forgot = card["forgetting"]
    if forgot is None:
        return "<h2>What did it forget?</h2><p>Not measured: too few unrelated prompts that were not trained on.</p>"
    kl, left_out = forgot["kl"], forgot["left_out_as_trained_on"]
    note = f" {left_out} others were trained on and are left out." if left_out else ""
    row = [mean(kl), nats(kl["p50"]), nats(kl["p90"]), nats(kl["p99"]), rate(forgot["top1_agreement"])]
    columns = ["mean KL(student || base)", "median", "p90", "p99", "same most probable token"]
    return (
        f'<h2>What did it forget?</h2><p class="soft">Distance to the base, without any context, on the student\'s '
        f"answers to {forgot['prompts']} unrelated prompts; 0 means unchanged.{note}</p>{_table(columns, [row])}"
    )


def _saved(card: Mapping[str, Any]) -> str:
    saved = card["saved"]
    rows = [
        ["prompt tokens, mean", f"{saved['tokens_with_context']:.0f}", f"{saved['tokens_without']:.0f}",
         f"{saved['tokens']:.0f}"],
        ["seconds to read one prompt", seconds(saved["prefill_seconds_with_context"]),
         seconds(saved["prefill_seconds_without"]), seconds(saved["prefill_seconds"])],
    ]  # fmt: skip
    timed = saved["timed_tokens"]
    note = (
        f"Timed on {card['ran']['device']}, {card['ran']['dtype']}: one prompt of {timed['with']} tokens and one of "
        f"{timed['without']}, median of {saved['repeats']}, on the base; no cache of the context, which a server may "
        f"keep.{uncounted(saved)}"
    )
    table = _table(["per call", "with the context", "without", "saved"], rows)
    return f'<h2>What does it save?</h2>{table}<p class="soft">{escape(note)}</p>'


def _training(card: Mapping[str, Any]) -> str:
    chart = charts.training(card["training"])
    settings = [[name, json.dumps(value)] for name, value in card["settings"].items()]
    figure = f"<figure><figcaption>KL to the teacher, nats per token, logarithmic</figcaption>{chart}</figure>"
    return (
        f"<h2>Training</h2>{figure if chart else '<p>No metrics were kept.</p>'}<details><summary>Settings</summary>"
        f"{_table(['setting', 'value'], settings)}</details>"
    )


def _context(context: Context | None) -> str:
    if context is None:
        return "<h2>The context</h2><p>Each prompt brought its own.</p>"
    text = context if isinstance(context, str) else transcript([*context, {"role": "", "content": ""}]).rstrip(" :\n")
    return (
        f"<h2>The context</h2><details><summary>{len(text)} characters that are in the weights now</summary>"
        f'<div class="pair"><div class="asked text">{escape(text)}</div></div></details>'
    )


def _made_of(card: Mapping[str, Any]) -> str:
    versions = "; ".join(f"{k} {card['ran'][k]}" for k in ("python", "torch", "transformers", "peft"))
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="hash">{escape(value)}</td></tr>' for name, value in hashes(card)
    )
    head = "<tr><th>part</th><th>SHA-256 (first 16 digits) or version</th></tr>"
    return (
        "<h2>What was it made of?</h2>"
        f'<p class="soft">Recorded {escape(card["hashes"]["recorded"])}. {escape(versions)}. '
        "<code>opcd check</code> compares this with what there is now. "
        f"{escape(rounding(card['ran']))}</p>"
        f'<div class="scroll"><table>{head}{rows}</table></div>'
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
