"""What a GPU run leaves, whatever its phases do: no one costs another its results, and all of it fits into a lease."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks.gpu.session import BROKEN, Session, Skip, Wrong  # noqa: E402
from benchmarks.phase_rows import PHASE, PhaseRow, Run, Value, append, parse, read, value  # noqa: E402

from benchmarks.gpu import runner, session  # noqa: E402
from benchmarks.gpu.phases import DRY_SECONDS, ENDING, RUNS, SECONDS, Phase, schedule  # noqa: E402
from benchmarks.gpu.summary import LINES, WIDTH, summary  # noqa: E402

FAKE = """
import argparse, os, subprocess, sys, time
from pathlib import Path
from benchmarks.phase_rows import PhaseRow, append, marker, read, value
parser = argparse.ArgumentParser()
parser.add_argument("name"), parser.add_argument("--out", type=Path), parser.add_argument("--seconds", type=float)
parser.add_argument("--dry-run", action="store_true")
options = parser.parse_args()
name, out = options.name, options.out
earlier = len(read(out).of(name))
append(out, PhaseRow(name, f"row {earlier}", values={"time": value(1.5, "ms")}))
if name == "hangs":
    marker(out).write_text("the row it hangs in")
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
    names = ("first", "hangs", "crashes", "breaks", "dies", "last")
    ends = {"first": 5, "hangs": 9, "crashes": 40, "breaks": 60, "dies": 80, "last": 100}
    monkeypatch.setattr(runner, "schedule", lambda run: [(Phase(n, 20, "a fake"), ends[n]) for n in names])
    monkeypatch.setattr(runner, "LEAST", 1.0)
    start = time.monotonic()
    assert runner.run("first", tmp_path / "out", module=fake) == 1
    assert time.monotonic() - start < 60
    run = run_of(tmp_path / "out")
    found = {name: end.status for name, end in run.ends().items()}
    assert found == {"first": "ok", "hangs": "timeout", "crashes": "failed", "breaks": "ok", "dies": "ok", "last": "ok"}
    assert "exit status 1: ValueError: the reason" in run.ends()["crashes"].reason
    assert [row.name for row in run.of("breaks")] == ["row 0", "row 1"], "it goes on behind what broke the device"
    dies = run.of("dies")
    assert [row.name for row in dies] == ["row 0", "the row it dies of", "row 2"], "and behind what broke the process"
    assert dies[1].status == "failed" and dies[1].reason.endswith("status -6: LLVM ERROR: no")
    assert [(row.name, row.status) for row in run.of("hangs")][1:] == [("the row it hangs in", "timeout")]
    assert all(run.of(name)[0].values == {"time": Value(1.5, "ms")} for name in names)
    assert len(run.damaged) == 1, "the line that was cut off, and no other"
    grandchild = int((tmp_path / "out" / "grandchild").read_text())
    assert not Path(f"/proc/{grandchild}").exists() or "Z" in Path(f"/proc/{grandchild}/stat").read_text()
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("== summary"))
    assert "4 rows failed" in lines[begin] and len(lines) - begin <= LINES
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
    assert not list(tmp_path.glob("*.row"))
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
    gone = runner.fit(list(tmp_path.iterdir()), tmp_path / "run.jsonl")
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


SHELL = """#!/bin/sh
case "$*" in
*"pip install"*) [ -z "$NO_WHEELS" ] && touch "${10}/peer.py" ;;
*"pip download"*) truncate -s "$WHEEL_BYTES" carried/peer-1-py3-none-any.whl ;;
*"benchmarks.gpu"*) echo "asked: $*"; echo "path: $PYTHONPATH"; ls "${PYTHONPATH%%:*}"; exit 3 ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """A repository of the scripts alone, and a python that does nothing but say what it was asked."""
    (tmp_path / "scripts").mkdir()
    for name in ("gpu.sh", "carry.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    (tmp_path / "python").write_text(SHELL)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / ".gitignore").write_text("carried/\n")
    author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, timeout=60)

    def script(name, *arguments, **variables):
        environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "PYTHONPATH": "", **variables}
        command = [str(tmp_path / "scripts" / name), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    return tmp_path, script


def test_what_is_carried_must_fit_with_the_tree(tree):
    folder, script = tree
    done = script("carry.sh", WHEEL_BYTES=str(60 << 20))
    assert done.returncode == 0 and f"carried {60 << 10} KiB" in done.stdout, done.stderr
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert (folder / "carried" / "COMMIT").read_text() == head
    (folder / "more").write_bytes(b"x" * (4 << 20))  # not committed, but it travels
    (folder / "carried" / "old.whl").write_bytes(b"x")
    done = script("carry.sh", WHEEL_BYTES=str(60 << 20))
    assert done.returncode == 1 and "too large together" in done.stderr
    assert not (folder / "carried" / "old.whl").exists()


@pytest.mark.parametrize(
    ("arguments", "seconds"), [(["--dry-run"], DRY_SECONDS), (["second", "--dry-run"], DRY_SECONDS)]
)
def test_the_script_runs_with_what_was_carried(tree, arguments, seconds):
    folder, script = tree
    (folder / "carried").mkdir()
    (folder / "carried" / "peer-1-py3-none-any.whl").write_bytes(b"")
    done = script("gpu.sh", *arguments)
    asked = done.stdout.splitlines()[0].split()
    assert done.returncode == 3 and asked[1:4] == [
        "-m",
        "benchmarks.gpu",
        "second" if "second" in arguments else "first",
    ]
    assert "--dry-run" in asked and seconds - 10 < int(asked[asked.index("--seconds") + 1]) < seconds
    assert "peer.py" in done.stdout
    site = next(line for line in done.stdout.splitlines() if line.startswith("path: ")).removeprefix("path: ")
    assert site and not Path(site).exists(), "the temporary folder goes afterwards"
    done = script("gpu.sh", *arguments, NO_WHEELS="1")
    assert "do not install here" in done.stdout and "asked: " in done.stdout and "peer.py" not in done.stdout


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
    assert not list(tmp_path.glob("*.row")), "what was written needs no mark"
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
    assert sum(line.startswith(" " * 11) for line in lines) == 3, "what was measured has more lines where there is room"
    text = "\n".join(lines)
    expected = (
        "2 of 11 phases in 431 s, 100 rows failed", "timeout 92 s", "reason 0", "and 88 more", "99 ok", "row 0 0 ms",
        "teacher    not reached", "cut off: 7", "big.bin",
    )  # fmt: skip
    for said in expected:
        assert said in text, said
    cases = [
        PhaseRow("loss", f"a, {name}", values={"time": value(ms, "ms")}) for name, ms in (("gemms", 103), ("trl", 3e2))
    ]
    assert "a, gemms 103 ms; trl 300 ms" in "\n".join(summary(Run(rows=cases), ["loss"], tmp_path, 1.0, []))
