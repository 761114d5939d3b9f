"""Answers drawn from a transformers model in this process.

Engines that give the same answers for the same seed, up to rounding:

- "decode": `opcd_fast.rollout.decoding`, for architectures it knows; checked on first use (`rollout.check`);
- "generate": transformers' `generate`, for everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opcd_fast.data import common_prefix_length
from opcd_fast.errors import InputError
from opcd_fast.models import copy_for_answers, seam, virtual_tokens
from opcd_fast.rollout import generate as rollout_generate
from opcd_fast.rollout import memory as rollout_memory
from opcd_fast.rollout.check import Answers, check_decoding
from opcd_fast.rollout.choice import Choice
from opcd_fast.rollout.decoding import decode, refuses_decoding, refuses_holding_once
from opcd_fast.rollout.protocol import Completion, Request, Sampler, checked_prompts
from opcd_fast.runtime import KeptSteps, release_steps

ENGINES = ("auto", "decode", "generate")
TRIAL_TOKENS = 4
TRIAL_PROMPTS = 4

_log = logging.getLogger(__name__)


class TransformersRollout(Sampler):
    """A sampler over a transformers model, PEFT-wrapped or not; left in the train/eval mode it had.

    Args:
        model: the causal LM.
        stop_token_ids: ids that end an answer.
        max_batch: sequences generated at once. None: as many as the memory that is free at the first call holds,
            at most 256.
        merge_adapter: generate with a copy of the weights: with the LoRA adapter folded in (of the adapted weights
            alone), or in `dtype`. None: as `models.copy_for_answers` says.
        dtype: what float32 weights without an adapter are copied in, to be read faster; None: never.
        vocab_size: ids from here on are never drawn (a head's padding that another model does not have).
        engine: "auto" | "decode" | "generate". Auto is "decode" where it agrees with the model's
            forward pass.
        sized_for: with max_batch None, tokens of the longest answers there will be, where a call may ask for fewer.
        choice: what was chosen earlier, kept in a file, so that a resumed run rounds as it did before.
        frozen_base: the caller knows that nothing but the adapter changes. False: the weights that it was folded into
            are compared at each call, which reads all of them.
    """

    def __init__(
        self, model: Any, *, stop_token_ids: Sequence[int], max_batch: int | None = 64, sized_for: int = 0,
        merge_adapter: bool | None = None, vocab_size: int | None = None, engine: str = "auto",
        choice: Choice | None = None, frozen_base: bool = False, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(stop_token_ids, vocab_size)
        if engine not in ENGINES:
            raise InputError(f"engine={engine!r} is not available; use {' or '.join(map(repr, ENGINES))}")
        if max_batch is not None and max_batch < 1:
            raise InputError(f"max_batch={max_batch} must be at least 1, or None for as many as fit")
        self.model, self.device = model, next(model.parameters()).device
        free = rollout_memory.free_bytes(self.device)
        make_copy, worth, reason = copy_for_answers(model, dtype, self.device.type, free, frozen_base=frozen_base)
        if merge_adapter and make_copy is None:
            raise InputError("merge_adapter=True needs LoRA on linear layers, or float32 weights and dtype='bfloat16'; "
                             "use None or False (merge_for_rollout of a run)")  # fmt: skip
        refusal = refuses_decoding(model)
        if engine == "decode" and refusal is not None:
            raise InputError(f"engine='decode' cannot run this model: {refusal}; use 'auto' or 'generate'")
        self._sized_for = sized_for
        most = rollout_memory.kept_at_most(self.device) if self.device.type == "cuda" else 0
        self._steps = KeptSteps(most) if most else None
        self._kept = kept = choice or Choice()
        self._engine = kept.fixed("engine", None if engine == "auto" else engine, f"engine={engine!r}")
        if self._engine not in (None, *ENGINES[1:]):
            raise InputError(
                f"choice: it kept the engine {self._engine!r}, which is not available any more; delete rollout.json in "
                "the run's folder to decide anew, or give engine="
            )
        if self._engine is None and refusal is not None:
            self._engine = kept.set("engine", "generate", f"decode cannot run this model: {refusal}")
        merge = kept.fixed("merge", merge_adapter, f"merge_adapter={merge_adapter}")
        if merge is None:
            merge = kept.set("merge", worth, reason)
        self._copy = make_copy() if merge and make_copy is not None else None
        self.copies = self._copy is not None  # and answers in the model's place
        self.max_batch = kept.values.get("batch") if max_batch is None else max_batch

    def sync(self, model: Any = None) -> None:
        """See Rollout. A copy of the weights looks at them itself before every call."""
        if model is not None and model is not self.model:
            raise InputError("sync: this rollout runs the model it was made with; make another for another model")

    def explain(self) -> str:
        """What was chosen and why, a line each; what is not decided yet is decided at the first call."""
        return self._kept.explain()

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
        seed: int = 0, logprobs: bool = True, only: range | None = None,
    ) -> list[Completion]:  # fmt: skip
        """See Rollout. temperature 0 takes the most probable token (its log-probability is then at temperature 1).

        only: answer these of the prompts alone, as they would be answered among all; the others go to other ranks.
        """
        request = Request(max_new_tokens, temperature, top_p, seed, logprobs)
        body = seam.body_of(self.model)
        longest = seam.longest_input(body)  # the answer's last token is not run
        room = None if longest is None else longest - virtual_tokens(self.model) - max_new_tokens + 1
        return self._answers(checked_prompts(prompts, seam.embedding_rows(body), room), request, only)

    @torch.no_grad()
    def _answers(self, rows: list[tuple[int, ...]], request: Request, only: range | None = None) -> list[Completion]:
        if not rows:
            return []
        wanted = range(len(rows)) if only is None else only
        with seam.scoring_mode(self.model):
            model = self.model if self._copy is None else self._copy.refresh()
            self._decide(model, rows, request.max_new_tokens)
            generator = torch.Generator().manual_seed(request.seed)
            uniform = torch.rand(len(rows), request.max_new_tokens, dtype=torch.float64, generator=generator)
            drawn: dict[int, tuple[list[int], list[float]]] = {}
            # Neighbours in length share a batch, so that little of it is padding; equal prompts run once.
            order = sorted(wanted, key=lambda i: (len(rows[i]), rows[i]))
            while len(drawn) < len(order):
                part, released = order[len(drawn) :][: self.max_batch], False
                try:
                    answers = self._run(
                        self._engine, model, [rows[i] for i in part], uniform[part], request.temperature,
                        request.top_p, self._steps,
                    )  # fmt: skip
                except torch.cuda.OutOfMemoryError:
                    released = release_steps()
                    if len(part) == 1 and not released:
                        raise
                    answers = []
                if not answers:  # outside of the handler, whose traceback keeps the tensors alive
                    torch.cuda.empty_cache()
                    if released:
                        continue
                    self.max_batch = len(part) // 2
                    _log.warning("rollout: out of GPU memory with %d sequences, going on with %d at once",
                                 len(part), self.max_batch)  # fmt: skip
                drawn.update(zip(part, answers))
        return [
            Completion(tuple(ids), tuple(values) if request.logprobs else None, ids[-1] in self.stop_token_ids)
            for ids, values in (drawn[i] for i in wanted)
        ]

    def _run(
        self, engine: str | None, model: Any, prompts: Sequence[Sequence[int]], uniform: Tensor, temperature: float,
        top_p: float, kept: KeptSteps | None = None,
    ) -> list[tuple[list[int], list[float]]]:  # fmt: skip
        run = partial(decode, kept=kept) if engine == "decode" else rollout_generate.generate
        return run(
            model, prompts, uniform, stop_token_ids=self.stop_token_ids, temperature=temperature, top_p=top_p,
            vocab_size=self.vocab_size,
        )  # fmt: skip

    # --------------------------------------------------------------------------------------- decided once

    def _decide(self, model: Any, rows: list[tuple[int, ...]], max_new_tokens: int) -> None:
        if self._engine is None:
            self._engine, reason = self._verified(model, rows, max_new_tokens)
            self._kept.set("engine", self._engine, reason)
        if self.max_batch is None:
            longest, max_new_tokens = max(map(len, rows)), max(max_new_tokens, self._sized_for)
            once = self._engine == "decode" and refuses_holding_once(model) is None
            shared = common_prefix_length(rows) if once and len(rows) > 1 else 0
            self.max_batch = rollout_memory.batch_that_fits(model, longest, max_new_tokens, shared_tokens=shared)
            self._kept.set("batch", self.max_batch, f"free memory, {longest} + {max_new_tokens} tokens a sequence")
        self._kept.write()

    def _verified(self, model: Any, rows: list[tuple[int, ...]], max_new_tokens: int) -> tuple[str, str]:
        """The loop on a few of the prompts, shortest and longest among them."""
        ordered = sorted(set(rows), key=len)
        trial = [*ordered[: TRIAL_PROMPTS // 2], *ordered[TRIAL_PROMPTS // 2 :][-TRIAL_PROMPTS // 2 :]]
        uniform = torch.zeros(len(trial), min(TRIAL_TOKENS, max_new_tokens), dtype=torch.float64)

        def by(engine: str) -> Answers:
            return self._run(engine, model, trial, uniform, 0.0, 1.0)

        theirs = partial(by, "generate") if refuses_holding_once(model) is not None else None
        try:
            good, figures = check_decoding(model, partial(by, "decode"), trial, self.vocab_size, theirs)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            return self._stepped_down(f"decode failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        if good:
            what = "generate" if "generate" in figures else "the model's forward pass"
            return "decode", f"agrees with {what}: log-probabilities differ by {figures}"
        return self._stepped_down(f"decode disagrees with the model's forward pass: log-probabilities by {figures}")

    def _stepped_down(self, reason: str) -> tuple[str, str]:
        _log.warning("rollout: %s; using transformers' generate", reason)
        return "generate", reason
