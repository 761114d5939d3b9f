"""The benchmarks run, and their files say what they must; how fast anything is, is not tested here."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import loss_table  # noqa: E402
from benchmarks.loss_cases import KLS, cases, make_inputs, oracle  # noqa: E402
from benchmarks.loss_implementations import BOUND, Implementation, implementations  # noqa: E402
from benchmarks.measure import Failure, attempt, time_interleaved, with_peak  # noqa: E402
from benchmarks.schema import Device, GradientError, Report, Row, Time, from_json, read  # noqa: E402

CPU = torch.device("cpu")


def _report() -> Report:
    row = Row(
        "c", "ours", 8, 16, 4, "float32", True, time_ms=Time(2.0, 1.0, 3.0, 5), peak_bytes=100,
        gradient_error=[GradientError(1e-2, 1e-5, 8)], bound_fraction=0.5,
    )  # fmt: skip
    lost = Row("c", "peer", 8, 16, 4, "float32", True, status="out of memory", note="tried 80 GiB")
    device = Device("cuda", "NVIDIA H100 80GB HBM3", 132, 1 << 36, "580.1", "13.0")
    date = "2030-01-02T03:04:05+00:00"
    return Report("loss", date, "command", None, None, device, {"torch": "2", "trl": None}, rows=[row, lost])


def test_schema_round_trip(tmp_path):
    report = _report()
    path = tmp_path / report.file_name()
    report.write(path)
    assert path.name == "loss_nvidia-h100-80gb-hbm3_2030-01-02.json"
    assert read(path) == report
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(schema="other/1"), "schema is 'other/1'"),
        (lambda d: d.pop("device"), "report.device is missing"),
        (lambda d: d.update(speed=1), "unknown field 'speed'"),
        (lambda d: d["device"].update(name=None), "report.device.name"),
        (lambda d: d["rows"][0].update(N="8"), r"report.rows\[0\].N"),
        (lambda d: d["rows"][0].update(N=0), "must be positive"),
        (lambda d: d["rows"][0].update(frozen=1), r"rows\[0\].frozen"),
        (lambda d: d["rows"][0].update(peak_bytes=-1), "not negative"),
        (lambda d: d["rows"][0].update(peak_bytes=None), "why peak_bytes is missing"),
        (lambda d: d["rows"][0].update(time_ms=None), "time_ms is missing"),
        (lambda d: d["rows"][0]["time_ms"].update(min=9.0), "min <= median"),
        (lambda d: d["rows"][0]["gradient_error"][0].update(relative_error=float("nan")), "finite"),
        (lambda d: d["rows"][1].update(note=None), r"rows\[1\].note"),
        (lambda d: d["rows"][1].update(status="slow"), "'slow'"),
        (lambda d: d["rows"][1].update(implementation="ours"), "appears twice"),
    ],
)
def test_schema_refuses(change, named):
    data = json.loads(json.dumps(dataclasses.asdict(_report())))
    change(data)
    with pytest.raises(ValueError, match=named):
        from_json(data)


def test_stored_results_are_valid():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        report = read(path)
        assert report.complete and report.rows, path.name


def test_oracle_is_autograd_in_float64():
    case = cases(CPU, quick=True)[0]
    inputs = make_inputs(case, CPU, 1e-2)
    kl, dh = oracle(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t)
    h = inputs.h_s.detach().double().requires_grad_()
    log_p = torch.log_softmax(h @ inputs.w_s.detach().double().T, -1)
    log_q = torch.log_softmax(inputs.h_t.double() @ inputs.w_t.double().T, -1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(kl, expected.detach())
    torch.testing.assert_close(dh, torch.autograd.grad(expected.sum(), h)[0])
    assert float(kl.mean()) == pytest.approx(1e-2, rel=0.2)  # calibrated on some of the rows


def test_peak_and_interleaving():
    order: list[str] = []

    def work(name: str, count: int) -> torch.Tensor:
        order.append(name)
        x = torch.zeros(count)
        return x + 1  # two buffers live at once

    _, peak, reason = with_peak(lambda: work("a", 100_000), CPU)
    assert reason is not None or 800_000 <= peak < 801_000
    order.clear()
    calls = {"a": lambda: work("a", 10), "b": lambda: work("b", 10)}
    times = time_interleaved(calls, CPU, seconds=0.0, min_rounds=3)
    assert order == ["a", "b"] * 4  # one round to warm up, three timed
    assert times["a"].count == times["b"].count == 3


def test_failures_are_results(tmp_path, monkeypatch):
    def no_memory():
        raise torch.OutOfMemoryError("tried to allocate 80.00 GiB")

    assert attempt(no_memory, CPU).status == "out of memory"
    assert isinstance(attempt(lambda: 1 / 0, CPU), Failure)

    def with_poor_peer(case, device):
        return [*implementations(case, device), Implementation("peer", lambda inputs: no_memory)]

    one = [cases(CPU, quick=True)[0]]
    monkeypatch.setattr(loss_table, "cases", lambda device, quick: one)
    monkeypatch.setattr(loss_table, "implementations", with_poor_peer)
    arguments = ["--out", str(tmp_path), "--quick", "--device", "cpu", "--case-seconds", "0"]
    assert loss_table.main(arguments) == 0
    rows = {row.implementation: row for row in read(next(tmp_path.glob("*.json"))).rows}
    assert rows["peer"].status == "out of memory" and "80.00 GiB" in rows["peer"].note
    assert rows["opcd_fast-torch"].status == rows[BOUND].status == "ok"

    assert loss_table.main([*arguments, "--limit-seconds", "-1"]) == 0
    assert {row.status for row in read(next(tmp_path.glob("*.json"))).rows} == {"skipped"}


def test_ours_failing_fails_the_table(tmp_path, monkeypatch):
    def broken(inputs):
        return lambda: (_ for _ in ()).throw(RuntimeError("no kernel image"))

    one = [cases(CPU, quick=True)[0]]
    ours = [Implementation("opcd_fast-triton", broken, ours=True)]
    monkeypatch.setattr(loss_table, "cases", lambda device, quick: one)
    monkeypatch.setattr(loss_table, "implementations", lambda case, device: ours + implementations(case, device)[-1:])
    assert loss_table.main(["--out", str(tmp_path), "--quick", "--device", "cpu", "--case-seconds", "0"]) == 1


def _check_quick_table(directory: Path) -> None:
    (path,) = directory.glob("*.json")
    report = read(path)
    assert report.complete and report.benchmark == "loss-quick"
    for case in cases(CPU, quick=True):
        rows = {row.implementation: row for row in report.rows if row.case == case.name}
        assert set(rows) == {i.name for i in implementations(case, CPU)}
        assert all(row.status == "ok" and row.bound_fraction is not None for row in rows.values())
        for row in rows.values():
            if row.implementation == BOUND:
                assert row.peak_bytes is None and row.note
                continue
            assert row.peak_bytes and [e.mean_kl for e in row.gradient_error] == pytest.approx(KLS, rel=0.06)
            if row.exact:
                assert max(e.relative_error for e in row.gradient_error) <= 3e-3
        if case.dtype == torch.bfloat16:
            large, small = (e.relative_error for e in rows["eager-bf16-logits"].gradient_error)
            assert not rows["eager-bf16-logits"].exact
            assert large > 3e-3 and small > 0.5 and small > large


def test_gpu_script_dry_run(tmp_path):
    """The whole flow of a GPU machine, which includes the quick table."""
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu.sh"), "--dry-run"], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert (tmp_path / "gpu_tests.txt").stat().st_size > 0
    _check_quick_table(tmp_path)


def test_gpu_script_refuses_unknown_arguments():
    done = subprocess.run([str(ROOT / "scripts" / "gpu.sh"), "--fast"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "usage" in done.stderr
