"""The runner: whatever a contender does, it is a row, and costs no other its result."""

from __future__ import annotations

import pytest
import torch

from benchmarks import session as runner
from benchmarks.measure import interleaved, with_peak
from benchmarks.schema import BOUND, BROKEN, Row, Value, read, value
from benchmarks.session import Contender, Session, Skip, Wrong, in_groups

CPU = torch.device("cpu")
SHAPE, SETTINGS = {"N": 4}, {"dtype": "float32"}


def raises(error):
    def call(*_):
        raise error

    return call


@pytest.fixture
def make(tmp_path):
    return lambda **options: Session("loss", tmp_path / "a.jsonl", device=CPU, **{"seconds": 60.0, **options})


def compare(one, *contenders, **options):
    settings = {"shape": SHAPE, "settings": SETTINGS, "seconds": 0.0, **options}
    return one.compare("case", contenders, **settings)


def works(name, called=None, judge=None):
    def call():
        if called is not None:
            called.append(name)
        return torch.zeros(100)

    return Contender(name, lambda: call, judge)


# --- measuring ----------------------------------------------------------------------------------------------


def test_peak_memory():
    def work():
        x = torch.zeros(100_000)
        return x + 1  # two buffers live at once

    assert 800_000 <= with_peak(work, CPU)[1] < 801_000


def test_rounds():
    done = []

    def sample(name):
        done.append(name)
        return None if name == "c" else [1.0 * len(done)]

    samples = {name: (lambda name=name: sample(name)) for name in "abc"}
    found = interleaved(samples, seconds=0.0, at_most={"a": 1})
    assert done == ["a", "b", "c", "b", "b"]
    assert found["a"] == Value(1.0, "ms", 1.0, 1.0, 1) and found["b"] == Value(4.0, "ms", 2.0, 5.0, 3)
    assert "c" not in found, "it failed"
    assert interleaved({"b": lambda: sample("b")}, seconds=9.0, left=0.0)["b"].count == 1, "no more than fits"
    assert "a" not in interleaved(samples, seconds=0.0, at_most={"a": 0})


# --- rows that stand alone ----------------------------------------------------------------------------------


def test_a_row_that_fails_says_why_and_the_next_one_runs(make):
    one, settings = make(), {}

    def measure():
        settings["found"] = 3
        return {"time": value(2.0, "ms")}

    assert one.row("good", measure, shape={"N": 4}, settings=settings)["time"] == Value(2.0, "ms")
    assert one.row("broken", lambda: 1 / 0) is None
    assert one.row("nan", lambda: {"error": value(float("nan"), "1")}) is None
    assert one.row("missing", raises(Skip("no such thing"))) is None
    assert one.row("wrong", raises(Wrong("0.5 is above 0.1", {"error": value(0.5, "1")}))) is None
    assert one.row("late", measure, needs=1000.0) is None
    one.finish()
    run = read(one.out)
    assert not list(one.folder.glob("*.row")), "what was written needs no mark"
    assert run.heads["loss"].device.kind == "cpu" and run.heads["loss"].versions["torch"]
    found = {row.name: row for row in run.of("loss")}
    assert found["good"].settings == {"found": "3"} and found["good"].shape == {"N": 4}
    assert {name: row.status for name, row in found.items()} == {
        "good": "ok", "broken": "failed", "nan": "failed", "missing": "skipped", "wrong": "failed", "late": "skipped"
    }  # fmt: skip
    assert "ZeroDivisionError" in found["broken"].note and "error is NaN" in found["nan"].note
    assert found["wrong"].get("error") == 0.5 and "it takes 1000" in found["late"].note
    assert run.ends()["loss"].get("rows") == 6


def test_a_broken_context_ends_the_process_and_the_next_one_goes_on_behind_it(make, monkeypatch):
    ran = []

    def table(one):
        for name in ("before", "breaks", "after"):
            call = raises(RuntimeError("CUDA error")) if name == "breaks" else lambda: torch.zeros(1)
            one.row(name, lambda call=call, name=name: ran.append(name) or call() is None or {"time": value(1.0, "ms")})

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Session, "broken", lambda self: True)
        table(make())
    assert stop.value.code == BROKEN
    one = make()
    table(one)
    assert ran == ["before", "breaks", "after"] and len(read(one.out).heads) == 1
    assert "the CUDA context is broken" in one.rows[1].note


def test_a_table_is_not_finished_with_other_versions_or_threads(make, monkeypatch):
    make()
    versions, device = runner.environment.versions(), runner.environment.describe(CPU)
    device.count_of_processors += 1
    for name, found in (("versions", {**versions, "torch": "0.1"}), ("describe", device)):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="another run"):
            patch.setattr(runner.environment, name, lambda *_, found=found: found)
            make()
    make()


# --- contenders side by side --------------------------------------------------------------------------------


def test_contenders_take_turns(make):
    called = []
    counted = works("counted", judge=lambda _: {"flops": value(6.0, "FLOP")})
    bound = works(BOUND, called, lambda _: {"flops": value(2.0, "FLOP")})
    rows = compare(make(), works("opcd_fast-torch", called), counted, bound)
    assert called == ["opcd_fast-torch", BOUND] * 4  # once for the memory, three times timed
    mine = rows["opcd_fast-torch"]
    assert mine.values["time"].count == 3 and mine.shape == SHAPE and mine.settings == SETTINGS
    assert mine.get("of_bound") == pytest.approx(rows[BOUND].get("time") / mine.get("time"))
    other, least = rows["counted"], rows[BOUND].get("time")
    assert other.get("of_bound") == pytest.approx(3 * least / other.get("time")), "three times what the bound computes"
    assert next(iter(mine.values)) == "time" and mine.get("peak") >= 400


def test_what_a_contender_does_costs_no_other_its_row(make, monkeypatch):
    monkeypatch.setitem(runner.SLOW_MS, "cpu", 0.0)
    calls = []

    def later():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("late")

    def far(result):
        raise Wrong("too far off", {"error": value(float("nan"), "1")})

    rows = compare(
        make(), works("good"), works("far", judge=far), works("judged", judge=lambda _: {"error": value(0.1, "1")}),
        Contender("poor", lambda: raises(torch.OutOfMemoryError("80 GiB"))),
        Contender("unbuilt", raises(ValueError("x"))),
        Contender("absent", raises(Skip("not installed"))), Contender("later", lambda: later),
    )  # fmt: skip
    assert {name: row.status for name, row in rows.items()} == {
        "good": "ok", "far": "failed", "judged": "ok", "poor": "out of memory", "unbuilt": "failed",
        "absent": "skipped", "later": "failed",
    }  # fmt: skip
    assert rows["good"].values["time"].count == 2, "what is slow is timed twice"
    assert rows["judged"].get("error") == 0.1 and rows["absent"].note == "not installed"
    assert rows["later"].note == "RuntimeError: late" and "time" not in rows["later"].values


def test_a_case_goes_on_behind_what_broke_the_device(make, monkeypatch):
    called = []
    breaks = Contender("breaks", lambda: raises(RuntimeError("CUDA error")))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Session, "broken", lambda self: True)
        compare(make(), works("before", called), breaks, works("after", called))
    one = make()
    rows = compare(one, works("before", called), breaks, works("after", called))
    assert {name: row.status for name, row in rows.items()} == {"before": "ok", "breaks": "failed", "after": "ok"}
    assert len(read(one.out).rows) == 3
    assert compare(make(), works("before", called))["before"] == read(one.out).of("loss")[1], "it is there already"


def test_groups_and_names_are_what_is_measured(make):
    called = []
    assert set(compare(make(), works("a", called), works("b", called), only=("b",))) == set(called) == {"b"}
    cases = [Row("t", "a case", group=group) for group in ("main", "N")]
    assert in_groups(cases, ["N"]) == cases[1:] and in_groups(cases, []) == cases
    with pytest.raises(ValueError, match="'speed' is none of main, N"):
        in_groups(cases, ["speed"])


def test_nothing_is_begun_too_late(make):
    rows = compare(make(seconds=0.0), works("a"), needs=1.0)
    assert rows["a"].status == "skipped" and "it takes 1" in rows["a"].note
