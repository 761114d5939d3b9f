"""When memory runs out in training or evaluation: the same work again, in micro-batches of half the tokens.

The pass over the step's answers starts anew, gradients and random numbers included: a backward pass that broke off has
added an unknown part to some gradients. So what comes out is what a run with the smaller budget from the start would
have made, bit for bit. It costs at most one pass for each halving, since the budget stays small for the rest of the
run. An optimizer step that runs out of memory is not repeated: it may have moved some weights.

Several ranks repeat the pass together, with one budget. Where weights are sharded they cannot: the others wait inside
of the pass for the rank that left it. That is an error, which says how to go on.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

from opcd_fast.data import Sample, count_tokens, micro_batches
from opcd_fast.errors import InputError
from opcd_fast.loss import release_workspace
from opcd_fast.models import first_line
from opcd_fast.runtime import release_steps
from opcd_fast.training.engines.ranks import Ranks, Round

logger = logging.getLogger("opcd_fast")
ALL = sys.maxsize  # tokens of a micro-batch without a bound

T = TypeVar("T")


class TokenBudget:
    """Student plus teacher tokens run at once; smaller after every failure, on any rank.

    tokens: None for all at once. ranks: those that share the samples; None: this process alone. together: they meet
    inside of every pass, so that all must run equally many, and none can start again.
    """

    def __init__(self, tokens: int | None, ranks: Ranks | None = None, *, together: bool = False) -> None:
        self.tokens = tokens
        self.ranks = Ranks(alone=True) if ranks is None else ranks
        self._together = together
        self._running: tuple[int, int] = (0, 0)  # sequences and tokens of the micro-batch at work

    def rounds(self, samples: Sequence[Sample], *, share_prompts: bool = False) -> Iterator[Round]:
        """This rank's share of all ranks' `samples`, in `micro_batches` of the present budget."""
        mine = micro_batches(self.ranks.share_samples(samples), self.tokens, share_prompts=share_prompts)
        for turn in self.ranks.rounds(mine, samples) if self._together else map(Round, mine):
            self._running = len(turn.samples), count_tokens(turn.samples, share_prompts=share_prompts)
            yield turn

    def retrying(self, work: Callable[[], T], what: str) -> T:
        """What `work` returns, which goes through `rounds` once and leaves nothing behind when it fails. Every rank's
        work starts anew when that of one has failed.

        what: said in the log. Raises InputError when one sequence alone does not fit, and with `together` at once. An
        error that is not about memory ends all ranks, unless they are `together`.
        """
        while True:
            self._running = (0, 0)
            if self._together:  # nobody could be told
                return self._tried(work, what)[0]  # type: ignore[return-value]
            value, failed = self.ranks.together(partial(self._tried, work, what))
            tokens = min((one for one in self.ranks.gather(failed) if one is not None), default=None)
            if tokens is None:
                return value  # type: ignore[return-value]
            del value
            self.tokens = None if tokens == ALL else tokens // 2
            gc.collect()
            if torch.cuda.is_available():
                release_workspace()
                torch.cuda.empty_cache()
            if self.ranks.main:
                logger.warning("%s: out of memory, repeated with micro_batch_tokens=%s from here on", what, self.tokens)

    def _tried(self, work: Callable[[], T], what: str) -> tuple[T | None, int | None]:
        """What `work` returns, or twice the tokens to try (`ALL`: no bound). Left behind here is the handler, whose
        traceback keeps tensors alive."""
        try:
            return work(), None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            sequences, tokens = self._running
            if release_steps() and not self._together:  # the answers': kept to save time alone
                return None, 2 * self.tokens if self.tokens else ALL
            if sequences < 2:
                raise _too_large(what, tokens, error) from error
            if self._together:
                raise _not_repeated(what, tokens, self.ranks.rank, error) from error
            return None, tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: torch's for GPUs has a type of its own, its one for CPUs a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text


def _too_large(what: str, tokens: int, error: BaseException) -> InputError:
    sequence = f"one sequence of {tokens} tokens (student and teacher)" if tokens else "what comes before any sequence"
    return InputError(
        f"{what}: out of memory with {sequence}: set gradient_checkpointing, lora_rank, quantization or a smaller "
        f"max_new_tokens; `opcd plan` tells what fits ({first_line(error):.200})"
    )


def _not_repeated(what: str, tokens: int, rank: int, error: BaseException) -> InputError:
    return InputError(
        f"{what}: out of memory on rank {rank} with {tokens} tokens at once; the other ranks wait inside of the same "
        f"pass, where weights are sharded, and it cannot be repeated: go on from the last checkpoint with resume, and "
        f"micro_batch_tokens={tokens // 2} ({first_line(error):.200})"
    )
