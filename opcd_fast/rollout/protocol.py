"""What the loop asks of a sampler, whichever engine it is. Token ids in, token ids out; never text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

from opcd_fast.errors import InputError
from opcd_fast.kernels.reference import is_number
from opcd_fast.models import adapter_weights, checksum, is_sharded, weights_of
from opcd_fast.runtime import stream_seed, token_ids

LEAST_TEMPERATURE = 1e-30  # above 0: logits divided by less are not finite in float32


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
        """ "stop" or "length", as servers call it."""
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


@dataclass(frozen=True)
class Request:
    """How answers are drawn: what `Rollout.generate` takes as keywords."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, Integral) or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens!r} must be a whole number, at least 1")
        t = self.temperature
        if not is_number(t) or not (t == 0 or LEAST_TEMPERATURE <= t < float("inf")):  # refuses NaN too
            raise InputError(f"temperature={t!r} must be a number, 0 (greedy) or from {LEAST_TEMPERATURE} on")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p!r} must be a number above 0 up to 1")
        if not isinstance(self.seed, Integral):
            raise InputError(f"seed={self.seed!r} must be a whole number")

    def seed_of(self, index: int) -> int:
        """Of one answer, for engines that draw each from a seed of its own; below 2**31."""
        return stream_seed(self.seed, "answer", index) % 2**31


class Sampler(ABC):
    """A Rollout of ours: what is asked of it and what it answers are checked in one place.

    Args:
        stop_token_ids: ids that end an answer.
        vocab_size: an id from here on is none that the teacher knows: never drawn, or an error.
    """

    def __init__(self, stop_token_ids: Sequence[int], vocab_size: int | None = None) -> None:
        self.stop_token_ids = tuple(token_ids("stop_token_ids", () if stop_token_ids is None else stop_token_ids))
        if not self.stop_token_ids:
            raise InputError("stop_token_ids is empty; the tokenizer has no end token: give stop_tokens=")
        self.vocab_size = vocab_size

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        logprobs: bool = True,
    ) -> list[Completion]:
        """See Rollout. Raises InputError for what no engine can run, and for answers that cannot be trained on."""
        request = Request(max_new_tokens, temperature, top_p, seed, logprobs)
        return self._answers(checked_prompts(prompts), request)

    @abstractmethod
    def _answers(self, rows: list[tuple[int, ...]], request: Request) -> list[Completion]: ...

    def _completion(self, where: str, tokens: Sequence[int], finish_reason: Any, limit: int) -> Completion:
        """Another engine's answer, without log-probabilities. Raises InputError for one that is not whole."""
        if finish_reason not in ("stop", "length"):
            raise InputError(f"{where}: finish_reason is {finish_reason!r}; only 'stop' and 'length' are whole answers")
        if not tokens:
            raise InputError(f"{where}: the answer is empty")
        kept, finished = cut_at_stop(tokens, self.stop_token_ids)
        if finish_reason == "stop" and not finished:
            raise InputError(
                f"{where}: the answer ends at token {tokens[-1]}, which is no stop token here; give it as stop_tokens"
            )
        if len(kept) < len(tokens):
            raise InputError(f"{where}: the answer goes on after the stop token {kept[-1]}; it must end there")
        if finish_reason == "length" and len(tokens) != limit:
            raise InputError(
                f"{where}: cut after {len(tokens)} tokens, {limit} were asked for; lower max_new_tokens, or give the "
                "engine a longer context (vLLM: max_model_len)"
            )
        if self.vocab_size is not None and max(tokens) >= self.vocab_size:
            raise InputError(f"{where}: drew token {max(tokens)}, which the teacher's vocabulary does not have")
        return Completion(kept, None, finished)


def checked_prompts(
    prompts: Sequence[Sequence[int]], vocabulary: int | None = None, room: int | None = None
) -> list[tuple[int, ...]]:
    """The prompts as tuples of Python integers. Raises InputError for what no engine can run, and, where these are
    given, for ids from `vocabulary` on and for more than `room` tokens (what the answer leaves of the window)."""
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        what = f"a {type(prompts).__name__}"
        raise InputError(f"prompts is {what}; give a list of rows of token ids, such as tokenizer(texts).input_ids")
    checked = []
    for index, prompt in enumerate(prompts):
        ids = token_ids(f"prompts[{index}]", prompt, vocabulary)
        if not ids:
            raise InputError(f"prompts[{index}] is empty; give at least one token id")
        if room is not None and len(ids) > room:
            over = f"prompts[{index}] of {len(ids)} tokens and the answer exceed the model's window"
            raise InputError(f"{over} by {len(ids) - room}; shorten the prompt or max_new_tokens")
        checked.append(tuple(ids))
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
    """Compares equal as long as `save_pretrained` writes the same weights, and settings of adapters, of `model`.

    Where ranks hold parts of the weights, no rank can tell: then it equals nothing.
    """
    adapters = getattr(model, "peft_config", None)
    weights = weights_of(model) if adapters is None else adapter_weights(model)
    if is_sharded(weights):
        return object()
    return checksum(weights), {name: settings.to_dict() for name, settings in (adapters or {}).items()}
