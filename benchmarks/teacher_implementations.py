"""The ways to get the hidden states of many answers after one context that are timed side by side.

Each returns (B * S, D), in the order of the answers. "Built" ones read the context before the clock starts, as a
frozen teacher does once for a whole run; "rebuilt" ones read it in every call, as a teacher that moves has to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.schema import BOUND
from benchmarks.teacher_cases import Case, Setting
from benchmarks.teacher_model import concat_flops, shared_flops
from opcd_fast import ContextTeacher
from opcd_fast.models import seam

OURS_BUILT, OURS_REBUILT = "opcd_fast-merge", "opcd_fast-merge-rebuilt"
CONCAT = "concat"
CONCAT_TOKENS = 65_536  # run at once; what they need beside the weights stays below half of a large GPU


@dataclass
class Contender:
    call: Callable[[], Tensor]
    held: Callable[[], int]  # bytes of the context's keys and values in the latest call
    warm: Callable[[], Any] | None = None  # a shorter call that compiles what the call needs
    at_once: int | None = None  # sequences in one forward, where not all


@dataclass(frozen=True)
class Implementation:
    name: str
    build: Callable[[Setting], Contender]
    flops: float
    ours: bool = False
    skip: str | None = None  # why it cannot run here
    note: str | None = None


def implementations(case: Case, setting: Setting) -> list[Implementation]:
    """What is compared in one case, in the order in which every round runs them."""
    shape, sizes = setting.shape, (case.context, case.response, case.batch)
    built, rebuilt = (shared_flops(shape, *sizes, build=build) for build in (False, True))
    merge = Implementation(OURS_BUILT, partial(_ours, "merge"), built, ours=True)
    layer = setting.answers.numel() * shape.flops_per_token // shape.layers
    bound = Implementation(BOUND, _gemms, layer, note="the products of one layer, for the answers' tokens alone")
    if case.group == "flex":
        return [merge, Implementation("flex-mask", _flex, built, skip=_no_flex(setting)), bound]
    return [
        merge,
        Implementation(OURS_REBUILT, partial(_ours, "merge", rebuild=True), rebuilt, ours=True),
        Implementation("opcd_fast-pad", partial(_ours, "pad"), built, ours=True),
        Implementation(CONCAT, _concat, concat_flops(shape, *sizes)),
        Implementation("transformers-cache", _cache, built),
        Implementation("transformers-cache-rebuilt", partial(_cache, rebuild=True), rebuilt),
        bound,
    ]


def _ours(path: str, setting: Setting, rebuild: bool = False) -> Contender:
    teacher = ContextTeacher(setting.model, setting.context, path=path)
    batch, response = setting.answers.shape
    ids = setting.answers.reshape(-1)
    bounds = torch.arange(0, batch * response + 1, response, dtype=torch.int32)
    if not rebuild:
        _ = teacher.prefixes  # read now, not in the first call, whose memory is measured

    def call() -> Tensor:
        hidden = teacher.hidden_states_packed(ids, bounds)
        if rebuild:
            teacher.invalidate()  # after the call: the next one starts without, and its peak holds what it builds
        return hidden

    def held() -> int:
        nbytes = sum(prefix.nbytes for prefix in teacher.prefixes)
        if rebuild:
            teacher.invalidate()
        return nbytes

    return Contender(call, held)


@torch.no_grad()
def _concat(setting: Setting) -> Contender:
    """Plain transformers on context and answer together; no cache, so that no keys outlive their layer."""
    batch = setting.answers.shape[0]
    start = setting.context.numel()
    length = start + setting.answers.shape[1]
    at_once = max(1, min(batch, CONCAT_TOKENS // length))

    def some(answers: Tensor) -> Tensor:
        ids = torch.cat([setting.context.expand(len(answers), -1), answers], 1)
        with torch.no_grad():
            hidden = setting.body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return hidden.last_hidden_state[:, start:].flatten(0, 1)

    def call() -> Tensor:
        return torch.cat([some(answers) for answers in setting.answers.split(at_once)])

    return Contender(call, lambda: 0, partial(some, setting.answers[:at_once]), at_once if at_once < batch else None)


@torch.no_grad()
def _cache(setting: Setting, rebuild: bool = False) -> Contender:
    """transformers' own cache: the context once, `batch_repeat_interleave`, then the answers as a batch."""
    batch = setting.answers.shape[0]
    at_once = _repeats(setting, batch)
    kept = None if rebuild else _prefill(setting)
    bytes_held = 0

    @torch.no_grad()
    def call() -> Tensor:
        nonlocal bytes_held
        prefix = _prefill(setting) if kept is None else kept
        states = []
        for answers in setting.answers.split(at_once):
            cache = _fork(prefix)
            cache.batch_repeat_interleave(len(answers))
            bytes_held = _nbytes(cache)
            given = seam.cache_argument(setting.body, cache)
            hidden = setting.body(input_ids=answers, use_cache=True, **given).last_hidden_state
            states.append(hidden.flatten(0, 1))
            del given
            del cache
        return torch.cat(states)

    return Contender(call, lambda: bytes_held, None, at_once if at_once < batch else None)


def _prefill(setting: Setting) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=setting.model.config)
    with torch.no_grad():
        setting.body(input_ids=setting.context[None], **seam.cache_argument(setting.body, cache), use_cache=True)
    return cache


def _fork(cache: Any) -> Any:
    """A cache of its own over the same tensors: transformers' layers replace their tensors, they do not fill them."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def _nbytes(cache: Any) -> int:
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def _repeats(setting: Setting, batch: int) -> int:
    """How often the context's keys can be repeated within half of a GPU's memory; always for the batch on a CPU."""
    if setting.device.type != "cuda":
        return batch
    memory = torch.cuda.get_device_properties(setting.device).total_memory
    one = setting.shape.kv_bytes(setting.context.numel(), next(setting.body.parameters()).element_size())
    at_once = batch
    while at_once > 1 and at_once * one > memory / 2:
        at_once //= 2
    return at_once


def _no_flex(setting: Setting) -> str | None:
    if setting.device.type != "cuda":
        return "flex attention is compared on a GPU, where its kernel is compiled for it"
    return None


@torch.no_grad()
def _flex(setting: Setting) -> Contender:
    """transformers with flex attention: one packed row over a kept prefix, and a mask for who sees what."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, response = setting.answers.shape
    start, tokens = setting.context.numel(), batch * response
    kept = _prefill(setting)

    def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = key - start
        return (key < start) | ((own // response == query // response) & (own <= query) & (own >= 0))

    mask = create_block_mask(sees, None, None, tokens, start + tokens, device=str(setting.device))
    row = setting.answers.reshape(1, -1)
    positions = start + torch.arange(response, device=setting.device).repeat(batch)[None]

    @torch.no_grad()
    def call() -> Tensor:
        before = setting.model.config._attn_implementation
        setting.model.set_attn_implementation("flex_attention")
        try:
            return setting.body(
                input_ids=row, position_ids=positions, attention_mask=mask, use_cache=True,
                **seam.cache_argument(setting.body, _fork(kept)),
            ).last_hidden_state[0]  # fmt: skip
        finally:
            setting.model.set_attn_implementation(before)

    return Contender(call, lambda: _nbytes(kept))


def _gemms(setting: Setting) -> Contender:
    """The matrix products of one layer for the answers' tokens, in the model's dtype, and nothing else."""
    dtype, device = next(setting.body.parameters()).dtype, setting.device
    products = setting.shape.products
    inputs = {a: torch.randn(setting.answers.numel(), a, dtype=dtype, device=device) for a, _ in products}
    weights = [torch.randn(b, a, dtype=dtype, device=device) for a, b in products]
    outputs = {b: torch.empty(setting.answers.numel(), b, dtype=dtype, device=device) for _, b in products}

    def call() -> Tensor:
        for (a, b), weight in zip(products, weights):
            torch.mm(inputs[a], weight.T, out=outputs[b])
        return next(iter(outputs.values()))

    return Contender(call, lambda: 0)
