"""Whole training steps of several trainers side by side, each in processes of its own, in turns.

One step is an optimizer step on a context: fresh answers, both models' forwards, the loss, backward and the update.
Ours, and TRL's SDFTTrainer on the same model, prompts, context, LoRA and sampling settings (`step_worker`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import environment
from benchmarks.gpu.phases import PEERS, TRAINING
from benchmarks.measure import Failure, interleaved, spread
from benchmarks.schema import Row, value
from benchmarks.session import Session
from benchmarks.step_cases import Case

OURS, PEER = "opcd_fast", "trl-sdft"
TRAINERS = (OURS, PEER, "opcd_fast in trl", "trl-sdft, our loss")


def measure(
    session: Session, case: Case, *, trainers: Sequence[str] = TRAINERS, steps: int = 3, rounds: int = 2
) -> dict[str, Row]:
    """A row for each trainer, from `rounds` processes of `steps` timed steps; later rounds only while there is time."""
    settings = {"model": case.model, "dtype": case.dtype, "checkpointing": "yes" if case.checkpointing else "no"}
    shape = {"prompts": case.prompts, "tokens": case.tokens}
    rows = {name: Row(session.table, case.name, name, case.group, shape=dict(shape), settings=dict(settings))
            for name in trainers}  # fmt: skip
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in trainers}

    def sample(name: str) -> list[float] | Failure:
        begin = time.monotonic()
        if session.left() <= 0:
            return [] if told[name] else Failure("skipped", "no time was left (--limit-seconds)")
        outcome = one_process(case, name, session.device, steps, timeout=session.left() + 300)
        rows[name].seconds += time.monotonic() - begin
        if isinstance(outcome, Failure):
            return outcome
        told[name].append(outcome)
        times: list[float] = outcome["ms"]
        return times

    todo = {name: partial(sample, name) for name, row in rows.items() if row.name not in session.names}
    found = interleaved(todo, seconds=0.0, min_rounds=rounds, max_rounds=rounds)
    for name in todo:
        row, outcome = rows[name], found[name]
        _fill(row, told[name], session.head().device.count_of_processors)
        if isinstance(outcome, Failure):
            late = f"a later process {outcome.status}: {outcome.note}"
            row.status, row.note = ("ok", late) if told[name] else (outcome.status, outcome.note)
        session.write(row)
    return rows


def _fill(row: Row, told: list[dict[str, Any]], threads: int | None) -> None:
    """From what its processes said. Raises ValueError where they had other threads than the rest: no comparison."""
    if not told:
        return
    row.shape["context"] = told[0]["context"]
    if others := {one["threads"] for one in told} - {threads}:
        raise ValueError(f"{row.name} ran on {others.pop()} threads, the table on {threads}")
    row.values["time"] = spread([ms for one in told for ms in one["ms"]])
    row.values["answer_tokens"] = value(statistics.mean(t for one in told for t in one["answer_tokens"]), "1")
    row.values["peak"] = value(max(one["peak_bytes"] for one in told), "bytes")
    parts = [part for one in told for part in one["parts"]]
    for name in parts[0] if parts else ():
        row.values[name] = value(1e3 * statistics.mean(part[name] for part in parts), "ms")


def one_process(
    case: Case, trainer: str, device: torch.device, steps: int, timeout: float
) -> dict[str, Any] | Failure:
    """What the worker printed, or why it did not."""
    command = [sys.executable, "-m", "benchmarks.step_worker", case.name, trainer, "--steps", str(steps),
               "--device", str(device)]  # fmt: skip
    settings = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **TRAINING,
                **(PEERS if trainer != OURS else {})}  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **settings},
                              cwd=environment.ROOT)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Failure("timeout", f"stopped after {timeout:.0f} s")
    if done.returncode:
        last = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "no message")[:300]
        missing = "skipped" if "No module named" in last else "failed"
        return Failure("out of memory" if "OutOfMemoryError" in last else missing, last)
    outcome: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return outcome
