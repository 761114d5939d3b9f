"""Tokens a second at Qwen3-1.7B's shape: our loop beside transformers' `generate`, with and without cuDNN's attention.

Random weights; every answer is as long as the limit, or a part of it for `generate`, whose pace does not depend on it.
The host's calls per token decide the pace where no graph is recorded, so they are counted as well, and so is how often
the host waits for the device. vLLM is a row where it is installed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.decoding import DYNAMIC, OURS, counted
from benchmarks.measure import wait
from benchmarks.schema import Values, value
from benchmarks.session import Session
from benchmarks.step_cases import RANK, SHAPES, random_model
from opcd_fast import TransformersRollout
from opcd_fast.attention import sdpa_without_cudnn

CASE, PROMPT = "64 answers", 64
NO_STOP = (2**31 - 1,)  # so that every answer is as long as the limit


def run(session: Session) -> None:
    name, rows, tokens, few, context = ("tiny Llama", 3, 6, 4, 9) if session.dry else ("Qwen3-1.7B", 64, 512, 10, 8192)
    some = tokens if session.dry else 32
    model = cache(lambda: random_model(SHAPES[name], torch.bfloat16, session.device))
    about = {"model": name, "dtype": "bfloat16", "sampling": "temperature 1"}

    def row(label: str, call: Callable[[int, int], Any], count: int, **settings: str) -> None:
        """A row of `count` tokens to each answer."""
        shape = {"rows": rows, "prompt": PROMPT, "tokens": count}
        session.row(CASE, lambda: _paced(session, partial(call, rows), rows, count), needs=6, shape=shape,
                    settings={**about, **settings}, of=label)  # fmt: skip

    ours = lambda *size, **options: _decode(model(), *size, **options)  # noqa: E731
    theirs = lambda *size, **options: _generate(model(), *size, **options)  # noqa: E731
    row(OURS, ours, tokens)
    row(f"{OURS}, recorded by the call before", ours, tokens)
    row(DYNAMIC, theirs, some, attention="without cuDNN")
    row("generate, static cache", partial(theirs, cache_implementation="static", disable_compile=True), some,
        attention="without cuDNN")  # fmt: skip
    row(f"{OURS}, ragged prompts", partial(ours, ragged=True), some)
    row(f"{OURS} behind a context", partial(ours, context=context), some, context=f"{context} tokens")
    for label, call in ((OURS, ours), ("generate", theirs)):
        session.row("calls per token", partial(counted, partial(call, 2)), settings=about, of=label)
    row("generate, cuDNN allowed", partial(theirs, cudnn=True), few)
    with tempfile.TemporaryDirectory() as folder:
        engine = cache(lambda: peers.vllm_answers(model(), Path(folder), PROMPT + tokens))
        row("vllm", lambda rows, tokens: engine()(_prompts(rows).tolist(), tokens), tokens)
    # The adapter changes the model that the others run.
    adapted = cache(lambda: _adapted(model()))
    unmerged = lambda *size: _decode(adapted(), *size)  # noqa: E731
    row(f"{OURS}, adapter unmerged", unmerged, tokens, adapter=f"LoRA {RANK}")
    session.row("calls per token", partial(counted, partial(unmerged, 2)), settings=about,
                of=f"{OURS}, adapter unmerged")  # fmt: skip


def _adapted(model: Any) -> Any:
    from peft import get_peft_model

    from benchmarks.step_worker import lora

    return get_peft_model(model, lora()).eval()


def _prompts(rows: int) -> torch.Tensor:
    return torch.randint(5, 200, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))


def _decode(model: Any, rows: int, tokens: int, *, ragged: bool = False, context: int = 0) -> None:
    prompts = [[7] * context + prompt for prompt in _prompts(rows).tolist()]
    if ragged:  # so that there is a mask
        prompts = [prompt[row % 8 :] for row, prompt in enumerate(prompts)]
    _rollout(model, rows).generate(prompts, max_new_tokens=tokens, logprobs=False)


@cache
def _rollout(model: Any, rows: int) -> TransformersRollout:
    """One for all calls, which keeps what it recorded."""
    return TransformersRollout(model, stop_token_ids=NO_STOP, max_batch=rows, merge_adapter=False, engine="decode")


@torch.no_grad()
def _generate(model: Any, rows: int, tokens: int, *, cudnn: bool = False, **options: Any) -> None:
    if not cudnn:
        with sdpa_without_cudnn():
            return _generate(model, rows, tokens, cudnn=True, **options)
    ids = _prompts(rows).to(next(model.parameters()).device)
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, min_new_tokens=tokens,
                   max_new_tokens=tokens, **options)  # fmt: skip
    return None


def _paced(session: Session, call: Callable[[int], Any], rows: int, tokens: int) -> Values:
    """Prompts and all; a shorter call before, which makes handles and compiles what there is to compile."""
    call(min(3, tokens))
    wait(session.device)
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call(tokens)
    wait(session.device)
    seconds = time.perf_counter() - start
    values = {
        "rate": value(rows * tokens / seconds, "tokens/s"),
        "step": value(1e3 * seconds / tokens, "ms"),
        "time": value(1e3 * seconds, "ms"),
    }
    if session.device.type == "cuda":
        values["peak"] = value(torch.cuda.max_memory_allocated(), "bytes")
    return values
