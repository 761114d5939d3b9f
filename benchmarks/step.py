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

from benchmarks.environment import ROOT
from benchmarks.gpu.phases import PEERS, TRAINING
from benchmarks.measure import interleaved
from benchmarks.schema import Row, value
from benchmarks.session import Failed, Session, Skip, in_groups
from benchmarks.step_cases import Case, cases

OURS, PEER = "opcd_fast", "trl-sdft"
TRAINERS = (OURS, PEER, "opcd_fast in trl", "trl-sdft, our loss")


def run(session: Session, *, groups: tuple[str, ...] = (), trainers: tuple[str, ...] = TRAINERS, steps: int = 3,
        rounds: int = 2) -> None:  # fmt: skip
    """groups: main, dtype, checkpointing. steps: timed ones of each process, after one more. rounds: processes of each
    trainer; later ones are started only while there is time."""
    if unknown := [name for name in trainers if name not in TRAINERS]:
        raise ValueError(f"trainers: {unknown[0]!r} is none of {', '.join(map(repr, TRAINERS))}")
    if steps < 1 or rounds < 1:
        raise ValueError(f"steps and rounds must be at least 1; got {steps} and {rounds}")
    for case in in_groups(cases(session.device, session.dry), groups):
        measure(session, case, trainers, steps, rounds)


def measure(session: Session, case: Case, trainers: Sequence[str], steps: int, rounds: int) -> dict[str, Row]:
    """A row for each trainer."""
    shape = {"prompts": case.prompts, "tokens": case.tokens}
    settings = {"model": case.model, "dtype": case.dtype, "checkpointing": "yes" if case.checkpointing else "no"}
    rows = {name: Row(session.table, case.name, name, case.group, shape=dict(shape), settings=dict(settings))
            for name in trainers}  # fmt: skip
    done = {row.name for row in session.rows}
    rows = {name: row for name, row in rows.items() if row.name not in done}
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}

    def process(name: str) -> dict[str, Any]:
        if session.left() <= 0:
            raise Skip("no time was left (--seconds)")
        return one_process(case, name, session.device, steps, timeout=session.left() + 300)

    def sample(name: str) -> list[float] | None:
        if told[name] and session.left() <= 0:
            return []
        begin = time.monotonic()
        outcome = session.guarded(rows[name], partial(process, name))
        rows[name].seconds += time.monotonic() - begin
        told[name] += [] if outcome is None else [outcome]
        return None if outcome is None else outcome["ms"]

    times = interleaved({name: partial(sample, name) for name in rows}, seconds=0.0, min_rounds=rounds,
                        max_rounds=rounds)  # fmt: skip
    for name, row in rows.items():
        if told[name]:
            if row.status != "ok":
                row.status, row.note = "ok", f"a later process {row.status}: {row.note}"
            row.values["time"] = times[name]
            _fill(row, told[name], session.head().device.count_of_processors)
        session.write(row)
    return rows


def _fill(row: Row, told: list[dict[str, Any]], threads: int | None) -> None:
    """From what its processes said. Raises ValueError where they had other threads than the rest: no comparison."""
    row.shape["context"] = told[0]["context"]
    if others := {one["threads"] for one in told} - {threads}:
        raise ValueError(f"{row.name} ran on {others.pop()} threads, the table on {threads}")
    row.values["answer_tokens"] = value(statistics.mean(t for one in told for t in one["answer_tokens"]), "1")
    row.values["peak"] = value(max(one["peak_bytes"] for one in told), "bytes")
    parts = [part for one in told for part in one["parts"]]
    for name in parts[0] if parts else ():
        row.values[name] = value(1e3 * statistics.mean(part[name] for part in parts), "ms")


def one_process(case: Case, trainer: str, device: torch.device, steps: int, timeout: float) -> dict[str, Any]:
    """What the worker printed. Raises Failed where it did not end well."""
    command = [sys.executable, "-m", "benchmarks.step_worker", case.name, trainer, str(steps), str(device)]
    settings = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **TRAINING,
                **(PEERS if trainer != OURS else {})}  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **settings},
                              cwd=ROOT)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed("timeout", f"stopped after {timeout:.0f} s") from None
    if done.returncode:
        last = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "no message")[:300]
        missing = "skipped" if "No module named" in last else "failed"
        raise Failed("out of memory" if "OutOfMemoryError" in last else missing, last)
    outcome: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return outcome
