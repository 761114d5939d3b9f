"""A file of results holds one run and nothing that a reader could trip over."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.schema import Device, Head, Row, Run, Value, append, end, parse, read, value

ROOT = Path(__file__).resolve().parents[2]
ROW = Row("loss", "a case", "trl", shape={"N": 4}, values={"time": Value(2.0, "ms", 1.0, 3.0, 5)})
HEAD = Head("loss", "2030-01-02T03:04:05+00:00", "python -m x", "abc", False, Device("cpu", "A CPU", 2), {"torch": "2"})


def write(path, *lines):
    for line in lines:
        append(path, line)
    return path


def test_what_is_written_is_read(tmp_path):
    lost = Row("loss", "a case", "peer", status="out of memory", note="tried 80 GiB")
    other = dataclasses.replace(HEAD, table="accuracy")
    run = read(write(tmp_path / "a.jsonl", HEAD, ROW, lost, end("loss", [ROW, lost]), other))
    assert run.heads == {"loss": HEAD, "accuracy": other} and run.of("loss") == [ROW, lost] and not run.damaged
    assert run.ends()["loss"].get("rows") == 2 and ROW.name == "a case, trl"
    assert read(tmp_path / "none.jsonl") == Run()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"status": "slow"}, "status is 'slow'"),
        ({"status": "failed"}, "note must say why"),
        ({"speed": 3}, "speed"),
        ({"values": {"time": {"value": None, "unit": "ms"}}}, "is NaN although status is 'ok'"),
        ({"values": {"time": {"value": -1.0, "unit": "ms"}}}, "not negative"),
        ({"values": {"time": {"value": float("nan"), "unit": "ms"}}}, "not finite"),
        ({"values": {"time": {"value": "fast", "unit": "ms"}}}, "not finite"),
        ({"values": {"time": {"value": 1.0, "unit": ""}}}, "needs a unit"),
        ({"values": {"time": {"value": 1.0, "unit": "ms", "low": 2.0}}}, "low <= value"),
        ({"values": {"time": 1.0}}, "mapping"),
        ({"shape": {"N": "4"}}, "shape needs positive integers"),
        ({"shape": {"N": 0}}, "shape needs positive integers"),
        ({"kind": "note"}, "neither a head nor a row"),
        ({"case": ""}, "needs a table and a case"),
    ],
)
def test_a_wrong_row_is_refused(change, named):
    good = dataclasses.asdict(ROW)
    assert parse(json.loads(json.dumps(good))) == ROW
    with pytest.raises(ValueError, match=named):
        parse({**good, **change})


@pytest.mark.parametrize("change", [{"schema": "other/1"}, {"device": {"kind": "cpu"}}, {"speed": 1}])
def test_a_wrong_head_is_refused(change):
    good = dataclasses.asdict(HEAD)
    assert parse(json.loads(json.dumps(good))) == HEAD
    with pytest.raises(ValueError, match=next(iter(change)) if "device" not in change else "name"):
        parse({**good, **change})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"versions": {"torch": "3"}}, "versions"),
        ({"device": Device("cpu", "A CPU", 4)}, "device"),  # other threads
        ({"device": Device("cpu", "Another CPU", 2)}, "device"),
        ({"git_commit": "def"}, "git_commit"),
    ],
)
def test_lines_of_different_runs_are_no_file(tmp_path, changes, named):
    path = write(tmp_path / "a.jsonl", HEAD, dataclasses.replace(HEAD, table="other", **changes))
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: {named} is another"):
        read(path)


def test_a_row_that_is_lost_or_there_twice_is_seen(tmp_path):
    with pytest.raises(ValueError, match="loss has 1 rows; its end says 2"):
        read(write(tmp_path / "lost.jsonl", HEAD, ROW, end("loss", [ROW, ROW])))
    with pytest.raises(ValueError, match="line 3: loss a case, trl is there twice"):
        read(write(tmp_path / "twice.jsonl", HEAD, ROW, ROW))


def test_lines_survive_a_kill(tmp_path):
    path = tmp_path / "gpu.jsonl"
    rows = [Row("loss", f"row {i}", values={"time": value(i, "ms")}) for i in range(3)]
    write(path, *rows[:2])
    path.write_bytes(path.read_bytes()[:-7])  # killed in the middle of a line
    assert read(path).rows == rows[:1] and read(path).damaged == [2]
    append(path, rows[2])
    assert read(path).rows == [rows[0], rows[2]] and read(path).damaged == [2]


def test_stored_results_are_whole_runs():
    files = list((ROOT / "benchmarks" / "results").glob("*.json*"))
    assert len(files) >= 4
    for path in files:
        run = read(path)
        assert run.ends().keys() == run.heads.keys() and run.rows and not run.damaged, path.name
