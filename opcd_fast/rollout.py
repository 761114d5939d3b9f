"""Answers drawn from a model. Token ids in, token ids and their log-probabilities out; no text here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from opcd_fast import transformers_seam as seam
from opcd_fast.architectures import refuses_packing
from opcd_fast.errors import InputError
from opcd_fast.merged import MergedCopy
from opcd_fast.seeds import seeded
from opcd_fast.token_prefix import common_prefix_length

MIN_SHARED_PREFIX = 8  # tokens; below this one extra forward costs more than it saves


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    `token_ids` end with the stop token when `finished`; otherwise the answer was cut at the token limit.
    `logprobs[i]` is the natural log-probability of `token_ids[i]` under the distribution it was drawn from
    (temperature and top-p included).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


class Rollout(Protocol):
    """What the loop asks of a sampler. One Completion per prompt, in order; the same seed gives the same answers."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Completion]: ...


class TransformersRollout:
    """transformers' `generate`, batched. Left padding exists only in here.

    The longest common token prefix of the prompts in a batch (a template's own system message, or a context) runs
    through the model once, at batch size 1.

    Args:
        model: a transformers causal LM, PEFT-wrapped or not. It is left in the train/eval mode it had.
        stop_token_ids: ids that end an answer.
        max_batch: sequences generated at once.
        merge_adapter: generate with a copy that has the LoRA adapter folded in (a second copy of the adapted
            weights, about twice as fast on a CPU). None: on the CPU when the adapter allows it.
        vocab_size: ids from here on are never drawn (a head's padding that another model does not have).
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_token_ids: Sequence[int],
        max_batch: int = 64,
        merge_adapter: bool | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if not stop_token_ids:
            raise InputError("stop_token_ids is empty; the tokenizer has no end token: give stop_tokens=")
        self.model = model
        self.stop_token_ids = tuple(stop_token_ids)
        self.max_batch = max_batch
        self.vocab_size = vocab_size
        can_merge = MergedCopy.supports(model)
        if merge_adapter and not can_merge:
            raise InputError("merge_adapter=True needs plain LoRA on linear layers; use None or False")
        on_cpu = next(model.parameters()).device.type == "cpu"
        wanted = merge_adapter if merge_adapter is not None else on_cpu
        self._merged = MergedCopy(model) if wanted and can_merge else None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Completion]:
        """See Rollout. temperature 0 takes the most probable token (its log-probability is then at temperature 1)."""
        model = self._merged.refresh() if self._merged else self.model
        was_training = model.training
        model.eval()
        try:
            with seeded(seed, next(model.parameters()).device), _own_generation_settings(model):
                done: list[Completion] = []
                for start in range(0, len(prompts), self.max_batch):
                    part = prompts[start : start + self.max_batch]
                    done += self._generate(model, part, max_new_tokens, temperature, top_p)
            return done
        finally:
            model.train(was_training)

    def _generate(
        self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float
    ) -> list[Completion]:
        from transformers import GenerationConfig

        device = next(model.parameters()).device
        shared = self._shared_length(model, prompts)
        ids, mask = _left_padded(prompts, shared, self.stop_token_ids[0])
        ids, mask = ids.to(device), mask.to(device)
        recorder = _Sampler(temperature, top_p, self.vocab_size)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=_prefilled(model, ids[:1, :shared], len(prompts)) if shared else None,
            logits_processor=[recorder],
            synced_gpus=False,  # weights are whole here, and ranks need not take the same number of steps
            generation_config=GenerationConfig(
                **({"do_sample": True, "top_k": 0} if temperature > 0 else {"do_sample": False}),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(self.stop_token_ids),
                pad_token_id=self.stop_token_ids[0],
                bos_token_id=None,
                use_cache=True,
            ),
        )
        new = output[:, ids.shape[1] :]
        return self._completions(new.cpu(), recorder.logprobs(new).cpu())

    def _completions(self, tokens: Tensor, logprobs: Tensor) -> list[Completion]:
        done = []
        for row, row_logprobs in zip(tokens.tolist(), logprobs.tolist()):
            stop = next((i for i, token in enumerate(row) if token in self.stop_token_ids), None)
            end = len(row) if stop is None else stop + 1
            done.append(Completion(tuple(row[:end]), tuple(row_logprobs[:end]), stop is not None))
        return done

    @staticmethod
    def _shared_length(model: Any, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens to run once for the batch. 0 where padding between a prefix and the rest could be wrong: windowed
        layers count slots, not positions, and so do architectures whose positions are not rotary."""
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        windowed = kinds != {"full_attention"} or getattr(config, "sliding_window", None)
        if windowed or len(prompts) < 2 or refuses_packing(seam.body_of(model)) is not None:
            return 0
        length = common_prefix_length(prompts)
        return length if length >= MIN_SHARED_PREFIX else 0


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


class _Sampler:
    """Logits processor: applies temperature and top-p, and keeps the log-probability of what was then drawn.

    The token drawn at a step is known at the next call, so one step's scores are held, never all of them.
    """

    def __init__(self, temperature: float, top_p: float, vocab_size: int | None) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        self._warpers = LogitsProcessorList()
        if temperature not in (0.0, 1.0):
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(top_p))
        self._vocab_size = vocab_size
        self._held: Tensor | None = None
        self._drawn: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._held is not None:
            self._drawn.append(_logprob(self._held, input_ids[:, -1]))
        scores = scores.float()
        if self._vocab_size is not None:
            scores[:, self._vocab_size :] = -torch.inf
        self._held = self._warpers(input_ids, scores)
        return self._held

    def logprobs(self, tokens: Tensor) -> Tensor:
        """(B, T) float32 log-probabilities of the generated tokens (B, T)."""
        assert self._held is not None
        return torch.stack([*self._drawn, _logprob(self._held, tokens[:, -1])], dim=1)


def _logprob(scores: Tensor, tokens: Tensor) -> Tensor:
    return scores.gather(1, tokens[:, None]).squeeze(1) - scores.logsumexp(-1)


@contextmanager
def _own_generation_settings(model: Any) -> Iterator[None]:
    """Keep the model's generation_config out: transformers would fill in every setting that a call leaves open, and
    chat models ship temperatures, penalties and beams. The answers must come from the distribution that is scored."""
    from transformers import GenerationConfig

    owner: Any = seam.causal_lm(model)
    kept = owner.generation_config
    owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = kept


def _left_padded(prompts: Sequence[Sequence[int]], shared: int, pad: int) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask: the shared prefix first, then the padding, then each prompt's own tokens."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, :shared] = torch.tensor(prompt[:shared], dtype=torch.int64)
        mask[row, :shared] = 1
        own = prompt[shared:]
        ids[row, width - len(own) :] = torch.tensor(own, dtype=torch.int64)
        mask[row, width - len(own) :] = 1
    return ids, mask


def _prefilled(model: Any, prefix_ids: Tensor, batch: int) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(input_ids=prefix_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    return cache
