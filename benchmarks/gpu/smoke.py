"""Every call of ours that no device has made yet, once, against float64. What fails here explains what fails later."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import gpu_tests, launches
from benchmarks.gpu.launches import GRADIENT_ERROR, VALUE_ERROR, Launch
from benchmarks.schema import Values, value
from benchmarks.session import Session, Wrong
from benchmarks.step_cases import SHAPES, cases, make_job, random_model
from benchmarks.step_worker import Steps, opcd
from opcd_fast import TransformersRollout

OTHERS = ("forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl", "gated_kl")


def run(session: Session) -> None:
    # N no multiple of 128, V none of 8.
    n, v = (5, 1003) if session.dry else (259, 32_003)
    _kernels(session, n, v)
    session.row("decoding, ragged prompts", lambda: _loop(session), settings={"model": "tiny Llama"})
    session.row("a training step", lambda: _step(session), settings={"model": "tiny Llama"})
    gpu_tests.rows_of(session, gpu_tests.KERNELS, f"not ({gpu_tests.COMPILED})")


def _kernels(session: Session, n: int, v: int) -> None:
    device = session.device
    few = min(n, 40)
    heads, width = (3, 16) if session.dry else (12, 128)
    rows: list[tuple[str, Callable[[], Launch], dict[str, int]]] = [
        ("reverse KL", lambda: launches.reverse_kl(device, n, v), {"n": n, "V": v}),
        ("reverse KL, softcap and bias", lambda: launches.reverse_kl(device, few, v, 5.0), {"n": few, "V": v}),
        ("gated KL, a program a row", lambda: launches.reverse_kl(device, n, v, gated=True), {"n": n, "V": v}),
        ("reverse KL, split rows", lambda: launches.divergence(device, few, v, "reverse_kl"), {"n": few, "V": v}),
        *((name.replace("_", " "), partial(launches.divergence, device, few, v, name), {"n": few, "V": v})
          for name in OTHERS),
        ("logprob", lambda: launches.logprob(device, n, v), {"n": n, "V": v}),
        ("merge", lambda: launches.merge(device, n, heads, width), {"n": n, "heads": heads, "width": width}),
    ]  # fmt: skip
    for name, build, shape in rows:
        session.row(f"kernel: {name}", partial(_kernel, build), shape=shape)


def _kernel(build: Callable[[], Launch]) -> Values:
    launch = build()
    launch.call()
    rounded, exact = launch.error()
    values = {"gradient": value(rounded, "1"), "value": value(exact, "1")}
    if not (rounded <= GRADIENT_ERROR and exact <= VALUE_ERROR):
        raise Wrong(f"errors {rounded:.1e} and {exact:.1e}; at most {GRADIENT_ERROR} and {VALUE_ERROR}", values)
    return values


def _loop(session: Session) -> Values:
    """The decoding loop, its masked prefill with shared heads included: it checks itself against plain forward passes
    at its first call, and steps down where they differ."""
    rollout = TransformersRollout(random_model(SHAPES["tiny Llama"], torch.bfloat16, session.device),
                                  stop_token_ids=(-1,))  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 200, (length,), generator=draw).tolist() for length in (9, 3, 40, 17)]
    answers = rollout.generate(prompts, max_new_tokens=5)
    if "engine: decode" not in rollout.explain():
        raise Wrong(rollout.explain(), {})
    return {"tokens": value(sum(len(answer.token_ids) for answer in answers), "1")}


def _step(session: Session) -> Values:
    """The whole trainer on a tiny model."""
    case = cases(session.device, quick=True)[0]
    found = Steps()
    with tempfile.TemporaryDirectory() as folder:
        opcd(case, make_job(case, session.device), Path(folder), 2, found)()
    return {"step": value(1e3 * (found.ended[1] - found.ended[0]), "ms"), "tokens": value(found.tokens[-1], "1")}
