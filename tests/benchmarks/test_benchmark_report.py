"""docs/performance.md from reports: targets judged from rows alone, the model's bytes, the page and its refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks.phase_rows import Head, PhaseRow, append, value  # noqa: E402

from benchmarks import gpu_report, roofline, targets  # noqa: E402
from benchmarks import report as report_page  # noqa: E402
from benchmarks.plots import accuracy, swept  # noqa: E402
from benchmarks.schema import BOUND, Device, GradientError, Report, Row, Time  # noqa: E402

KLS = (1.0, 1e-1, 1e-2, 1e-3, 3e-5)


def _row(implementation: str, ms: float | None, bound: float = 100.0, **changes) -> Row:
    row = Row("case", implementation, 16_384, 151_936, 1024, "bfloat16", False)
    if ms is not None:
        row.time_ms, row.bound_fraction, row.peak_bytes = Time(ms, ms, ms, 3), bound / ms, 1 << 20
    else:
        row.status, row.note = "skipped", "not installed"
    return dataclasses.replace(row, **changes)


def _report(rows: list[Row], name: str = "NVIDIA H100 80GB HBM3", date: str = "2030-01-02T03:04:05+00:00") -> Report:
    kind = "cpu" if "CPU" in name else "cuda"
    device = Device(kind, name, 132, None, None, "13.0")
    versions = {"torch": "2.13", "trl": "1.16.0"}
    return Report("loss", date, "python -m x", "abc", False, device, versions, complete=True, rows=rows)


def _verdict(rows: list[Row], against: str, *, frozen: bool = False, d: int = 1024, name: str = "NVIDIA H100"):
    found = [
        v
        for v in targets.judge([_report(rows, name)])
        if (v.target.against, v.target.frozen, v.target.D) == (against, frozen, d) and v.target.devices != ("cpu",)
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("ms", "status"), [(100 / 0.52, "met"), (100 / 0.519, "missed")])
def test_bound_target(ms, status):
    verdict = _verdict([_row("opcd_fast-triton", ms), _row(BOUND, 100.0)], BOUND)
    assert verdict.status == status and verdict.value == pytest.approx(100 / ms)
    assert verdict.device == "NVIDIA H100" and "opcd_fast-triton" in verdict.why


def test_peer_targets():
    rows = [_row("opcd_fast-triton", 50.0), _row("trl", 70.0), _row("liger-fused", 199.0), _row(BOUND, 30.0)]
    assert _verdict(rows, "trl").status == "met"
    assert "trl 1.16.0 70.0 ms" in _verdict(rows, "trl").why
    assert _verdict(rows, "liger-fused").status == "missed"  # 3.98 times, 4 promised
    assert _verdict(rows, "trl", frozen=True).status == "unmeasured"
    assert _verdict(rows, "trl", d=4096).why == "the case is not in the report"
    frozen = [dataclasses.replace(row, frozen=True) for row in rows]
    assert _verdict(frozen, "trl", frozen=True).status == "missed"  # 1.4 times, 1.5 promised when frozen


def test_targets_without_a_measurement():
    rows = [_row("opcd_fast-triton", 50.0), _row("trl", None), _row(BOUND, 30.0)]
    assert (_verdict(rows, "trl").status, _verdict(rows, "trl").value) == ("unmeasured", None)
    assert "not installed" in _verdict(rows, "trl").why
    assert "not in the report" in _verdict(rows, "liger-fused").why
    broken = [_row("opcd_fast-triton", None, status="failed", note="no kernel"), _row(BOUND, 30.0)]
    assert _verdict(broken, BOUND).status == "missed" and "no kernel" in _verdict(broken, BOUND).why
    other = [_row("opcd_fast-triton", 50.0, group="N"), _row(BOUND, 30.0, group="N")]
    assert _verdict(other, BOUND).status == "unmeasured"
    # Another card's numbers say nothing about an H100.
    assert _verdict(rows, BOUND, name="NVIDIA A100").device == "H100 or H200"
    assert {v.status for v in targets.judge([])} == {"unmeasured"}
    assert len(targets.judge([])) == len(targets.TARGETS)


def test_ours_is_the_backend_that_auto_takes():
    shape = {"N": 512, "V": 49_152, "D": 576, "dtype": "float32"}
    rows = [
        _row("opcd_fast-torch", 90.0, **shape),
        _row("opcd_fast-native", 60.0, **shape),
        _row("trl", 100.0, **shape),
    ]
    (verdict,) = (v for v in targets.judge([_report(rows, "a CPU")]) if v.status != "unmeasured")
    assert (verdict.status, verdict.value) == ("met", pytest.approx(0.6))


def _errors(implementation: str, errors: list[float | None], kls=KLS, of: str = "hidden") -> Row:
    found = [GradientError(kl, error, 64, of) for kl, error in zip(kls, errors)]
    return _row(implementation, None, status="ok", note="not timed", group="accuracy", N=256, gradient_error=found)


@pytest.mark.parametrize(
    ("errors", "kls", "status"),
    [
        ([2e-3] * 5, KLS, "met"),
        ([2e-3] * 4 + [3.1e-3], KLS, "missed"),
        ([2e-3] * 4 + [None], KLS, "missed"),
        ([2e-3] * 4, KLS[:4], "unmeasured"),  # the smallest KL is where it would go wrong
    ],
)
def test_accuracy_target(errors, kls, status):
    verdict = _verdict([_errors("opcd_fast-triton", errors, kls)], "")
    assert verdict.status == status


def test_model_bytes():
    bytes_of = {one.name: (one.row_bytes(), one.logit_bytes()) for one in roofline.IMPLEMENTATIONS}
    assert bytes_of[roofline.OURS.name] == (18, 30)
    assert bytes_of[roofline.ONE_READ.name] == (10, 22)
    assert bytes_of[roofline.TRL.name] == (26, 46)
    assert [one.products() for one in roofline.IMPLEMENTATIONS] == [4, 4, 6, 4]


def test_model_times():
    h100 = roofline.H100
    small, large = roofline.SHAPES[:2]
    assert roofline.bound(small, h100) == pytest.approx(25.5e-3, rel=1e-2)
    assert roofline.bound(large.with_frozen_head(), h100) == pytest.approx(76.5e-3, rel=1e-2)
    for device, one, full in itertools.product(roofline.DEVICES, roofline.IMPLEMENTATIONS, roofline.SHAPES):
        least, most = one.seconds(full, device)
        frozen = full.with_frozen_head()
        assert roofline.bound(full, device) < least < most
        assert roofline.bound(frozen, device) < one.seconds(frozen, device)[0] < least
    # The row kernel's 18 bytes per logit, by hand, then dW's cast and scaling: 10 bytes an element.
    by_hand = (18 * 16_384 * 151_936 + 10 * 151_936 * 1024) / 3.0e12
    assert roofline.OURS.seconds(small, h100)[0] - roofline.bound(small, h100) == pytest.approx(by_hand, rel=1e-3)
    # Liger's chunks: 128 rows at D = 1024, 512 at 4096.
    assert [roofline.LIGER.kernels[0].rows(shape, h100) for shape in (small, large)] == [128, 512]


def test_model_of_waves():
    """dH of 640 rows by 1,024 columns is 20 tiles, for 132 multiprocessors."""
    shape, device = roofline.SHAPES[0].with_frozen_head(), roofline.H200
    few = roofline._dh(roofline._fixed(640))
    assert few.arithmetic(shape, device) / few.in_waves(shape, device) == pytest.approx(20 / 132 * 25.6 / 26)
    ours = next(kernel for kernel in roofline.OURS.running(shape) if kernel.name == "dH")
    assert ours.rows(shape, device) == roofline.plan(shape, device).gradient_rows == 33 * 128
    assert sum(ours.runs(shape, device)) == shape.N
    assert ours.arithmetic(shape, device) / ours.in_waves(shape, device) > 0.9
    assert not any(kernel.trained_only for kernel in roofline.OURS.running(shape))



def _full_report(**options) -> Report:
    rows = [_row("opcd_fast-triton", 50.0), _row("trl", 80.0), _row("liger-fused", None), _row(BOUND, 30.0)]
    for n in (4096, 65_536):
        ms = n / 300
        rows += [_row("opcd_fast-triton", ms, ms / 2, case=f"n{n}", N=n, group="N")]
        rows += [_row(BOUND, ms / 2, ms / 2, case=f"n{n}", N=n, group="N", peak_bytes=None, note="none")]
    rows.append(_row("opcd_fast-triton", 49.0, case="w", group="workspace", workspace_bytes=1 << 30))
    wrong = _errors("eager-bf16-logits", [0.05, 0.1, 0.2, 0.6, 2.4])
    rows += [dataclasses.replace(r, case="a") for r in (_errors("opcd_fast-triton", [2e-3] * 5), wrong)]
    return _report(rows, **options)


def _gpu_run(path: Path) -> None:
    """Two phases of eleven: one whole, one that was killed in the middle of a line."""
    device = Device("cuda", "NVIDIA H200", 132, 1 << 37, "580.1", "13.0")
    environment = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    for phase in ("loss", "gpu_tests"):
        append(path, Head(phase, "2030-01-02T03:04:05+00:00", "python -m x", "abc", None, device, {"torch": "2.11.0"},
                          environment))  # fmt: skip
    append(path, PhaseRow("loss", "full, opcd_fast-triton", shape={"N": 16_384}, settings={"dtype": "bfloat16"},
                          values={"time": value(128.4, "ms"), "of_bound": value(0.81, "1")}))  # fmt: skip
    append(path, PhaseRow("loss", "full, trl", "failed", "OutOfMemoryError: tried | 80 GiB"))
    append(path, PhaseRow("loss", "phase", seconds=80.0))
    for index in range(3):
        append(path, PhaseRow("gpu_tests", f"gpu/test_loss_gpu.py::test_it[{index}]", values={"time": value(1, "s")}))
    append(path, PhaseRow("gpu_tests", "gpu/test_loss_gpu.py::test_other", "failed", "E assert 2 <= 1"))
    append(path, PhaseRow("gpu_tests", "cut off", values={"time": value(1, "s")}))
    path.write_bytes(path.read_bytes()[:-9])


def test_whatever_part_of_a_gpu_run_came_back_is_shown(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, out = tmp_path / "results", tmp_path / "docs" / "performance.md"
    table = _full_report(name="a CPU")
    table.write(results / table.file_name())
    (results / "gpu").mkdir()
    arguments = ["--results", str(results), "--out", str(out)]
    assert report_page.main(arguments) == 0
    before = out.read_text(encoding="utf-8")
    assert "Not measured on a GPU" in before and "**Nothing here was measured on a GPU.**" in before
    _gpu_run(results / "gpu" / "gpu_first_2030.jsonl")
    assert report_page.main(arguments) == 0
    text = out.read_text(encoding="utf-8")
    assert "Nothing here was measured on a GPU" not in text and "NVIDIA H200; commit abc; driver 580.1" in text
    assert "| full, opcd_fast-triton | N 16,384; dtype bfloat16 | time 128.4 ms, of_bound 0.81 |" in text
    assert "| full, trl |  | **failed**: OutOfMemoryError: tried \\| 80 GiB |" in text
    assert "Cut off in the file: line 10." in text and "**Not finished**: the run ended before it." in text
    assert "| 3 tests | | passed |" in text and "test_it" not in text and "test_other |  | **failed**" in text
    (results / "gpu" / "gpu_first_2031.jsonl").write_text('{"kind": "row", "speed": 3}\n')
    capsys.readouterr()
    assert report_page.main(arguments) == 2
    assert "gpu_first_2031.jsonl, line 1 has unknown field 'speed'" in capsys.readouterr().err


def test_plots_leave_out_what_cannot_be_compared():
    rows = _full_report().rows
    panels = swept(rows, "N", lambda row: row.time_ms.median)
    assert panels == {
        "V = 151,936, D = 1,024, bfloat16": {
            "opcd_fast-triton": [(4096, 4096 / 300), (16_384, 50.0), (65_536, 65_536 / 300)],
            "trl": [(16_384, 80.0)],
        }
    }
    assert swept(rows, "D", lambda row: row.time_ms.median) == {}  # one width is no curve
    assert set(accuracy(rows)["V = 151,936, D = 1,024, bfloat16"]) == {"opcd_fast-triton", "eager-bf16-logits"}


def test_page(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, first, second = tmp_path / "results", tmp_path / "a" / "docs", tmp_path / "b" / "docs"
    stale = _full_report(date="2030-01-01T03:04:05+00:00")
    stale.rows[0].time_ms = Time(777.0, 777.0, 777.0, 3)
    for one in (_full_report(), stale):
        one.write(results / one.file_name())
    for folder in (first, second):
        assert report_page.main(["--results", str(results), "--out", str(folder / "performance.md")]) == 0
    text = (first / "performance.md").read_text(encoding="utf-8")
    assert "777" not in text and "loss_nvidia-h100-80gb-hbm3_2030-01-02.json" in text
    assert "| opcd_fast-triton | 50 (50 to 50) | 200% | 1 |" in text
    assert "**met** | 1.60" in text and "**unmeasured**" in text and "**missed**" not in text
    assert "skipped: not installed" in text and "1,024 MiB" in text and "| 2.4e+00 | inexact |" not in text
    assert "Model, unmeasured on a device" in text
    images = sorted(path.name for path in (first / "images").iterdir())
    assert len(images) == 3 and all(f"images/{name}" in text for name in images)
    for path in (first / "performance.md", *(first / "images").iterdir()):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()
        assert path.stat().st_size < 100_000
    capsys.readouterr()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda data: {**data, "complete": False}, "is not complete"),
        (lambda data: {**data, "schema": "other/1"}, "schema is 'other/1'"),
        (lambda data: {**data, "rows": [{"case": "c"}]}, "is missing"),
        (None, "Unterminated|Expecting|delimiter"),
    ],
)
def test_report_refuses(tmp_path, capsys, damage, named):
    whole = _full_report()
    whole.write(tmp_path / "results" / "good.json")
    text = json.dumps(dataclasses.asdict(_report([], name="another")))
    text = text[:-20] if damage is None else json.dumps(damage(json.loads(text)))
    (tmp_path / "results" / "bad.json").write_text(text)
    out = tmp_path / "docs" / "performance.md"
    assert report_page.main(["--results", str(tmp_path / "results"), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "bad.json" in message and not out.exists()
    assert re.search(named, message)


def test_report_needs_a_table(tmp_path, capsys):
    quick = dataclasses.replace(_full_report(), benchmark="loss-quick")
    quick.write(tmp_path / quick.file_name())
    assert report_page.main(["--results", str(tmp_path), "--out", str(tmp_path / "performance.md")]) == 2
    assert "no report of the loss table" in capsys.readouterr().err


def test_the_page_is_that_of_the_stored_results(tmp_path):
    """Whoever adds a result runs `python -m benchmarks.report` and commits what it writes."""
    pytest.importorskip("matplotlib")
    results = ROOT / "benchmarks" / "results"
    loss, teacher, steps = (report_page.newest(results, name) for name in ("loss", "teacher", "step"))
    page = report_page.page(loss, teacher, tmp_path, steps, gpu_report.runs(results))
    assert page == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for path in tmp_path.glob("images/*"):
        assert (ROOT / "docs" / "images" / path.name).exists()
