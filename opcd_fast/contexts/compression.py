"""A shorter context in place of new weights: candidates ranked by what is lost against the full context.

The loss is exact: KL(full || candidate), the full context's next-token distribution against the candidate's, over the
whole vocabulary, averaged over answers that the model wrote with the full context to held-out prompts. It is 0 for the
full context itself and largest, as a rule, for none at all; both are in every table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd_fast.data import Context, Message, Prompt, Sample, common_prefix_length, micro_batches, pack, teacher_ids
from opcd_fast.errors import InputError
from opcd_fast.loss import fused_linear_divergence
from opcd_fast.runtime import stream_seed
from opcd_fast.teacher import ContextTeacher

SHARES = (0.7, 0.5, 0.3, 0.15)  # lengths that the model is asked for, as parts of the full context's
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


@dataclass(frozen=True)
class Ranked:
    """A candidate and what it costs."""

    candidate: Candidate
    tokens: float  # that a prompt carries because of it, mean over prompts
    kl: float  # mean over answers of the mean over tokens, nats
    low: float  # 95 % interval of the mean over answers
    high: float
    top1_agreement: float  # tokens where the most probable token is the full context's
    front: bool = False  # no other candidate has both fewer tokens and less KL


def written_candidates(
    context: Context, answers: Callable[[Sequence[list[Message]], int], list[str]], copies: int, seed: int
) -> list[Candidate]:
    """Shorter texts that a model writes, `copies` for each length and style. Answers that are not shorter are left out.

    answers: texts to questions, as `Player.answers`.
    """
    text = as_text(context)
    words = len(text.split())
    asked: list[tuple[str, list[Message]]] = []
    for share in SHARES:
        for style in STYLES:
            question = SHORTEN.format(style=style, words=max(3, round(share * words)), text=text)
            asked += [(f"written, {share:.0%} asked for", [{"role": "user", "content": question}])] * copies
    texts = answers([question for _, question in asked], stream_seed(seed, "compress", 0))
    found: dict[str, Candidate] = {}
    for (source, _), written in zip(asked, texts, strict=True):
        short = written.strip().strip("-").strip()
        if short and len(short.split()) < words:
            found.setdefault(short, Candidate(short, source))
    return list(found.values())


def cut_candidates(context: Context) -> list[Candidate]:
    """The context with whole parts left out: the first and the last n of its turns, or of its paragraphs or lines."""
    parts = _parts(context)
    found: list[Candidate] = []
    for kept in range(1, len(parts)):
        for name, some in (("first", parts[:kept]), ("last", parts[-kept:])):
            found.append(Candidate(_joined(context, some), f"{name} {kept} of {len(parts)} parts"))
    return found


def rank(
    model: Any,
    tokenizer: Any,
    full: Context,
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    rollout: Any,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    answers_per_prompt: int = 1,
    micro_batch_tokens: int | None = 8192,
    seed: int = 0,
    told: Callable[[Ranked], None] | None = None,
) -> list[Ranked]:
    """All candidates, and none ("") and the full context, in the order of their tokens.

    Every context is read once by the shared-prefix teacher; the answers are the same for all. temperature divides the
    logits, as it does when the answers are drawn. Raises InputError for fewer than two prompts.
    """
    if len(prompts) < 2:
        raise InputError("prompts: at least two are needed to tell a candidate's loss from chance")
    prompts = [prompt for prompt in prompts for _ in range(answers_per_prompt)]
    whole = [teacher_ids(tokenizer, prompt, full) for prompt in prompts]
    drawn = rollout.generate(
        whole, max_new_tokens=max_new_tokens, temperature=temperature, seed=stream_seed(seed, "compress answers", 0)
    )
    responses = [answer.token_ids for answer in drawn]
    reader = _Reader(model, tokenizer, prompts, responses, micro_batch_tokens)
    none_length = reader.length("")
    hidden = reader.hidden(full)
    ranked = []
    unique = {str(c.context): c for c in (Candidate("", "none"), *candidates, Candidate(full, "the full context"))}
    for candidate in unique.values():
        kl, agreement = reader.divergence(hidden, candidate.context, temperature)
        mean, half = _mean(kl)
        one = Ranked(
            candidate, reader.length(candidate.context) - none_length, mean, mean - half, mean + half, agreement
        )
        ranked.append(one)
        if told is not None:
            told(one)
    return with_front(sorted(ranked, key=lambda one: (one.tokens, one.kl)))


def with_front(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Marks what no other candidate beats in both tokens and KL. `ranked` is in the order of tokens, then KL."""
    best, marked = math.inf, []
    for one in ranked:
        marked.append(Ranked(**{**vars(one), "front": one.kl < best}))
        best = min(best, one.kl)
    return marked


def as_text(context: Context) -> str:
    """A context as the text that a model is asked to shorten."""
    if isinstance(context, str):
        return context
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in context)


class _Reader:
    """Scores fixed answers to fixed prompts after any context."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        micro_batch_tokens: int | None,
    ) -> None:
        self._model, self._tokenizer, self._prompts = model, tokenizer, prompts
        self._responses, self._micro_batch_tokens = responses, micro_batch_tokens
        self._device = next(model.parameters()).device
        lengths = torch.tensor([len(response) for response in responses])
        self._answer_of_token = torch.repeat_interleave(torch.arange(len(responses)), lengths)

    def length(self, context: Context) -> float:
        """Mean tokens of a prompt with `context`."""
        return statistics.mean(len(teacher_ids(self._tokenizer, prompt, context)) for prompt in self._prompts)

    def hidden(self, context: Context) -> Tensor:
        """(N, D) hidden states that predict the answers' N tokens."""
        rows = [teacher_ids(self._tokenizer, prompt, context) for prompt in self._prompts]
        shared = common_prefix_length(rows)
        context = torch.tensor(rows[0][:shared], dtype=torch.int64)
        teacher = ContextTeacher(self._model, context, frozen_weights=True)
        samples = [Sample(row, row[shared:], 0, answer) for row, answer in zip(rows, self._responses, strict=True)]
        pieces = []
        for group in micro_batches(samples, self._micro_batch_tokens):
            batch = pack(group).to(self._device)
            pieces.append(
                teacher.hidden_states_packed(
                    batch.teacher_ids, batch.teacher_cu_seqlens, select=batch.response_index_teacher
                )
            )
        self._head = teacher.head
        return torch.cat(pieces)

    @torch.no_grad()
    def divergence(self, full: Tensor, context: Context, temperature: float) -> tuple[list[float], float]:
        """KL(full || context) of every answer, mean over its tokens; and the share of tokens with the same first."""
        hidden = self.hidden(context)
        kl, stats = fused_linear_divergence(
            hidden, self._head, full, self._head,
            divergence="forward_kl", temperature=temperature, reduction="none", return_stats=True,
        )  # fmt: skip
        count = len(self._responses)
        sums = torch.zeros(count).index_add_(0, self._answer_of_token, kl.float().cpu())
        lengths = torch.bincount(self._answer_of_token, minlength=count)
        return (sums / lengths).tolist(), float(stats.top1_agreement.float().mean())


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (normal approximation over answers)."""
    return statistics.mean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def _parts(context: Context) -> list[Any]:
    """What a context is made of: exchanges of a chat (each begins with a user's turn), paragraphs, or else lines."""
    if isinstance(context, str):
        paragraphs = [part for part in context.split("\n\n") if part.strip()]
        return paragraphs if len(paragraphs) > 1 else [line for line in context.splitlines() if line.strip()]
    exchanges: list[list[Message]] = []
    for message in _turns(context):
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return exchanges


def _turns(context: Sequence[Message]) -> list[Message]:
    return [message for message in context if message["role"] != "system"]


def _joined(context: Context, parts: Sequence[Any]) -> Context:
    if isinstance(context, str):
        return ("\n\n" if "\n\n" in context.strip() else "\n").join(parts)
    head = [message for message in context if message["role"] == "system"]
    return head + [message for exchange in parts for message in exchange]
