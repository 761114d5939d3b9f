"""When memory runs out in training or evaluation: the same work again, in micro-batches of half the tokens.

The pass over the step's answers starts anew, gradients and random numbers included: a backward pass that broke off has
added an unknown part to some gradients. So what comes out is what a run with the smaller budget from the start would
have made, bit for bit. It costs at most one pass for each halving, since the budget stays small for the rest of the
run. An optimizer step that runs out of memory is not repeated: it may have moved some weights.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from opcd_fast.batch import Sample, count_tokens, micro_batches
from opcd_fast.errors import InputError

logger = logging.getLogger("opcd_fast")

T = TypeVar("T")


class TokenBudget:
    """Student plus teacher tokens run at once; smaller after every failure. tokens: None for all at once."""

    def __init__(self, tokens: int | None) -> None:
        self.tokens = tokens
        self._running: tuple[int, int] = (0, 0)  # sequences and tokens of the group at work

    def groups(self, samples: Sequence[Sample], *, share_prompts: bool = False) -> Iterator[list[Sample]]:
        """`micro_batches` of the present budget."""
        for group in micro_batches(samples, self.tokens, share_prompts=share_prompts):
            self._running = len(group), count_tokens(group, share_prompts=share_prompts)
            yield group

    def retrying(self, work: Callable[[], T], what: str) -> T:
        """What `work` returns, which goes through `groups` once and leaves nothing behind when it fails.

        what: said in the log. Raises InputError when one sequence alone does not fit.
        """
        while True:
            self._running = (0, 0)
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                sequences, tokens = self._running
                if sequences < 2:
                    raise _too_large(what, tokens, error) from error
            # Outside of the handler, whose traceback keeps the tensors alive.
            self.tokens = tokens // 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning(
                "%s: out of memory with %d tokens at once, repeated with micro_batch_tokens=%d from here on",
                what, tokens, self.tokens,
            )  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: torch's for GPUs has a type of its own, its one for CPUs a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text


def _too_large(what: str, tokens: int, error: BaseException) -> InputError:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    sequence = f"one sequence of {tokens} tokens (student and teacher)" if tokens else "what comes before any sequence"
    return InputError(
        f"{what}: out of memory with {sequence}: set gradient_checkpointing, lora_rank, quantization or a smaller "
        f"max_new_tokens; `opcd plan` tells what fits ({detail:.200})"
    )
