"""What a GPU run leaves, whatever its phases do, and that the phases ask, compare and read what is right, as far as a
CPU can tell."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import models, teacher
from benchmarks.gpu import kernel_times, runner, sweep
from benchmarks.gpu.phases import DRY_SECONDS, ENDING, RUNS, SECONDS, Phase, schedule
from benchmarks.gpu.summary import LINES
from benchmarks.schema import BROKEN, Row, Value, read, value
from opcd_fast.kernels.triton import launch_shapes

ROOT = Path(__file__).resolve().parents[2]

FAKE = """
import argparse, os, subprocess, sys, time
from pathlib import Path
from benchmarks.schema import Row, append, marker, read, value
parser = argparse.ArgumentParser()
parser.add_argument("benchmark"), parser.add_argument("--phase"), parser.add_argument("--seconds", type=float)
parser.add_argument("--dry-run", action="store_true"), parser.add_argument("--out", type=Path)
options = parser.parse_args()
name, out = options.phase, options.out
earlier = len(read(out).of(name))
append(out, Row(name, f"row {earlier}", values={"time": value(1.5, "ms")}))
if name == "hangs":
    marker(out).write_text("the row it hangs in")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out.parent / "grandchild").write_text(str(child.pid))
    time.sleep(600)
if name == "crashes":
    with out.open("a") as file:
        file.write('{"table": "crashes", "na')
    print("first line", file=sys.stderr)
    sys.exit("ValueError: the reason")
if name == "breaks" and not earlier:
    sys.exit(75)
if name == "dies" and not earlier:
    marker(out).write_text("the row it dies of")
    print("LLVM ERROR: no", file=sys.stderr, flush=True)
    os.abort()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A module in place of the phases, and where it is found."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fake_phases.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return "fake_phases"


def run_of(folder):
    (path,) = folder.glob("gpu_first_*.jsonl")
    return read(path)


# --- the runner ---------------------------------------------------------------------------------------------


def test_a_phase_that_hangs_crashes_or_breaks_the_device_costs_no_other_its_results(
    fake, tmp_path, monkeypatch, capsys
):
    names = ("first", "hangs", "crashes", "breaks", "dies", "last")
    ends = {"first": 5, "hangs": 6, "crashes": 40, "breaks": 60, "dies": 80, "last": 100}
    monkeypatch.setattr(runner, "schedule", lambda run: [(Phase(n, 20, "a fake"), ends[n]) for n in names])
    monkeypatch.setattr(runner, "LEAST", 1.0)
    start = time.monotonic()
    assert runner.run("first", tmp_path / "out", module=fake) == 1
    assert time.monotonic() - start < 60
    run = run_of(tmp_path / "out")
    found = {name: end.status for name, end in run.ends().items()}
    assert found == {"first": "ok", "hangs": "timeout", "crashes": "failed", "breaks": "ok", "dies": "ok", "last": "ok"}
    assert "exit status 1: ValueError: the reason" in run.ends()["crashes"].note
    assert [row.name for row in run.of("breaks")] == ["row 0", "row 1"], "it goes on behind what broke the device"
    dies = run.of("dies")
    assert [row.name for row in dies] == ["row 0", "the row it dies of", "row 2"], "and behind what broke the process"
    assert dies[1].status == "failed" and dies[1].note.endswith("status -6: LLVM ERROR: no")
    assert [(row.name, row.status) for row in run.of("hangs")][1:] == [("the row it hangs in", "timeout")]
    assert all(run.of(name)[0].values == {"time": Value(1.5, "ms")} for name in names)
    assert len(run.damaged) == 1, "the line that was cut off, and no other"
    grandchild = int((tmp_path / "out" / "grandchild").read_text())
    assert not Path(f"/proc/{grandchild}").exists() or "Z" in Path(f"/proc/{grandchild}/stat").read_text()
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("== summary"))
    assert "4 rows failed" in lines[begin] and len(lines) - begin <= LINES
    assert any("crashes end: exit status 1: ValueError" in line for line in lines[begin:])


def test_the_time_of_a_run_is_hard(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "schedule", lambda run: [(Phase(n, 60, "a fake"), 600) for n in ("hangs", "last")])
    monkeypatch.setattr(runner, "LEAST", 2.0)
    start = time.monotonic()
    assert runner.run("first", tmp_path, module=fake, seconds=runner.ENDING + 3.0) == 1
    assert time.monotonic() - start < ENDING + 3
    ends = run_of(tmp_path).ends()
    assert ends["hangs"].status == "timeout"
    assert ends["last"].status == "skipped" and "s were left" in ends["last"].note


def test_a_run_that_is_asked_to_end_leaves_its_rows_and_no_process(fake, tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from benchmarks.gpu import runner; from benchmarks.gpu.phases import Phase\n"
        "runner.schedule = lambda run: [(Phase(n, 60, 'a fake'), 600) for n in ('hangs', 'last')]\n"
        f"sys.exit(runner.run('first', Path({str(tmp_path)!r}), module={fake!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "grandchild").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=30)
    assert child.returncode == 1
    assert "0 of 2 phases" in out and "hangs      not reached" in out and "row 0 1.5 ms" in out
    assert not list(tmp_path.glob("*.row"))
    grandchild = int((tmp_path / "grandchild").read_text())
    assert not Path(f"/proc/{grandchild}").exists() or "Z" in Path(f"/proc/{grandchild}/stat").read_text()


def test_the_phases_fit_into_a_lease():
    """15 minutes, of which one command may take 10; whatever hangs."""
    assert SECONDS["first"] + SECONDS["second"] < 15 * 60 and SECONDS["first"] < 10 * 60 and DRY_SECONDS < 6 * 60
    for name, phases in RUNS.items():
        assert schedule(name)[-1][1] + ENDING <= SECONDS[name]
        assert len({phase.name for phase in phases}) == len(phases)
    script = (ROOT / "scripts" / "gpu.sh").read_text(encoding="utf-8")
    for said in (f"total={SECONDS['first']} ", f"total={SECONDS['second']} ", f"total={DRY_SECONDS} "):
        assert said in script


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_the_script_says_where_there_is_no_device():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu.sh")], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 2 and "no CUDA driver" in done.stderr


# --- the phases --------------------------------------------------------------------------------------------


class Recorded:
    """A session on a device that is not there: rows are noted, not measured."""

    table, device, dry, folder = "t", torch.device("cuda"), False, Path("nowhere")

    def __init__(self):
        self.names = []

    def row(self, name, measure, *, shape=None, settings=None, group="", needs=0.0, of=""):
        assert callable(measure) and all(type(size) is int for size in (shape or {}).values())
        name = Row("t", name, of).name
        assert name not in self.names and 0 <= needs < 60
        self.names.append(name)
        return {"time": value(1.0, "ms"), "flops": value(1.0, "FLOP")}

    def compare(self, case, contenders, *, shape, settings, seconds, only=(), **_):
        assert all(type(size) is int for size in shape.values())
        contenders = [one for one in contenders if not only or one.name in only]
        self.names += [f"{case}, {one.name}" for one in contenders]
        return {one.name: Row("t", case, one.name, shape=dict(shape)) for one in contenders}

    def left(self):
        return 100.0


@pytest.mark.parametrize("phase", sorted({phase.name for phases in RUNS.values() for phase in phases}))
def test_what_a_phase_asks_of_a_device_can_be_built(phase, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    name, *options = next(one.command for phases in RUNS.values() for one in phases if one.name == phase)
    module = importlib.import_module(f"benchmarks.{name}")
    recorded, tables = Recorded(), []
    if phase == "sweep":
        monkeypatch.setattr(module, "_write", lambda *arguments: tables.append(arguments))
    if phase == "teacher":
        tiny = models.random_model(models.SHAPES["tiny Llama"], torch.float32, torch.device("cpu"))
        monkeypatch.setattr(teacher, "make_model", lambda *_: (tiny, "m"))
        monkeypatch.setattr(teacher, "reference", lambda *_: None)
    module.run(recorded, **command_line.options_of(module.run, options))
    least = {"smoke": 3, "accuracy": 15, "loss": 22, "sweep": 30, "decoding": 9, "teacher": 5, "retimed": 13}
    assert len(recorded.names) >= least.get(phase, 1), recorded.names
    if phase == "sweep":
        assert len(tables) == len(launch_shapes.KERNELS), "a table after every kernel, for a run that is cut off"
    if phase == "loss":
        for name in ("trl", "opcd_fast-triton", "gemms", "parts"):
            assert sum(name in row for row in recorded.names) == 4


def test_the_settings_of_the_steps_are_ones_a_run_takes(tmp_path):
    from benchmarks.gpu.consumer import JOB
    from benchmarks.step_cases import cases
    from benchmarks.step_worker import opcd_settings
    from opcd_fast import OPCDConfig

    for case in (JOB, *cases(torch.device("cuda"), dry=True), *cases(torch.device("cuda"), dry=False)):
        settings = opcd_settings(case, tmp_path, 3, "cuda", rollout_batch=case.prompts)
        assert OPCDConfig(**settings).micro_batch_tokens == case.micro_batch_tokens


def test_the_cheapest_phases_run_dry(tmp_path):
    """As on a device, in processes of their own, tiny shapes; the sweep's table is one that the launchers read."""
    kept = sweep.KEPT.read_bytes() if sweep.KEPT.exists() else None
    command = [sys.executable, "-m", "benchmarks", "first", "--dry-run", "--only", "ceilings,sweep",
               "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    run = run_of(tmp_path)
    assert {name: end.status for name, end in run.ends().items()} == {"ceilings": "ok", "sweep": "ok"}
    assert {row.name for row in run.of("ceilings") if row.status == "ok"} == {"copy", "product", "host"}
    swept = run.of("sweep")
    assert all(row.status == "ok" for row in swept) and len(swept) == 2 * 4 + 1
    table = launch_shapes.read_table(tmp_path / "launch_shapes.json")
    times = {row.name: row.get("time") for row in swept if "merge_attention" in row.name}
    best = min(times, key=times.get).partition(", ")[2]
    assert best == "{} x {}".format(*table.shapes["merge_attention"][-1][1:])
    assert kept == (sweep.KEPT.read_bytes() if sweep.KEPT.exists() else None), "a dry run's table launches nothing"


def test_the_shapes_of_a_sweep_are_ones_the_launchers_take():
    swept = {"divergence_rows": sweep.WIDE, "logprob_rows": sweep.SOME, "merge_attention": sweep.TILES}
    for kernel, shapes in swept.items():
        packaged = launch_shapes.read_table(launch_shapes.PACKAGED).shapes[kernel][-1]
        assert shapes[0] == (packaged.block, packaged.warps), "the others are compared with what is launched today"
        for block, warps in shapes:
            with launch_shapes.forced_shape(kernel, block, warps):
                assert launch_shapes.launch_shape(kernel, 10) == (block, warps)


TESTS = """
import os, pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="no such kernel")
def test_skipped(): pass
def test_breaks(): raise RuntimeError("CUDA error")
def test_dies():
    os.abort()
def test_last(): pass
"""
DRIVER = """
import sys
from pathlib import Path
import torch
from benchmarks.gpu import gpu_tests
from benchmarks.session import Session
Session.broken = lambda self: "breaks" in list(self._done)[-1]
one = Session("gpu_tests", Path(sys.argv[1]), device=torch.device("cpu"), dry=True, seconds=60.0)
one.row("pytest", lambda: gpu_tests._pytest(one, ["-p", "no:cacheprovider", "-c", "/dev/null", sys.argv[2]]))
"""


def test_a_test_that_breaks_the_device_or_the_process_costs_the_others_nothing(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    lines = tmp_path / "gpu.jsonl"
    phase, statuses = Phase("gpu_tests", 60, "tests"), []
    for _ in range(3):
        command = [sys.executable, "-c", DRIVER, str(lines), str(tmp_path / "test_some.py")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        runner._unwritten(phase, lines, done.returncode, "Aborted")
        statuses.append(done.returncode)
    assert statuses == [BROKEN, -signal.SIGABRT, 0], done.stderr
    rows = {row.name.rpartition("::")[2]: row for row in read(lines).of("gpu_tests")}
    found = {name: row.status for name, row in rows.items()}
    assert found == {"test_good": "ok", "test_bad": "failed", "test_skipped": "skipped", "test_breaks": "failed",
                     "test_dies": "failed", "test_last": "ok", "pytest": "ok"}  # fmt: skip
    assert "assert 1 == 2" in rows["test_bad"].note and rows["test_skipped"].note == "Skipped: no such kernel"
    assert rows["test_dies"].note == "the process ended with status -6: Aborted"


def test_a_devices_profile_counts_what_ran_there():
    def event(key, device, micros, count):
        return SimpleNamespace(key=key, device_type=f"DeviceType.{device}", self_device_time_total=micros, count=count)

    events = [event("_terms_kernel", "CUDA", 700.0, 16), event("nvjet_tst_256x128", "CUDA", 2000.0, 64),
              event("aten::mm", "CPU", 9e9, 64), event("flash_fwd_kernel", "CUDA", 10.0, 1)]  # fmt: skip
    values = kernel_times.summed(SimpleNamespace(key_averages=lambda: events), torch.device("cuda"))
    assert values["products"] == Value(2.0, "ms") and values["our kernels"] == Value(0.7, "ms")
    assert values["attention"] == Value(0.01, "ms") and values["launches"] == Value(81.0, "1")
    assert next(iter(values)) == "products" and "64 x nvjet_tst_256x128" in values
    with pytest.raises(RuntimeError, match="no kernel"):
        kernel_times.summed(SimpleNamespace(key_averages=lambda: events[2:3]), torch.device("cuda"))
