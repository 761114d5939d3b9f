"""What no device has run yet, once: the tests of every kernel of ours against float64, the decoding loop, a training
step. What fails here explains what fails later."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import gpu_tests
from benchmarks.models import SHAPES, random_model
from benchmarks.schema import Values, value
from benchmarks.session import Session, Wrong
from benchmarks.step_cases import cases, make_job
from benchmarks.step_worker import Steps, opcd
from opcd_fast import TransformersRollout


def run(session: Session) -> None:
    session.row("decoding, ragged prompts", lambda: _loop(session), settings={"model": "tiny Llama"})
    session.row("a training step", lambda: _step(session), settings={"model": "tiny Llama"})
    gpu_tests.rows_of(session, gpu_tests.KERNELS, f"not ({gpu_tests.COMPILED})")


def _loop(session: Session) -> Values:
    """The decoding loop, its masked prefill with shared heads included: it checks itself against plain forward passes
    at its first call, and steps down where they differ."""
    model = random_model(SHAPES["tiny Llama"], torch.bfloat16, session.device)
    rollout = TransformersRollout(model, stop_token_ids=[2**31 - 1])  # every answer is as long as the limit
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 200, (length,), generator=draw).tolist() for length in (9, 3, 40, 17)]
    answers = rollout.generate(prompts, max_new_tokens=5)
    if "engine: decode" not in rollout.explain():
        raise Wrong(rollout.explain(), {})
    return {"tokens": value(sum(len(answer.token_ids) for answer in answers), "1")}


def _step(session: Session) -> Values:
    """The whole trainer on a tiny model."""
    case = cases(session.device, dry=True)[0]
    found = Steps()
    with tempfile.TemporaryDirectory() as folder:
        opcd(case, make_job(case, session.device), Path(folder), 2, found)()
    return {"step": value(1e3 * (found.ended[1] - found.ended[0]), "ms"), "tokens": value(found.tokens[-1], "1")}
