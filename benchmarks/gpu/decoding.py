"""Tokens a second at Qwen3-1.7B's shape: our loop with and without cuDNN, beside transformers' `generate`.

Random weights; every answer is as long as the limit. The host's calls per token decide the pace where no graph is
recorded, so they are counted as well.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.session import Session, Skip, Values
from benchmarks.measure import wait
from benchmarks.phase_rows import value
from benchmarks.step_cases import RANK, SHAPES, random_model
from opcd_fast.attention.sdpa import sdpa_without_cudnn
from opcd_fast.rollout.decoding import decode

PROMPT = 64
SETTINGS = {"dtype": "bfloat16", "sampling": "temperature 1"}


def run(session: Session) -> None:
    name, rows, tokens, few = ("tiny Llama", 3, 6, 4) if session.dry else ("Qwen3-1.7B", 64, 64, 10)
    model = cache(lambda: random_model(SHAPES[name], torch.bfloat16, session.device))
    adapted = cache(lambda: _adapted(model()))
    shape = {"rows": rows, "prompt": PROMPT}

    def row(label: str, call: Callable[[], Callable[[int], Any]], count: int, **settings: str) -> None:
        """A row of `count` tokens to each answer."""
        session.row(label, lambda: _paced(session, call(), rows, count), shape={**shape, "tokens": count},
                    settings={**SETTINGS, "model": name, **settings}, needs=6)  # fmt: skip

    ours = lambda: partial(_decode, model(), rows)  # noqa: E731
    theirs = lambda **options: partial(_generate, model(), rows, **options)  # noqa: E731
    row("decode", ours, tokens)
    row("generate, dynamic cache", lambda: theirs(), tokens // 2, attention="without cuDNN")
    row("generate, static cache", lambda: theirs(cache_implementation="static", disable_compile=True), tokens // 2,
        attention="without cuDNN")  # fmt: skip
    row("decode, ragged prompts", lambda: partial(_decode, model(), rows, ragged=True), tokens // 2)
    for label, call in (("decode", lambda count: _decode(model(), 2, count)),
                        ("generate", lambda count: _generate(model(), 2, count))):  # fmt: skip
        session.row(f"calls per token, {label}", partial(_calls, call), settings={"model": name})
    session.row("decode under a graph", _graph, settings={"model": name})
    row("decode, cuDNN allowed", lambda: partial(_with_cudnn, partial(_decode, model(), rows)), few)
    row("generate, cuDNN allowed", lambda: partial(_with_cudnn, partial(_plain_generate, model(), rows)), few)
    # Last: the adapter changes the model that the others run.
    row("decode, adapter unmerged", lambda: partial(_decode, adapted(), rows), tokens // 2, adapter=f"LoRA {RANK}")
    session.row("calls per token, adapter unmerged", partial(_calls, lambda count: _decode(adapted(), 2, count)),
                settings={"model": name})  # fmt: skip


def _adapted(model: Any) -> Any:
    from peft import get_peft_model

    from benchmarks.step_worker import lora

    return get_peft_model(model, lora()).eval()


def _prompts(rows: int) -> torch.Tensor:
    return torch.randint(5, 200, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))


def _decode(model: Any, rows: int, tokens: int, *, ragged: bool = False) -> None:
    uniform = torch.rand(rows, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts = _prompts(rows).tolist()
    if ragged:  # so that there is a mask
        prompts = [prompt[row % 8 :] for row, prompt in enumerate(prompts)]
    decode(model, prompts, uniform, stop_token_ids=[-1], temperature=1.0, top_p=1.0)


def _generate(model: Any, rows: int, tokens: int, **options: Any) -> None:
    with sdpa_without_cudnn():
        _plain_generate(model, rows, tokens, **options)


@torch.no_grad()
def _plain_generate(model: Any, rows: int, tokens: int, **options: Any) -> None:
    ids = _prompts(rows).to(next(model.parameters()).device)
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, min_new_tokens=tokens,
                   max_new_tokens=tokens, **options)  # fmt: skip


def _with_cudnn(call: Callable[[int], None], tokens: int) -> None:
    with _unrestricted():
        call(tokens)


@contextlib.contextmanager
def _unrestricted() -> Iterator[None]:
    """Our own modules do not keep cuDNN out: what is measured is what they avoid."""
    name = "sdpa_without_cudnn"
    found = [m for n, m in list(sys.modules.items()) if n.startswith("opcd_fast") and name in vars(m)]
    kept = [getattr(module, name) for module in found]
    for module in found:
        setattr(module, name, contextlib.nullcontext)
    try:
        yield
    finally:
        for module, function in zip(found, kept, strict=True):
            setattr(module, name, function)


def _graph() -> Values:
    raise Skip("not there yet: the decoding loop records no CUDA graph")


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
        "time": value(seconds, "s"),
    }
    if session.device.type == "cuda":
        values["memory"] = value(torch.cuda.max_memory_allocated(), "bytes")
    return values


class _Count(TorchDispatchMode):
    """How many operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def _calls(call: Callable[[int], Any]) -> Values:
    """The difference between two lengths, so that prompts do not count."""
    counts = []
    for tokens in (2, 6):
        with _Count() as counter:
            call(tokens)
        counts.append(counter.calls)
    return {"calls": value((counts[1] - counts[0]) / 4, "aten calls/token")}
