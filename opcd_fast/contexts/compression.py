"""A shorter context in place of new weights: candidates ranked by what is lost against the full context.

The loss is exact: KL(full || candidate), the full context's next-token distribution against the candidate's, over the
whole vocabulary, averaged over answers that the model wrote with the full context to held-out prompts. It is 0 for the
full context itself and largest, as a rule, for none at all; both are in every table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opcd_fast.data import Context, Message, Prompt, teacher_ids, transcript
from opcd_fast.data.tasks import as_user, final_part
from opcd_fast.errors import InputError
from opcd_fast.evaluation import MICRO_BATCH_TOKENS, Arm, Reader, Reading, distances
from opcd_fast.runtime import mean_and_error, stream_seed
from opcd_fast.training.monitoring import save_plot
from opcd_fast.training.step import check_prompt_length

SHARES = (0.7, 0.5, 0.3, 0.15)  # lengths that the model is asked for, as parts of the full context's
MOST_PARTS = 24  # of which each one is left out by itself: a candidate costs a reading of all answers
FULL = "the full context"  # the source of that candidate
STYLES = (
    "Keep every rule and every fact; leave out politeness, repetition and reasons.",
    "Write it as a list of short commands.",
    "Keep what changes how a question is answered, and nothing else.",
)

SHORTEN = """\
Rewrite the text between the lines so that an assistant that reads it behaves exactly as with the original. {style} \
Use at most {words} words. Write the new text and nothing else.

----
{text}
----"""


@dataclass(frozen=True)
class Candidate:
    """A context that may take the place of the full one."""

    context: Context  # "" is none
    source: str  # how it was made
    left_out: str | None = None  # of the full context all is there but this part


@dataclass(frozen=True)
class Ranked:
    """A candidate and what it costs."""

    candidate: Candidate
    tokens: float  # that a prompt carries because of it, mean over prompts
    kl: float  # mean over prompts of the mean over answers of the mean over tokens, nats
    low: float  # 95 % interval of the mean over prompts
    high: float
    top1_agreement: float  # tokens where the most probable token is the full context's
    front: bool = False  # no other candidate has both fewer tokens and less KL


def written_candidates(
    context: Context, answers: Callable[[Sequence[list[Message]], int], list[str]], copies: int, seed: int
) -> list[Candidate]:
    """Shorter texts that a model writes, `copies` for each length and style. Answers that are not shorter are left out.

    answers: texts to questions, as `Player.answers`.
    """
    text = transcript(context)
    words = len(text.split())
    asked = [(share, style) for share in SHARES for style in STYLES for _ in range(copies)]
    questions = [
        as_user(SHORTEN.format(style=style, words=max(3, round(share * words)), text=text)) for share, style in asked
    ]
    found: dict[str, Candidate] = {}
    for (share, _), written in zip(asked, answers(questions, stream_seed(seed, "compress", 0)), strict=True):
        short, source = final_part(written).strip("-").strip(), f"written, {share:.0%} asked for"
        if short and len(short.split()) < words:
            found.setdefault(short, Candidate(short, source))
    return list(found.values())


def cut_candidates(context: Context) -> list[Candidate]:
    """The context with whole parts left out: the first and the last n of its turns, or of its paragraphs or lines; and
    all but one, where it has at most `MOST_PARTS`."""
    parts = _parts(context)
    count, cuts = len(parts), []  # (parts that stay, those that do not, how)
    for kept in range(1, count):
        cuts.append((parts[:kept], parts[kept:], f"first {kept} of {count} parts"))
        cuts.append((parts[-kept:], parts[:-kept], f"last {kept} of {count} parts"))
    for at in range(1, count - 1) if count <= MOST_PARTS else ():
        cuts.append((parts[:at] + parts[at + 1 :], [parts[at]], f"without part {at + 1} of {count}"))
    return [
        Candidate(_joined(context, stay), how, transcript(_joined(context, gone)) if len(gone) == 1 else None)
        for stay, gone, how in cuts
    ]


def parts_that_matter(ranked: Sequence[Ranked]) -> list[Ranked]:
    """What each part is worth, the KL without it, most first. Empty where single parts were not left out."""
    found = [one for one in ranked if one.candidate.left_out is not None]
    return sorted(found, key=lambda one: -one.kl) if len(found) > 2 else []


def rank(
    model: Any, arm: Arm, full: Context, candidates: Sequence[Candidate], prompts: Sequence[Prompt], *,
    max_new_tokens: int, temperature: float = 1.0, answers_per_prompt: int = 1, seed: int = 0,
    micro_batch_tokens: int | None = MICRO_BATCH_TOKENS, told: Callable[[str], None] = lambda line: None,
) -> list[Ranked]:  # fmt: skip
    """All candidates, and none ("") and the full context, in the order of their tokens.

    Every context is read once; the answers are the same for all. temperature divides the logits, as it does when the
    answers are drawn. arm: the model as it answers. told: gets a line before the answers and now and then between
    candidates. Raises InputError for fewer than two prompts, and what no window holds.
    """
    if len(prompts) < 2:
        raise InputError("prompts: at least two are needed to tell a candidate's loss from chance")
    prompts = [prompt for prompt in prompts for _ in range(answers_per_prompt)]

    def rendered(context: Context) -> list[list[int]]:
        rows = [list(teacher_ids(arm.tokenizer, prompt, context)) for prompt in prompts]
        check_prompt_length(max(map(len, rows)), max_new_tokens, arm.window)
        return rows

    def read(rows: list[list[int]]) -> Reading:
        return Reader(model, rows, micro_batch_tokens=micro_batch_tokens).read(answers)

    whole = rendered(full)
    told(f"{len(prompts)} answers with the full context")
    drawn = arm.generate(
        whole, max_new_tokens=max_new_tokens, temperature=temperature, seed=stream_seed(seed, "compress answers", 0)
    )
    answers = [answer.token_ids for answer in drawn]
    with_full, without = read(whole), statistics.fmean(map(len, rendered("")))
    ranked = []
    unique = {str(c.context): c for c in (Candidate("", "none"), *candidates, Candidate(full, FULL))}
    for done, candidate in enumerate(unique.values()):
        if done % max(1, len(unique) // 10) == 0:
            told(f"candidate {done + 1} of {len(unique)}")
        rows = rendered(candidate.context)
        found = distances(with_full, read(rows), temperature)
        groups = (found[at : at + answers_per_prompt] for at in range(0, len(found), answers_per_prompt))
        kl, error = mean_and_error([statistics.fmean(one.kl for one in group) for group in groups])
        same = statistics.fmean(same for one in found for same in one.same_first)
        tokens = statistics.fmean(map(len, rows)) - without
        ranked.append(Ranked(candidate, tokens, kl, kl - 1.96 * error, kl + 1.96 * error, same))
    return with_front(sorted(ranked, key=lambda one: (one.tokens, one.kl)))


def with_front(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Marks what no other candidate beats in both tokens and KL. `ranked` is in the order of tokens, then KL."""
    best, marked = math.inf, []
    for one in ranked:
        marked.append(replace(one, front=one.kl < best))
        best = min(best, one.kl)
    return marked


def plot_ranked(path: Path, ranked: Sequence[Ranked]) -> None:
    """PNG: tokens of every candidate against the KL it loses, with the front that no candidate beats."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        errors = [[one.kl - one.low for one in ranked], [one.high - one.kl for one in ranked]]
        tokens, kl = [one.tokens for one in ranked], [one.kl for one in ranked]
        axes.errorbar(tokens, kl, yerr=errors, fmt="o", ms=3, lw=0.8, alpha=0.5, color="grey")
        front = [one for one in ranked if one.front]
        axes.plot([one.tokens for one in front], [one.kl for one in front], marker="o", lw=1.5, label="best so far")
        axes.set(xlabel="tokens of the context", ylabel="KL(full context || candidate), nats per token", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    save_plot(path, draw)


def _parts(context: Context) -> list[Any]:
    """What a context is made of: exchanges of a chat (each begins with a user's turn), paragraphs, or else lines."""
    if isinstance(context, str):
        paragraphs = [part for part in context.split("\n\n") if part.strip()]
        return paragraphs if len(paragraphs) > 1 else [line for line in context.splitlines() if line.strip()]
    exchanges: list[list[Message]] = []
    for message in context:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        if message["role"] != "system":
            exchanges[-1].append(message)
    return [exchange for exchange in exchanges if exchange]


def _joined(context: Context, parts: Sequence[Any]) -> Context:
    if isinstance(context, str):
        return ("\n\n" if "\n\n" in context.strip() else "\n").join(parts)
    head = [message for message in context if message["role"] == "system"]
    return head + [message for exchange in parts for message in exchange]
