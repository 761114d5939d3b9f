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
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.environment import ROOT
from benchmarks.gpu.phases import PEERS, TRAINING
from benchmarks.measure import spread
from benchmarks.schema import Row, value
from benchmarks.session import Failed, Session, in_groups
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
    settings = {"model": case.model, "dtype": case.dtype, "checkpointing": "yes" if case.checkpointing else "no"}
    shape = {"prompts": case.prompts, "tokens": case.tokens}
    every = [Row(session.table, case.name, name, case.group, shape=dict(shape), settings=dict(settings))
             for name in trainers]  # fmt: skip
    done = {row.name for row in session.rows}
    rows = {row.implementation: row for row in every if row.name not in done}
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for turn in range(rounds):
        for name, row in rows.items():
            if row.status == "ok" and (turn == 0 or session.left() > 0):
                ask = partial(one_process, case, name, session.device, steps, timeout=session.left() + 300)
                outcome = session.tried(row, ask)
                told[name] += [] if outcome is None else [outcome]
    for name, row in rows.items():
        if told[name]:
            if row.status != "ok":
                row.status, row.note = "ok", f"a later process {row.status}: {row.note}"
            _fill(row, told[name], session.head().device.count_of_processors)
        session.write(row)
    return rows


def _fill(row: Row, told: list[dict[str, Any]], threads: int | None) -> None:
    """From what its processes said. Raises ValueError where they had other threads than the rest: no comparison."""
    row.shape["context"] = told[0]["context"]
    if others := {one["threads"] for one in told} - {threads}:
        raise ValueError(f"{row.name} ran on {others.pop()} threads, the table on {threads}")
    parts = [part for one in told for part in one["parts"]]
    row.values = {
        "time": spread([ms for one in told for ms in one["ms"]]),
        "answer_tokens": value(statistics.mean(t for one in told for t in one["answer_tokens"]), "1"),
        "peak": value(max(one["peak_bytes"] for one in told), "bytes"),
        **{name: value(1e3 * statistics.mean(part[name] for part in parts), "ms") for name in (parts or [{}])[0]},
    }


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
