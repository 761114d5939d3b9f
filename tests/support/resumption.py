"""A run that was stopped and goes on must be the run that was never stopped, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def check_resume(make: Callable[..., Any], folder: Path) -> tuple[Any, Any]:
    """Two steps, then the rest in a trainer of its own: losses and weights of the whole run.

    make(output_dir, **settings) gives a trainer of more than two steps. Returns the whole run's trainer and result.
    """
    whole = make(folder / "whole")
    wanted = whole.train()
    make(folder / "run", steps=2).train()
    resumed = make(folder / "run", resume=True)
    got = resumed.train()
    assert [r["loss"] for r in got.history] == [r["loss"] for r in wanted.history]
    assert len(wanted.history) > 2 and wanted.history[-1]["loss"] != wanted.history[0]["loss"]
    assert list(whole.parameters) == list(resumed.parameters)
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    return whole, wanted


def cut_and_resumed(make: Callable[..., Any], folder: Path, moment: tuple[str, int]) -> Any:
    """The result of a run that an error ended right after the record of `moment`, (kind, step), and that went on."""

    class Killed(Exception):
        pass

    def kill(record: dict[str, Any]) -> None:
        if (record["kind"], record["step"]) == moment:
            raise Killed

    with pytest.raises(Killed):
        make(folder, callbacks=[kill]).train()
    return make(folder, resume=True).train()
