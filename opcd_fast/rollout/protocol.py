"""What the loop asks of a sampler, whichever engine it is. Token ids in, token ids out; never text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from opcd_fast.errors import InputError
from opcd_fast.models import adapter_weights, checksum, is_sharded, weights_of


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    `token_ids` end with the stop token when `finished`; otherwise the answer was cut at the token limit.
    `logprobs[i]` is the natural log-probability of `token_ids[i]` under the distribution it was drawn from
    (temperature and top-p included); None when they were not asked for, or the engine does not know them.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finished: bool

    @property
    def finish_reason(self) -> str:
        """"stop" or "length", as servers call it."""
        return "stop" if self.finished else "length"


class Rollout(Protocol):
    """A sampler. One Completion per prompt, in order.

    `sync(model)` comes before `generate` whenever the trained weights may have moved; an engine that keeps a copy of
    them (merged, on a server, in another engine) brings it up to date there. `explain()` says what was chosen and why.
    Where weights are sharded over ranks, `uses_model` spares gathering them: "saves" if `sync` calls nothing of the
    model but `save_pretrained`, "no" if nothing at all; "runs" if there is no such attribute.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        logprobs: bool = True,
    ) -> list[Completion]: ...

    def sync(self, model: Any) -> None: ...

    def explain(self) -> str: ...


def check_request(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float
) -> list[tuple[int, ...]]:
    """The prompts as tuples of Python integers. Raises InputError for what no engine can run."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):  # refuses NaN too
        raise InputError(f"temperature={temperature} must be a number, 0 or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p} must be a number above 0 up to 1")
    checked = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise InputError(f"prompts[{index}] is text; give token ids (tokenizer.apply_chat_template makes them)")
        ids = tuple(int(token) for token in prompt)
        if not ids:
            raise InputError(f"prompts[{index}] is empty; give at least one token id")
        if min(ids) < 0:
            raise InputError(f"prompts[{index}] holds the id {min(ids)}; token ids start at 0")
        checked.append(ids)
    return checked


def cut_at_stop(tokens: Sequence[int], stop_token_ids: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """The tokens up to and including the first stop token, and whether there was one."""
    stop = next((place for place, token in enumerate(tokens) if token in stop_token_ids), None)
    return tuple(tokens[: None if stop is None else stop + 1]), stop is not None


def stop_token_ids(tokenizer: Any, model: Any, extra: Sequence[str] = ()) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's and the model's end tokens, and `extra` tokens by name."""
    ids: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids += configured if isinstance(configured, list) else [configured] if configured is not None else []
    vocabulary = tokenizer.get_vocab()
    for token in extra:
        if token not in vocabulary:
            raise InputError(f"stop_tokens: {token!r} is not a single token of this tokenizer")
        ids.append(vocabulary[token])
    return tuple(dict.fromkeys(ids))


def weights_version(model: Any) -> Any:
    """Compares equal as long as the weights that `save_pretrained` writes of `model` have the same values.

    Where ranks hold parts of them, no rank can tell: then it equals nothing.
    """
    weights = adapter_weights(model) if hasattr(model, "peft_config") else weights_of(model)
    return object() if is_sharded(weights) else checksum(weights)
