"""The main cases once more, with the packaged and with the swept launch table. For `scripts/gpu.sh second`."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path

from benchmarks.gpu.loss import time_row
from benchmarks.gpu.session import Session, Skip, Values
from benchmarks.gpu.sweep import KEPT
from benchmarks.loss_cases import KLS, cases, make_inputs
from benchmarks.loss_implementations import implementations
from benchmarks.measure import release
from benchmarks.phase_rows import value
from benchmarks.schema import BOUND, OURS
from opcd_fast.kernels.triton import launch_shapes


def run(session: Session) -> None:
    swept = Path(os.environ.get(launch_shapes.VARIABLE) or KEPT)
    session.row("swept table", lambda: _check(session, swept), settings={"file": swept.name})
    main = [case for case in cases(session.device, session.dry) if case.group == "main"]
    for case in main[: 2 if session.dry else 4]:
        inputs = cache(partial(make_inputs, case, session.device, KLS[0]))
        found = {one.name: one for one in implementations(case, session.device)}
        bound = time_row(session, f"{case.name}, {BOUND}", case, found[BOUND], inputs, None)
        ours = next(found[name] for name in OURS if name in found)
        tables = {"packaged": launch_shapes.PACKAGED, "swept": swept}
        for name, path in tables.items():
            if path.exists():  # read anew: the launchers keep what they have read by the file's name
                os.environ[launch_shapes.VARIABLE] = str(path)
                time_row(session, f"{case.name}, {name} table", case, ours, inputs, bound, table=name)
        inputs.cache_clear()
        release(session.device)


def _check(session: Session, path: Path) -> Values:
    if not path.exists():
        raise Skip(f"no swept table: {launch_shapes.VARIABLE} names none, and there is no .cache/gpu/{KEPT.name}")
    table = launch_shapes.read_table(path)
    return {kernel: value(shapes[-1].block, "columns") for kernel, shapes in table.shapes.items()}
