"""Answers drawn by our loop beside transformers' `generate`: the demo's prompts, few and many after a shared text.

All contenders of a case run the same model on the same prompts, temperature 1, every answer as long as the limit.
Operators and waits for the device are counted per token of a batch of two; what a graph replays is no call.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import peers
from benchmarks.models import SHAPES, random_model
from benchmarks.schema import Values, value
from benchmarks.session import Contender, Session
from opcd_fast.attention import sdpa_without_cudnn
from opcd_fast.models import seam
from opcd_fast.rollout.decoding import decode

OURS, DYNAMIC = "opcd_fast-decode", "generate, dynamic cache"
SHARED = 361  # tokens: what a system prompt of a page has
ROUND_SECONDS = 20.0
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    tokens: int
    shared: int = 0  # 0: the demo's prompts


def run(session: Session, *, only: tuple[str, ...] = ()) -> None:
    """only: implementations."""
    cases = [Case("demo", 16, 24), Case("behind 361", 64, 8, SHARED), Case("few behind 361", 4, 8, SHARED)]
    if session.dry:
        cases = [Case("demo", 3, 4), Case("behind 361", 4, 3, 40)]
    for case in cases:
        _compare(session, case, only)


def _compare(session: Session, case: Case, only: Sequence[str]) -> None:
    model, name, prompts = _job(session, case)
    calls: dict[str, Callable[[Prompts, int], Any]] = {
        OURS: partial(ours, model),
        f"{OURS}, fixed shapes": partial(ours, model, static=True),
        DYNAMIC: partial(theirs, model),
        "generate, static cache": partial(theirs, model, cache_implementation="static", disable_compile=True),
    }
    if case.shared and case.rows > 8:  # reading it in every row takes minutes
        calls = {name: call for name, call in calls.items() if not name.startswith("generate")}
        calls["generate, context read once"] = partial(theirs, model, shared=case.shared)

    def contender(name: str, call: Callable[[Prompts, int], Any]) -> Contender:
        def judge(_: Any) -> Values:
            return {"tokens": value(case.rows * case.tokens, "1"), **counted(partial(call, prompts[:2]))}

        return Contender(name, lambda: partial(call, prompts, case.tokens), judge)

    longest = max(map(len, prompts)) + case.tokens

    with tempfile.TemporaryDirectory() as folder:
        vllm = Contender(
            "vllm", lambda: partial(peers.vllm_answers(model, Path(folder), longest), prompts, case.tokens),
            lambda _: {"tokens": value(case.rows * case.tokens, "1")}, has_peak=False,
        )  # fmt: skip
        session.compare(
            case.name, [*(contender(name, call) for name, call in calls.items()), vllm],
            shape={"rows": case.rows, "tokens": case.tokens, **({"shared": case.shared} if case.shared else {})},
            settings={"model": name, "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")},
            seconds=ROUND_SECONDS, only=only,
        )  # fmt: skip


def _job(session: Session, case: Case) -> tuple[Any, str, list[list[int]]]:
    generator = torch.Generator().manual_seed(case.rows)
    if session.dry or session.device.type == "cuda":
        shape = "tiny Llama" if session.dry else "Qwen3-1.7B"
        dtype = torch.float32 if session.dry else torch.bfloat16
        model = random_model(SHAPES[shape], dtype, session.device)
        own = torch.randint(5, 200, (case.rows, 20), generator=generator).tolist()
        return model, shape, [[7] * case.shared + ids for ids in own]
    from opcd_fast.evaluation.demo import DATA
    from opcd_fast.models import load_model, load_tokenizer

    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu"), load_tokenizer("smollm2")
    lines = (DATA / "train_prompts.jsonl").read_text(encoding="utf-8").splitlines()[: case.rows]
    texts = [json.loads(line)["prompt"] for line in lines]
    if not case.shared:
        chats = [[{"role": "user", "content": text}] for text in texts]
        rendered = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        return model, "SmolLM2-135M", [tokenizer(text)["input_ids"] for text in rendered]
    page = torch.randint(5, 40_000, (case.shared,), generator=generator).tolist()
    texts = [texts[row % len(texts)] for row in range(case.rows)]
    return model, "SmolLM2-135M", [page + tokenizer(text)["input_ids"] for text in texts]


def ours(model: Any, prompts: Prompts, tokens: int, *, static: bool | None = None) -> None:
    uniform = torch.rand(len(prompts), tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with seam.scoring_mode(model):
        decode(model, prompts, uniform, stop_token_ids=(-1,), temperature=1.0, top_p=1.0, static=static)


@torch.no_grad()
def theirs(model: Any, prompts: Prompts, tokens: int, *, shared: int = 0, **options: Any) -> None:
    """shared: tokens that are read once, into a cache that is then repeated for every row."""
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    if shared:
        from transformers import DynamicCache

        # Padding stands behind what is shared.
        ids = torch.tensor([[*row[:shared], *[0] * (longest - len(row)), *row[shared:]] for row in prompts])
        mask = torch.tensor([[1] * shared + [0] * (longest - len(row)) + [1] * (len(row) - shared) for row in prompts])
        cache = DynamicCache(config=model.config)
        model.base_model(input_ids=ids[:1, :shared].to(device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
        options["past_key_values"] = cache
    with sdpa_without_cudnn():
        model.generate(ids.to(device), attention_mask=mask.to(device), do_sample=True, top_k=0, temperature=1.0,
                       min_new_tokens=tokens, max_new_tokens=tokens, **options)  # fmt: skip


class Count(TorchDispatchMode):
    """How many operators are called, and how many of them make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        self.waits += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero")
        return function(*args, **(kwargs or {}))


def counted(call: Callable[[int], Any]) -> Values:
    """The difference between two lengths, so that prompts do not count."""
    counts = []
    for tokens in (2, 34):
        with Count() as counter:
            call(tokens)
        counts.append(counter)
    few, many = counts
    return {
        "calls": value((many.calls - few.calls) / 32, "aten calls/token"),
        "waits": value((many.waits - few.waits) / 32, "waits/token"),
    }
