"""A GPU run's rows, runner and phases, as far as a CPU can tell: no phase costs another one its results."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks.gpu import counters, kernel_times, launches, runner, session  # noqa: E402
from benchmarks.gpu.phases import DRY_SECONDS, ENDING, RUNS, SECONDS, Phase, schedule  # noqa: E402
from benchmarks.gpu.session import BROKEN, Session, Skip, Wrong  # noqa: E402
from benchmarks.gpu.summary import LINES, WIDTH, summary  # noqa: E402
from benchmarks.phase_rows import PHASE, PhaseRow, Run, Value, append, parse, read, value  # noqa: E402
from opcd_fast.kernels import launch_shapes  # noqa: E402

CUDA = torch.device("cuda")
FAKE = """
import argparse, os, subprocess, sys, time
from pathlib import Path
from benchmarks.phase_rows import PhaseRow, append, read, value
parser = argparse.ArgumentParser()
parser.add_argument("name"), parser.add_argument("--out", type=Path), parser.add_argument("--seconds", type=float)
parser.add_argument("--dry-run", action="store_true")
options = parser.parse_args()
name, out = options.name, options.out
earlier = len(read(out).of(name))
append(out, PhaseRow(name, f"row {earlier}", values={"time": value(1.5, "ms")}))
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out.parent / "grandchild").write_text(str(child.pid))
    time.sleep(600)
if name == "crashes":
    with out.open("a") as file:
        file.write('{"phase": "crashes", "na')
    print("first line", file=sys.stderr)
    sys.exit("ValueError: the reason")
if name == "breaks" and not earlier:
    sys.exit(75)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A module in place of the phases, and where it is found."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fake_phases.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return "fake_phases"


def phases_of(monkeypatch, **seconds):
    """Put these in place of a run's phases."""
    monkeypatch.setattr(
        runner, "schedule", lambda run: [(Phase(name, s, "a fake"), 600) for name, s in seconds.items()]
    )


def run_of(folder):
    (path,) = folder.glob("gpu_first_*.jsonl")
    return read(path)


# --- the runner ---------------------------------------------------------------------------------------------


def test_a_phase_that_hangs_crashes_or_breaks_the_device_costs_no_other_its_results(
    fake, tmp_path, monkeypatch, capsys
):
    names = ("first", "hangs", "crashes", "breaks", "last")
    ends = {"first": 5, "hangs": 9, "crashes": 40, "breaks": 60, "last": 80}
    monkeypatch.setattr(runner, "schedule", lambda run: [(Phase(n, 20, "a fake"), ends[n]) for n in names])
    monkeypatch.setattr(runner, "LEAST", 1.0)
    start = time.monotonic()
    assert runner.run("first", tmp_path / "out", module=fake) == 1
    assert time.monotonic() - start < 60
    run = run_of(tmp_path / "out")
    found = {name: end.status for name, end in run.ends().items()}
    assert found == {"first": "ok", "hangs": "timeout", "crashes": "failed", "breaks": "ok", "last": "ok"}
    assert "exit status 1: ValueError: the reason" in run.ends()["crashes"].reason
    assert [row.name for row in run.of("breaks")] == ["row 0", "row 1"], "it goes on behind what broke the device"
    assert all(run.of(name)[0].values == {"time": Value(1.5, "ms")} for name in names)
    assert len(run.damaged) == 1, "the line that was cut off, and no other"
    grandchild = int((tmp_path / "out" / "grandchild").read_text())
    assert not Path(f"/proc/{grandchild}").exists() or "Z" in Path(f"/proc/{grandchild}/stat").read_text()
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("== summary"))
    assert "2 rows failed" in lines[begin] and len(lines) - begin <= LINES
    assert any("crashes phase: exit status 1: ValueError" in line for line in lines[begin:])


def test_the_time_of_a_run_is_hard(fake, tmp_path, monkeypatch):
    phases_of(monkeypatch, hangs=60, last=60)
    start = time.monotonic()
    assert runner.run("first", tmp_path, module=fake, seconds=runner.ENDING + 8.0) == 1
    assert time.monotonic() - start < ENDING + 8
    ends = run_of(tmp_path).ends()
    assert ends["hangs"].status == "timeout"
    assert ends["last"].status == "skipped" and "s were left" in ends["last"].reason


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
    grandchild = int((tmp_path / "grandchild").read_text())
    assert not Path(f"/proc/{grandchild}").exists() or "Z" in Path(f"/proc/{grandchild}/stat").read_text()


def test_what_comes_back_is_small_and_few(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "FILE_BYTES", 1000)
    monkeypatch.setattr(runner, "LOG_BYTES", 100)
    for name, size in (
        ("run.jsonl", 5000),
        ("huge.bin", 1001),
        ("run.log", 900),
        *((f"f{i}", 10 + i) for i in range(9)),
    ):
        (tmp_path / name).write_bytes(b"x" * size)
    gone = runner.fit(tmp_path, tmp_path / "run.jsonl")
    left = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(left) == runner.FILES == 8 and left["run.jsonl"] == 5000, "the rows are kept whatever their size"
    assert "huge.bin" not in left and {"f0", "f1"} <= set(left) and "f8" not in left
    assert any(text.startswith("huge.bin") for text in gone) and len(gone) == 4
    assert left.get("run.log", 0) < 150


def test_the_phases_fit_into_a_lease():
    """15 minutes, of which one command may take 10; whatever hangs."""
    assert SECONDS["first"] + SECONDS["second"] < 15 * 60 and SECONDS["first"] < 10 * 60 and DRY_SECONDS < 6 * 60
    for name, phases in RUNS.items():
        assert schedule(name)[-1][1] + ENDING <= SECONDS[name]
        assert len({phase.name for phase in phases}) == len(phases)
    script = (ROOT / "scripts" / "gpu.sh").read_text(encoding="utf-8")
    for said in (f"total={SECONDS['first']} ", f"total={SECONDS['second']} ", f"total={DRY_SECONDS} "):
        assert said in script


def test_the_script_refuses_unknown_arguments():
    done = subprocess.run([str(ROOT / "scripts" / "gpu.sh"), "third"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_the_script_says_where_there_is_no_device():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu.sh")], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 2 and "no CUDA driver" in done.stderr


# --- rows ---------------------------------------------------------------------------------------------------


def make_session(tmp_path, **options):
    settings = {"dry": True, "seconds": 60.0, "command": "python -m x", **options}
    return Session("smoke", tmp_path / "gpu.jsonl", **settings)


def test_a_row_that_fails_says_why_and_the_next_one_runs(tmp_path):
    one = make_session(tmp_path)
    settings = {}

    def measure():
        settings["found"] = 3
        return {"time": value(2.0, "ms"), "error": value(float("nan"), "1")}

    assert one.row("good", measure, shape={"N": 4}, settings=settings)["time"] == Value(2.0, "ms")
    assert one.row("broken", lambda: 1 / 0) is None
    assert one.row("missing", lambda: (_ for _ in ()).throw(Skip("no such thing"))) is None
    assert one.row("wrong", lambda: (_ for _ in ()).throw(Wrong("too far off", {"error": value(0.5, "1")}))) is None
    assert one.row("late", measure, needs=1000.0) is None
    run = read(tmp_path / "gpu.jsonl")
    assert run.heads["smoke"].device.kind == "cpu" and run.heads["smoke"].versions["torch"]
    found = {row.name: row for row in run.rows}
    assert found["good"].settings == {"found": "3"} and found["good"].values["error"].value is None
    assert found["broken"].status == "failed" and "ZeroDivisionError" in found["broken"].reason
    assert found["missing"].status == "skipped" and found["missing"].reason == "no such thing"
    assert found["wrong"].status == "failed" and found["wrong"].values == {"error": Value(0.5, "1")}
    assert found["late"].status == "skipped" and "it takes 1000" in found["late"].reason


def test_a_broken_context_ends_the_process_and_the_next_one_goes_on_behind_it(tmp_path, monkeypatch):
    ran = []

    def measure(name):
        ran.append(name)
        if name == "breaks":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"time": value(1.0, "ms")}

    def phase(one):
        return [one.row(name, lambda name=name: measure(name)) for name in ("before", "breaks", "after")]

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(session.Session, "broken", lambda self: True)
        phase(make_session(tmp_path))
    assert stop.value.code == BROKEN == runner.BROKEN
    assert phase(make_session(tmp_path)) == [{"time": Value(1.0, "ms")}, None, {"time": Value(1.0, "ms")}]
    assert ran == ["before", "breaks", "after"]
    run = read(tmp_path / "gpu.jsonl")
    assert "the CUDA context is broken" in run.rows[1].reason and len(run.heads) == 1


def test_lines_survive_a_kill(tmp_path):
    path = tmp_path / "gpu.jsonl"
    rows = [PhaseRow("loss", f"row {i}", values={"time": value(i, "ms")}) for i in range(3)]
    for row in rows[:2]:
        append(path, row)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # killed in the middle of a line
    assert read(path).rows == rows[:1] and read(path).damaged == [2]
    append(path, rows[2])
    assert read(path).rows == [rows[0], rows[2]] and read(path).damaged == [2]
    assert read(tmp_path / "none.jsonl") == Run()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"status": "slow"}, "status is 'slow'"),
        ({"status": "failed"}, "reason must say why"),
        ({"speed": 3}, "unknown field 'speed'"),
        ({"values": {"time": {"value": -1.0, "unit": "ms"}}}, "not negative"),
        ({"values": {"time": {"value": 1.0, "unit": ""}}}, "needs a unit"),
        ({"values": {"time": 1.0}}, "expected an object"),
        ({"shape": {"N": "4"}}, "'N'"),
        ({"kind": "note"}, "neither a head nor a row"),
        ({"name": ""}, "needs a phase and a name"),
    ],
)
def test_the_schema_refuses(change, named):
    good = dataclasses.asdict(PhaseRow("loss", "a row", values={"time": value(1.0, "ms")}, shape={"N": 4}))
    assert parse([json.dumps(good)], "x").rows[0].shape == {"N": 4}
    with pytest.raises(ValueError, match=named):
        parse([json.dumps({**good, **change})], "x")
    with pytest.raises(ValueError, match="twice"):
        parse([json.dumps(good)] * 2, "x")


def test_the_summary_is_short_and_names_what_failed(tmp_path):
    rows = [PhaseRow("loss", f"a case with a long name {i}", "failed", f"reason {i} " * 40) for i in range(99)]
    rows += [PhaseRow("smoke", f"row {i}", values={"time": value(i, "ms")}) for i in range(99)]
    rows += [PhaseRow("smoke", PHASE, seconds=3.0), PhaseRow("loss", PHASE, "timeout", "stopped after 92 s", 92.0)]
    lines = summary(Run(rows=rows, damaged=[7]), [phase.name for phase in RUNS["first"]], tmp_path, 431.0, ["big.bin"])
    assert len(lines) <= LINES == 40 and max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    expected = (
        "2 of 11 phases in 431 s, 100 rows failed", "timeout 92 s", "reason 0", "and 88 more", "99 ok", "row 0 0 ms",
        "teacher    not reached", "cut off: 7", "big.bin",
    )  # fmt: skip
    for said in expected:
        assert said in text, said


# --- phases -------------------------------------------------------------------------------------------------


def test_the_cheapest_phases_run_dry(tmp_path):
    """As on a device, in processes of their own, tiny shapes; the sweep's table is one that the launchers read."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "first",
        "--dry-run",
        "--only",
        "ceilings,sweep",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    run = run_of(tmp_path)
    assert {name: end.status for name, end in run.ends().items()} == {"ceilings": "ok", "sweep": "ok"}
    assert {row.name for row in run.of("ceilings") if row.status == "ok"} == {"copy", "product", "host"}
    swept = run.of("sweep")
    assert all(row.status == "ok" for row in swept) and len(swept) == 2 * 5 + 1
    table = launch_shapes.read_table(tmp_path / "launch_shapes.json")
    assert set(table.source) == {"device", "date", "commit"}
    times = {row.name: row.values["time"].value for row in swept if "merge_attention" in row.name}
    best = min(times, key=times.get).partition(", ")[2]
    assert best == "{} x {}".format(*table.shapes["merge_attention"][-1][1:])
    assert not (ROOT / ".cache" / "gpu").exists(), "a dry run's table is none to launch with"


class Recorded:
    """A session on a device that is not there: rows are noted, not measured."""

    device, dry, folder = CUDA, False, Path("nowhere")

    def __init__(self):
        self.names = []

    def row(self, name, measure, *, shape=None, settings=None, needs=0.0):
        assert callable(measure) and all(type(size) is int for size in (shape or {}).values())
        assert name not in self.names and 0 <= needs < 60
        self.names.append(name)
        return {"time": value(1.0, "ms"), "flops": value(1.0, "FLOP")}

    def left(self):
        return 100.0


@pytest.mark.parametrize("phase", sorted({phase.name for phases in RUNS.values() for phase in phases}))
def test_what_a_phase_asks_of_a_device_can_be_built(phase, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    module = __import__(f"benchmarks.gpu.{phase}", fromlist=["run"])
    recorded = Recorded()
    module.run(recorded)
    least = {"smoke": 22, "accuracy": 15, "loss": 22, "sweep": 30, "decoding": 9, "teacher": 6, "retimed": 6}
    assert len(recorded.names) >= least.get(phase, 1)
    if phase == "loss":
        assert (
            sum("trl" in name for name in recorded.names) == 4 and sum("parts" in name for name in recorded.names) == 4
        )


def test_the_shapes_of_a_sweep_are_ones_the_launchers_take():
    from benchmarks.gpu import sweep

    for kernel, shapes in (
        ("reverse_kl_rows", sweep.WIDE),
        ("logprob_rows", sweep.SOME),
        ("merge_attention", sweep.TILES),
    ):
        packaged = launch_shapes.read_table(launch_shapes.PACKAGED).shapes[kernel][-1]
        assert shapes[0] == (packaged.block, packaged.warps), "the others are compared with what is launched today"
        assert len(set(shapes)) == len(shapes)
        for block, warps in shapes:
            with launch_shapes.forced_shape(kernel, block, warps):
                assert launch_shapes.launch_shape(kernel, 10) == (block, warps)


def test_the_settings_of_the_steps_are_ones_a_run_takes(tmp_path):
    from benchmarks.gpu.consumer import JOB, TINY, case_settings
    from benchmarks.step_cases import cases
    from benchmarks.step_worker import opcd_settings
    from opcd_fast.config import OPCDConfig

    assert OPCDConfig(**case_settings(JOB, tmp_path)).merge_for_rollout is True
    assert OPCDConfig(**case_settings(TINY, tmp_path)).rollout_batch == TINY.prompts
    for case in cases(CUDA, quick=False):
        assert OPCDConfig(**opcd_settings(case, tmp_path, 3, "cuda")).micro_batch_tokens == case.micro_batch_tokens


@pytest.mark.parametrize("name", ["reverse_kl_rows", "merge_attention", "logprob_rows", "divergence_rows"])
def test_a_launch_that_is_wrong_is_seen(name):
    launch = launches.large(torch.device("cpu"), dry=True)[name]()
    launch.call()
    rounded, exact = launch.error()
    assert rounded <= launches.GRADIENT_ERROR and exact <= launches.VALUE_ERROR
    launch.result[0, :3] += 0.5
    assert launch.error()[0] > launches.GRADIENT_ERROR
    launch.result[0, 0] = float("nan")  # what was never written
    assert not launch.error()[0] <= launches.GRADIENT_ERROR


LONG = """==PROF== Connected
a line of the program
"ID","Process ID","Process Name","Host Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python3","h","_reverse_kl_rows_kernel","Command line","dram__bytes.sum","byte","1,000"
"1","7","python3","h","_reverse_kl_rows_kernel","Command line","dram__bytes.sum","byte","2,798,000"
"2","7","python3","h","_merge_attention_kernel","Command line","launch__registers_per_thread","register/thread","80"
"""
WIDE = """"ID","Process ID","Process Name","Host Name","Kernel Name","dram__bytes.sum","launch__registers_per_thread"
"","","","","","Mbyte","register/thread"
"0","7","python3","h","_reverse_kl_rows_kernel(float *, int)","2.798","80"
"""


def test_both_forms_of_ncus_tables_are_read():
    found = counters.parse(LONG)
    assert found["_reverse_kl_rows_kernel"] == {"dram__bytes.sum": Value(2_798_000.0, "byte")}
    assert found["_merge_attention_kernel"]["launch__registers_per_thread"] == Value(80.0, "register/thread")
    found = counters.parse(WIDE)
    assert found["_reverse_kl_rows_kernel"]["dram__bytes.sum"] == Value(2.798, "Mbyte")
    assert counters.parse("==ERROR== LibraryNotLoaded\n") == {}


def test_a_devices_profile_counts_what_ran_there():
    def event(key, device, micros, count):
        return SimpleNamespace(key=key, device_type=f"DeviceType.{device}", self_device_time_total=micros, count=count)

    events = [event("_reverse_kl_rows_kernel", "CUDA", 700.0, 16), event("nvjet_tst_256x128", "CUDA", 2000.0, 64),
              event("aten::mm", "CPU", 9e9, 64), event("flash_fwd_kernel", "CUDA", 10.0, 1)]  # fmt: skip
    values = kernel_times.summed(SimpleNamespace(key_averages=lambda: events), CUDA)
    assert values["products"] == Value(2.0, "ms") and values["our kernels"] == Value(0.7, "ms")
    assert values["attention"] == Value(0.01, "ms") and values["launches"] == Value(81.0, "1")
    assert next(iter(values)) == "products" and "64 x nvjet_tst_256x128" in values
    with pytest.raises(RuntimeError, match="no kernel"):
        kernel_times.summed(SimpleNamespace(key_averages=lambda: events[2:3]), CUDA)


def test_cudnn_is_kept_out_again_after_it_was_let_in():
    from benchmarks.gpu.decoding import _unrestricted

    sdpa = pytest.importorskip("opcd_fast.sdpa")
    kept = sdpa.sdpa_without_cudnn
    with _unrestricted():
        assert sdpa.sdpa_without_cudnn is not kept
        with sdpa.sdpa_without_cudnn():
            assert torch.backends.cuda.cudnn_sdp_enabled()
    assert sdpa.sdpa_without_cudnn is kept


def test_the_trainer_needs_none_of_the_packages_that_a_gpu_machine_may_lack():
    """They are the command line's, or the peers'."""
    missing = ("tyro", "docstring_parser", "typeguard", "trl", "liger_kernel", "datasets", "dill", "multiprocess",
               "bitsandbytes", "deepspeed")  # fmt: skip
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import opcd_fast.trainer, benchmarks.step_worker"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
