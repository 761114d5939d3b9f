"""Many answers under one prompt: the log-probability of each, with the prompt read once.

    scores = score_continuations(ContextTeacher(model, prompt_ids), answers)   # answers: lists of token ids
    best = int(scores.sums.argmax())

For evaluation work (multiple choice, reranking, perplexity of answers); nothing here needs a training run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opcd_fast.loss import fused_linear_logprobs
from opcd_fast.models import rope_switch, seam
from opcd_fast.teacher.inputs import as_ids, context_of_sequence

if TYPE_CHECKING:
    from opcd_fast.teacher.context_teacher import ContextTeacher


@dataclass(frozen=True, eq=False)
class ContinuationScores:
    """Log-probabilities (natural logarithms) of B continuations of N tokens in all, in the order given."""

    logprobs: Tensor  # (N,) float32 (float64 of a float64 model): log p(token | context, tokens before), back to back
    cu_seqlens: Tensor  # (B + 1,) int32, on the CPU: where each continuation begins and ends

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, on the CPU: tokens of each continuation."""
        return self.cu_seqlens.diff().long()

    def per_token(self) -> list[Tensor]:
        """B tensors (T_i,), views of `logprobs`."""
        return list(self.logprobs.split(self.lengths.tolist()))

    @property
    def sums(self) -> Tensor:
        """(B,): log p(continuation | context)."""
        # One sum for each, not a scatter: equal continuations must get equal sums on every device.
        return torch.stack([logprobs.sum() for logprobs in self.per_token()])

    @property
    def means(self) -> Tensor:
        """(B,): the sums divided by the numbers of tokens, for answers of different lengths."""
        return self.sums / self.lengths.to(self.logprobs.device)


@torch.no_grad()
def score_continuations(
    teacher: ContextTeacher,
    continuations: Sequence[Any],
    *,
    context_index: Any = None,
    temperature: float = 1.0,
    max_batch_tokens: int = 16_384,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> ContinuationScores:
    """log p of every token of every continuation of a context, without gradients.

    teacher: holds model and contexts. continuations: B lists or 1-D integer tensors of token ids, none empty; what a
    tokenizer puts around a text (a beginning-of-sequence token, say) is scored like any other token.
    context_index: (B,) which context each one continues; may be left out when there is one. temperature divides the
    logits. max_batch_tokens: at most so many tokens go through the model at once (on path "concat", contexts
    included); a longer continuation goes alone. workspace_bytes and backend as in `fused_linear_logprobs`.

    The first token of a continuation is predicted by the last token of its context, whose hidden state the context's
    prefix holds; so all contexts of the teacher are read, and none may be empty where one is continued.

    Raises ValueError for malformed arguments, an empty context or continuation, token ids outside the vocabulary,
    context and continuation longer than the model's max_position_embeddings, and a continuation across the length
    where RoPE of type "longrope" moves the positions of the context itself.
    """
    head = teacher.head
    rows = [as_ids(f"continuations[{i}]", ids, head.valid_size) for i, ids in enumerate(continuations)]
    if not rows:
        raise ValueError("continuations is empty; give at least one list of token ids")
    if type(max_batch_tokens) is not int or max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens: expected an integer >= 1, got {max_batch_tokens!r}")
    for i, ids in enumerate(rows):
        if not ids.numel():
            raise ValueError(f"continuations[{i}] is empty; a continuation has at least one token")
    prefixes = teacher.prefixes
    index = context_of_sequence(context_index, len(rows), len(prefixes))
    for i, (ids, which) in enumerate(zip(rows, index, strict=True)):
        if not len(prefixes[which]):
            raise ValueError(
                f"contexts: context {which} is empty, so that nothing predicts the first token of continuations[{i}]; "
                "give it one token at least, such as the tokenizer's beginning-of-sequence token"
            )
        _check_length(teacher, i, len(prefixes[which]), ids.numel())

    pieces = []
    costs = [
        ids.numel() + (len(prefixes[which]) if teacher.path == "concat" else 0)
        for ids, which in zip(rows, index, strict=True)
    ]
    for start, stop in _groups(costs, max_batch_tokens):
        hidden = _predicting(teacher, prefixes, rows[start:stop], index[start:stop])
        pieces.append(
            fused_linear_logprobs(
                hidden, head, torch.cat(rows[start:stop]).to(hidden.device), temperature=temperature,
                workspace_bytes=workspace_bytes, backend=backend,
            )
        )  # fmt: skip
    bounds = [0, *accumulate(ids.numel() for ids in rows)]
    return ContinuationScores(torch.cat(pieces), torch.tensor(bounds, dtype=torch.int32))


def _predicting(teacher: ContextTeacher, prefixes: list[Any], rows: list[Tensor], index: list[int]) -> Tensor:
    """(N, D): for every token of `rows` the hidden state one position before it."""
    device = teacher.head.weight.device
    states: list[list[Tensor]] = [[prefixes[which].last_hidden_state[None].to(device)] for which in index]
    # The last token predicts nothing, so it is not run; a continuation of one token needs no forward at all.
    fed = [i for i, ids in enumerate(rows) if ids.numel() > 1]
    if fed:
        inputs = [rows[i][:-1] for i in fed]
        bounds = torch.tensor([0, *accumulate(ids.numel() for ids in inputs)], dtype=torch.int32)
        which = torch.tensor([index[i] for i in fed])
        hidden = teacher.hidden_states_packed(torch.cat(inputs), bounds, context_index=which)
        for i, part in zip(fed, hidden.split([ids.numel() for ids in inputs]), strict=True):
            states[i].append(part)
    return torch.cat([state for row in states for state in row])


def _groups(costs: Sequence[int], bound: int) -> Iterator[tuple[int, int]]:
    """Neighbouring ranges whose costs add up to `bound` at most; what is above it alone is a range alone."""
    start, total = 0, 0
    for i, cost in enumerate(costs):
        if i > start and total + cost > bound:
            yield start, i
            start, total = i, 0
        total += cost
    yield start, len(costs)


def _check_length(teacher: ContextTeacher, i: int, context: int, tokens: int) -> None:
    body = seam.body_of(teacher.model)
    longest = context + tokens - 1  # the last token is not run
    limit = seam.longest_input(body)
    if limit is not None and longest > limit:
        raise ValueError(
            f"continuations[{i}]: {tokens} tokens after a context of {context} are {longest - limit} more than fit "
            f"into the model's max_position_embeddings of {limit}"
        )
    switch = rope_switch(body)
    if switch is not None and context <= switch < longest:
        raise ValueError(
            f"continuations[{i}]: {tokens} tokens after a context of {context} cross {switch} tokens, where the "
            "model's RoPE moves the positions of the context too, so that its last hidden state no longer is what "
            "predicts the first token; use a shorter continuation or context"
        )
