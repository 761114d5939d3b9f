"""The main cases once more, with the packaged and with the swept launch table. For `scripts/gpu.sh second`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import loss
from benchmarks.gpu.loss import SECONDS, main_cases
from benchmarks.gpu.sweep import KEPT
from benchmarks.measure import release
from benchmarks.schema import BOUND, Values, value
from benchmarks.session import Contender, Session, Skip
from opcd_fast.kernels.triton import launch_shapes


def run(session: Session) -> None:
    swept = Path(os.environ.get(launch_shapes.VARIABLE) or KEPT)
    session.row("swept table", lambda: _blocks(swept), settings={"file": swept.name})
    for case in main_cases(session):
        made = cache(lambda case=case: loss.Prepared(case, session.device))
        found = loss.contenders(case, session.device, made)
        ours = next(one for one in found if one.ours)
        chosen = [*(one for one in found if one.name == BOUND), _with_table(ours, "packaged", launch_shapes.PACKAGED),
                  _with_table(ours, "swept", swept)]  # fmt: skip
        session.compare(case.name, chosen, shape=loss.shape_of(case), settings=loss.settings_of(case), seconds=SECONDS)
        made.cache_clear()
        release(session.device)


def _with_table(ours: Contender, name: str, path: Path) -> Contender:
    """The launchers read the table by its file's name, at each launch."""

    def build() -> Callable[[], Any]:
        _blocks(path)
        call = ours.build()

        def with_table() -> Any:
            os.environ[launch_shapes.VARIABLE] = str(path)
            return call()

        return with_table

    return replace(ours, name=f"{ours.name}, {name} table", build=build)


def _blocks(path: Path) -> Values:
    if not path.exists():
        raise Skip(f"no such table: {launch_shapes.VARIABLE} names none, and there is no .cache/gpu/{KEPT.name}")
    table = launch_shapes.read_table(path)
    return {kernel: value(shapes[-1].block, "columns") for kernel, shapes in table.shapes.items()}
