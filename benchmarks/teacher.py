"""The ways to get the hidden states of many answers after one context that are timed side by side, and how they are
measured.

Each returns (B * S, D), in the order of the answers. "Built" ones read the context before the clock starts, as a
frozen teacher does once for a whole run; "rebuilt" ones read it in every call, as a teacher that moves has to.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import spread, wait
from benchmarks.schema import BOUND, Values, value
from benchmarks.session import Contender, Session, in_groups
from benchmarks.teacher_cases import Setting, cases, make_model, make_setting, reference
from benchmarks.teacher_model import concat_flops, shared_flops
from opcd_fast import ContextTeacher
from opcd_fast.models import seam

CONCAT_TOKENS = 65_536  # run at once; what they need beside the weights stays below half of a large GPU
CHECK = "self-verification"


def run(session: Session, *, groups: tuple[str, ...] = (), only: tuple[str, ...] = (), layers: int = 0,
        case_seconds: float = 8.0) -> None:  # fmt: skip
    """groups: main, context, response, batch. only: implementations. layers: of the model on a GPU; 0: all of them.
    case_seconds: of timing a case; 3 rounds at least."""
    chosen = in_groups(cases(session.device, session.dry), groups)
    model, name = make_model(session.device, session.dry, layers)
    for case in chosen:
        setting = make_setting(model, case)
        session.compare(
            case.name, contenders(setting, reference(setting)), shape=shape_of(setting),
            settings=settings_of(setting, name), group=case.group, seconds=case_seconds,
            min_rounds=2 if session.device.type == "cuda" else 3, only=only,
        )  # fmt: skip
    if not groups:
        _check(session, make_setting(model, chosen[0]), name)


def _check(session: Session, setting: Setting, name: str) -> None:
    """How long path="auto" takes to check itself, at the first use of a teacher: three teachers, three times."""
    settings = settings_of(setting, name)

    def check() -> Values:
        taken = []
        for _ in range(3):
            teacher = ContextTeacher(setting.model, setting.context)
            begin = time.perf_counter()
            settings["path"] = teacher.path
            wait(setting.device)
            taken.append(1e3 * (time.perf_counter() - begin))
        return {"time": spread(taken)}

    session.row(f"{CHECK}, opcd_fast-auto", check, shape=shape_of(setting), settings=settings, group="check")


def shape_of(setting: Setting) -> dict[str, int]:
    batch, response = setting.answers.shape
    return {"context": setting.context.numel(), "response": response, "batch": batch, "layers": setting.shape.layers}


def settings_of(setting: Setting, model: str) -> dict[str, str]:
    return {"model": model, "dtype": str(setting.dtype).removeprefix("torch.")}


@dataclass
class Forward:
    call: Callable[[], Tensor]
    held: Callable[[], int]  # bytes of the context's keys and values in the latest call
    at_once: int  # sequences in one forward
    warm: Callable[[], Any] | None = None  # a shorter call that compiles what the call needs


def contenders(setting: Setting, exact: Tensor | None) -> list[Contender]:
    """What is compared in one case, in the order in which every round runs them. exact: of `reference`."""
    shape, (batch, response) = setting.shape, setting.answers.shape
    sizes = setting.context.numel(), response, batch
    built, rebuilt = (shared_flops(shape, *sizes, build=build) for build in (False, True))

    def one(name: str, make: Callable[[Setting], Forward], flops: float) -> Contender:
        made = cache(lambda: make(setting))

        def judge(hidden: Tensor) -> Values:
            values: Values = {"flops": value(flops, "FLOP"), "prefix": value(made().held(), "bytes"),
                              "one_prefix": value(setting.kv_bytes, "bytes"),
                              "at_once": value(made().at_once, "1")}  # fmt: skip
            if exact is not None:
                ends = hidden.view(batch, response, -1)[[0, -1]]
                values["max_error"] = value(float((ends.float() - exact).abs().max()), "1")
            return values

        note = None if exact is not None else "no error: float32 over so long a sequence takes minutes"
        return Contender(name, lambda: made().call, judge, note, warm=lambda: (made().warm or made().call)())

    layer = setting.answers.numel() * shape.flops_per_token // shape.layers
    return [
        one("opcd_fast-merge", partial(_ours, "merge"), built),
        one("opcd_fast-merge-rebuilt", partial(_ours, "merge", rebuild=True), rebuilt),
        one("opcd_fast-pad", partial(_ours, "pad"), built),
        one("concat", _concat, concat_flops(shape, *sizes)),
        one("transformers-cache", _cache, built),
        one("transformers-cache-rebuilt", partial(_cache, rebuild=True), rebuilt),
        Contender(BOUND, partial(_gemms, setting), lambda _: {"flops": value(layer, "FLOP")}, has_peak=False,
                  note="the products of one layer, for the answers' tokens alone"),
    ]  # fmt: skip


def _ours(path: str, setting: Setting, rebuild: bool = False) -> Forward:
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

    return Forward(call, held, batch)


def _concat(setting: Setting) -> Forward:
    """Plain transformers on context and answer together; no cache, so that no keys outlive their layer."""
    (batch, response), start = setting.answers.shape, setting.context.numel()
    at_once = max(1, min(batch, CONCAT_TOKENS // (start + response)))

    @torch.no_grad()
    def some(answers: Tensor) -> Tensor:
        ids = torch.cat([setting.context.expand(len(answers), -1), answers], 1)
        hidden = setting.body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return hidden.last_hidden_state[:, start:].flatten(0, 1)

    def call() -> Tensor:
        return torch.cat([some(answers) for answers in setting.answers.split(at_once)])

    return Forward(call, lambda: 0, at_once, partial(some, setting.answers[:at_once]))


def _cache(setting: Setting, rebuild: bool = False) -> Forward:
    """transformers' own cache: the context once, `batch_repeat_interleave`, then the answers as a batch, or as many of
    them as half of a GPU's memory holds the context's keys for."""
    at_once = len(setting.answers)
    if setting.device.type == "cuda":
        memory = torch.cuda.get_device_properties(setting.device).total_memory
        at_once = max(1, min(at_once, memory // 2 // setting.kv_bytes))
    kept = None if rebuild else _prefill(setting)
    bytes_held = 0

    @torch.no_grad()
    def call() -> Tensor:
        nonlocal bytes_held
        prefix = _prefill(setting) if kept is None else kept
        states = []
        for answers in setting.answers.split(at_once):
            # A cache of its own over the same tensors: transformers' layers replace theirs, they do not fill them.
            cache = copy.copy(prefix)
            cache.layers = [copy.copy(layer) for layer in prefix.layers]
            cache.batch_repeat_interleave(len(answers))
            bytes_held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
            given = seam.cache_argument(setting.body, cache)
            hidden = setting.body(input_ids=answers, use_cache=True, **given).last_hidden_state
            states.append(hidden.flatten(0, 1))
            del cache, given
        return torch.cat(states)

    return Forward(call, lambda: bytes_held, at_once)


@torch.no_grad()
def _prefill(setting: Setting) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=setting.model.config)
    setting.body(input_ids=setting.context[None], use_cache=True, **seam.cache_argument(setting.body, cache))
    return cache


def _gemms(setting: Setting) -> Callable[[], Tensor]:
    """The matrix products of one layer for the answers' tokens, in the model's dtype, and nothing else."""
    like: dict[str, Any] = {"dtype": setting.dtype, "device": setting.device}
    products = setting.shape.products
    inputs = {a: torch.randn(setting.answers.numel(), a, **like) for a, _ in products}
    weights = [torch.randn(b, a, **like) for a, b in products]
    outputs = {b: torch.empty(setting.answers.numel(), b, **like) for _, b in products}

    def call() -> Tensor:
        for (a, b), weight in zip(products, weights):
            torch.mm(inputs[a], weight.T, out=outputs[b])
        return next(iter(outputs.values()))

    return call
