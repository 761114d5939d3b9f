"""docs/performance.md from files of results: targets judged from rows alone, the page, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks import models, plots, report, targets, teacher_model
from benchmarks.gpu.phases import RUNS
from benchmarks.gpu.summary import LINES, WIDTH, summary
from benchmarks.schema import BOUND, END, Device, Head, Row, Run, Value, append, end, value

ROOT = Path(__file__).resolve().parents[2]
CPU, H100 = Device("cpu", "A CPU", 2), Device("cuda", "NVIDIA H100 80GB HBM3", 132, None, "580.1", "13.0")
UNITS = {"peak": "bytes", "prefix": "bytes", "one_prefix": "bytes"}
MAIN, KLS = "smollm2-135m-n512-float32-full", (1.0, 1e-1, 1e-2, 1e-3, 3e-5)


def head(table, device=CPU, date="2030-01-02T03:04:05+00:00"):
    return Head(table, date, "python -m x", "abc", False, device, {"torch": "2.13", "trl": "1.16.0"})


def row(table, implementation, ms, case=MAIN, note="not here", status=None, **values):
    shape = {"loss": {"N": 512, "V": 49_152, "D": 576}, "teacher": {"context": 1024, "response": 64, "batch": 16},
             "step": {"prompts": 16, "tokens": 24, "context": 150}, "decoding": {"rows": 64}}[table]  # fmt: skip
    settings = {"dtype": "float32", "head": "full", "model": "SmolLM2", "checkpointing": "yes"}
    found = Row(table, case, implementation, "main", shape=shape, settings=settings)
    if ms is None:
        found.status, found.note = status or "skipped", note
    else:
        found.values = {"time": Value(ms, "ms", ms, ms, 3)}
        found.values |= {name: value(x, UNITS.get(name, "1")) for name, x in values.items()}
    return found


def judged(table, rows, against, measure=None, device=CPU):
    return [(target, targets.judge(target, head(table, device), rows)) for target in targets.TARGETS[table]
            if targets._is_of(target, device) and target.against == against
            and measure in (None, target.measure)]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "case", "ours", "against", "good", "bad", "measured"),
    [
        ("loss", MAIN, "opcd_fast-native", "trl", 60.0, 61.0, 0.6),
        ("loss", MAIN, "opcd_fast-native", BOUND, 140.0, 141.0, 1.4),
        ("loss", "qwen3-0.6b-n16384-bfloat16-full", "opcd_fast-triton", BOUND, 100 / 0.52, 100 / 0.519, 0.52),
        ("loss", "qwen3-0.6b-n16384-bfloat16-frozen", "opcd_fast-difference", "trl", 50.0, 50.1, 2.0),
        ("teacher", "1024x64x16", "opcd_fast-merge", "concat", 12.5, 12.6, 8.0),
        ("teacher", "1024x64x16", "opcd_fast-merge-rebuilt", "concat", 25.0, 25.1, 4.0),
        ("step", "demo-bf16-checkpointed", "opcd_fast", "trl-sdft", 30.0, 30.1, 0.3),
        ("decoding", "demo", "opcd_fast-decode", "generate, dynamic cache", 100.0, 100.1, 1.0),
    ],
)
def test_a_ratio_of_times(table, case, ours, against, good, bad, measured):
    device = H100 if "qwen3" in case else CPU
    for ms, status in ((good, "met"), (bad, "missed")):
        rows = [row(table, ours, ms, case), row(table, against, 100.0, case)]
        ((_, outcome),) = [(t, o) for t, o in judged(table, rows, against, device=device) if o[0] != "unmeasured"]
        assert outcome[0] == status and (status == "missed" or outcome[1] == pytest.approx(measured))
        assert ours in outcome[2] and against in outcome[2]


def test_rate_counts_tokens_and_memory_counts_bytes():
    rows = [row("step", "opcd_fast", 10.0, targets._STEP, answer_tokens=300.0, peak=1 << 29),
            row("step", "trl-sdft", 25.0, targets._STEP, answer_tokens=384.0, peak=1 << 30)]  # fmt: skip
    found = {target.measure: outcome for target, outcome in judged("step", rows, "trl-sdft", device=H100)}
    assert found["rate"][:2] == ("missed", pytest.approx((300 / 10) / (384 / 25)))
    assert found["peak"][:2] == ("missed", 0.5) and "512 MiB" in found["peak"][2]


def test_a_rate_in_tokens_and_a_plan():
    rates = [row("decoding", name, 9.0, "64 answers", rate=rate)
             for name, rate in (("opcd_fast-decode", 8000.0), ("generate, dynamic cache", 1601.0))]  # fmt: skip
    ours, peer = (judged("decoding", rates, against, device=H100)[0][1][:2]
                  for against in ("", "generate, dynamic cache"))  # fmt: skip
    assert ours == ("met", 8000.0) and peer == ("missed", pytest.approx(8000 / 1601))
    for ratio, status in ((0.91, "met"), (1.09, "met"), (0.89, "missed"), (1.11, "missed")):
        plan = row("step", "", 1.0, "plan", **{"plan over measured": ratio})
        assert judged("step", [plan], "", "plan", H100)[0][1][0] == status
    assert judged("step", [row("step", "", 1.0, "plan")], "", "plan", H100)[0][1][0] == "unmeasured"


def test_what_was_not_measured_is_neither_met_nor_missed():
    mine, peer = row("loss", "opcd_fast-native", 60.0), row("loss", "trl", 100.0)
    untimed = dataclasses.replace(peer, values={})
    for rows in ([], [mine], [mine, row("loss", "trl", None)], [row("loss", "opcd_fast-native", None), peer],
                 [mine, untimed]):  # fmt: skip
        assert {outcome[0] for _, outcome in judged("loss", rows, "trl")} == {"unmeasured"}
    failed = row("loss", "opcd_fast-native", None, status="out of memory")
    assert "missed" in {outcome[0] for _, outcome in judged("loss", [failed, peer], "trl")}, "a failure of ours"
    a100 = dataclasses.replace(H100, name="NVIDIA A100")
    assert not judged("loss", [mine, peer], "trl", device=a100), "another card says nothing about an H100"
    assert all("**unmeasured**" in line for line in targets.markdown("loss", [])[2:])


def test_ours_is_the_backend_that_auto_takes():
    rows = [row("loss", "opcd_fast-torch", 90.0), row("loss", "opcd_fast-native", 60.0), row("loss", "trl", 100.0)]
    assert "met" in {outcome[0] for _, outcome in judged("loss", rows, "trl")}


def errors(found, kls=KLS, case="smollm2-135m-n32-bfloat16-full-accuracy"):
    return [dataclasses.replace(row("loss", "opcd_fast-native", None, f"{case}, KL {kl:g}"), group="accuracy",
                                status="ok" if error is not None else "failed",
                                values={"dL/dh": value(error or 0, "1"), "mean_kl": value(kl, "nats")})
            for kl, error in zip(kls, found)]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "kls", "status"),
    [([2e-3] * 5, KLS, "met"), ([2e-3] * 4 + [3.1e-3], KLS, "missed"), ([2e-3] * 4 + [None], KLS, "missed"),
     ([2e-3] * 4, KLS[:4], "unmeasured")],  # the smallest KL is where it would go wrong
)  # fmt: skip
def test_accuracy(found, kls, status):
    ((_, outcome),) = judged("loss", errors(found, kls), "", "error")
    assert outcome[0] == status


def test_copies_and_the_check_at_first_use():
    held = [
        row("teacher", name, 1.0, prefix=prefix, one_prefix=100.0)
        for name, prefix in (("opcd_fast-merge", 100.0), ("opcd_fast-pad", 100.0), ("transformers-cache", 1600.0))
    ]
    assert judged("teacher", held, "", "copies")[0][1][:2] == ("met", 1.0)
    held[1].values["prefix"] = value(200.0, "bytes")
    assert judged("teacher", held, "", "copies")[0][1][:2] == ("missed", 2.0)
    check = row("teacher", "opcd_fast-auto", 900.0, "self-verification")
    check.values["time"].high = 1100.0
    assert judged("teacher", [check], "", "seconds")[0][1][:2] == ("missed", 1.1)


# --- the page -----------------------------------------------------------------------------------------------


def write(folder, table, rows, whole=True, **options):
    path = folder / f"{table}_{options.get('date', '2030-01-02')[:10]}.jsonl"
    for line in (head(table, **options), *rows, *([end(table, rows)] if whole else [])):
        append(path, line)
    return path


LOSS = [row("loss", "opcd_fast-native", 50.0, of_bound=2.0, peak=1 << 20), row("loss", "trl", 80.0),
        row("loss", "liger-fused", None), row("loss", BOUND, 30.0), *errors([2e-3] * 5)]  # fmt: skip


def test_the_page_is_that_of_the_stored_results():
    """Whoever adds a result runs `python -m benchmarks.report` and commits what it writes."""
    results = ROOT / "benchmarks" / "results"
    found = report.newest(results)
    text = report.page(found, report.gpu_runs(results))
    assert text == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    runs = [(head, rows) for of in found.values() for _, head, rows in of]
    drawn = {plot.file for run in runs for plot in plots.of(*run)}
    assert len(drawn) >= 5 and drawn == {path.name for path in (ROOT / "docs" / "images").glob("*_cpu_*.svg")}


def test_the_newest_run_of_a_device_is_shown(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, out = tmp_path / "results", tmp_path / "docs" / "performance.md"
    write(results, "loss", [row("loss", BOUND, 777.0)], date="2030-01-01T03:04:05+00:00")
    sweep = [(name, {"N": n, "V": 9, "D": 8}) for n in (64, 256) for name in ("opcd_fast-native", BOUND)]
    swept = [dataclasses.replace(row("loss", name, 9.0, f"n{shape['N']}", of_bound=0.5), group="N", shape=shape)
             for name, shape in sweep]  # fmt: skip
    write(results, "loss", [*LOSS, *swept])
    write(results, "teacher", [row("teacher", "opcd_fast-merge", 50.0, at_once=7.0), row("teacher", "concat", 500.0)])
    write(results, "step", [row("step", "opcd_fast", 5e3, answer_tokens=384.0), row("step", "trl-sdft", 1e4)])
    assert report.main(["--results", str(results), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "777" not in text and "**Nothing here was measured on a GPU.**" in text and "**skipped**: not here" in text
    assert "| opcd_fast-native | 50 ms (50 to 50, 3 times) | of_bound 2, peak 1 MiB |" in text
    assert "| opcd_fast-merge | 50 ms (50 to 50, 3 times) | 7 | 0.1 |" in text, "its share of concat's time"
    assert "| opcd_fast | 5,000 ms (5,000 to 5,000, 3 times) | 384 | 0.5 | 76.8 tokens/s |" in text
    images = [path.name for path in (out.parent / "images").iterdir()]
    assert sorted(images) == ["loss_cpu_error_kl.svg", "loss_cpu_time_n.svg"]
    assert all(f"images/{name}" in text for name in images)
    first = [path.read_bytes() for path in sorted((out.parent / "images").iterdir())]
    assert report.main(["--results", str(results), "--out", str(out)]) == 0 and out.read_text(encoding="utf-8") == text
    assert [path.read_bytes() for path in sorted((out.parent / "images").iterdir())] == first


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (LOSS[:3], f"has no row of {BOUND}"),  # a missing case
        ([dataclasses.replace(LOSS[0], values={}), LOSS[3]], "has no time although"),
        ([dataclasses.replace(LOSS[4], values={"dL/dh": value(1e-3, "1")})], "has no mean_kl although"),
        (None, "its run was stopped"),
        ("half", "its run was stopped"),
    ],
)
def test_what_is_missing_is_no_page(tmp_path, capsys, rows, named):
    good = write(tmp_path / "results", "loss", LOSS, date="2030-01-01T03:04:05+00:00")
    path = write(tmp_path / "results", "loss", rows if isinstance(rows, list) else LOSS, whole=rows is not None)
    if rows == "half":
        path.write_bytes(path.read_bytes()[:-9])
    out = tmp_path / "docs" / "performance.md"
    assert report.main(["--results", str(tmp_path / "results"), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert path.name in message and named in message and not out.exists() and good.exists()


def test_the_page_needs_a_loss_table(tmp_path, capsys):
    write(tmp_path, "loss-quick", [dataclasses.replace(row, table="loss-quick") for row in LOSS])
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path / "performance.md")]) == 2
    assert "no run of the loss table" in capsys.readouterr().err


def test_whatever_part_of_a_gpu_run_came_back_is_shown(tmp_path):
    path, main = tmp_path / "gpu" / "gpu_first_2030.jsonl", "qwen3-0.6b-n16384-bfloat16-full"
    timed = [row("loss", name, ms, main) for name, ms in (("opcd_fast-triton", 128.4), (BOUND, 90.0))]
    lost = row("loss", "trl", None, main, status="failed", note="OutOfMemoryError: tried | 80 GiB")
    tests = [Row("gpu_tests", f"gpu/test_loss_gpu.py::test_it[{i}]", values={"time": value(1, "ms")}) for i in range(3)]
    bad = Row("gpu_tests", "gpu/test_loss_gpu.py::test_other", status="failed", note="E assert 2 <= 1")
    for line in (head("loss", H100), *timed, lost, end("loss", [*timed, lost]), head("gpu_tests", H100), *tests, bad,
                 Row("gpu_tests", "cut off", values={"time": value(1, "s")})):  # fmt: skip
        append(path, line)
    path.write_bytes(path.read_bytes()[:-9])
    write(tmp_path, "loss", LOSS)
    text = report.page(report.newest(tmp_path), report.gpu_runs(tmp_path))
    assert "Nothing here was measured on a GPU" not in text and "NVIDIA H100 80GB HBM3; commit abc" in text
    assert f"{main} | NVIDIA H100 80GB HBM3 | **met** | 0.70 | opcd_fast-triton 128.4 ms" in text
    assert f"| {main}; N 512, V 49,152, D 576, dtype float32" in text and "| opcd_fast-triton | 128.4 ms (" in text
    assert "**failed**: OutOfMemoryError: tried \\| 80 GiB |" in text
    assert "Cut off in the file: line 11." in text and "**Not finished**: the run ended before it." in text
    assert "| 3 tests passed |" in text and "::test_it" not in text and "test_other |  | **failed**" in text


def test_the_summary_is_short_and_names_what_failed(tmp_path):
    rows = [Row("loss", f"a case with a long name {i}", status="failed", note=f"reason {i} " * 40) for i in range(99)]
    rows += [Row("smoke", f"row {i}", values={"time": value(i, "ms")}) for i in range(99)]
    rows += [Row("smoke", END, seconds=3.0), Row("loss", END, status="timeout", note="stopped", seconds=92.0)]
    lines = summary(Run(rows=rows, damaged=[7]), [phase.name for phase in RUNS["first"]], tmp_path, 431.0)
    assert len(lines) <= LINES == 40 and max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    for said in ("2 of 10 phases in 431 s, 100 rows failed", "timeout 92 s", "reason 0", "and 88 more", "99 ok",
                 "row 0 0 ms", "teacher    not reached", "cut off: 7"):  # fmt: skip
        assert said in text, said


# --- arithmetic that the docs quote --------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "response", "batch"), [(7, 3, 4), (1, 1, 1), (2, 9, 2)])
def test_pairs_are_counted_one_by_one(context, response, batch):
    shape = models.Shape(layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, intermediate=1)
    pairs = sum(key <= query for query in range(context + response) for key in range(context + response))
    of_context = sum(key <= query for query in range(context) for key in range(context))
    whole = teacher_model.concat_flops(shape, context, response, batch)
    assert whole == batch * ((context + response) * 14 + 4 * pairs)
    built, rebuilt = (teacher_model.shared_flops(shape, context, response, batch, build=x) for x in (False, True))
    assert built == batch * (response * 14 + 4 * (pairs - of_context))
    assert rebuilt - built == context * 14 + 4 * of_context


def test_figures_in_the_docs_are_the_models():
    text = (ROOT / "docs" / "teacher.md").read_text(encoding="utf-8")
    row_of = r"^\| ([\d,]+) \| (\d+) of ([\d,]+) tokens \| ([\d.]+) \| ([\d.]+) \|$"
    found = re.findall(row_of, text, re.MULTILINE)
    assert len(found) == 4
    for context, batch, response, kept, rebuilt in found:
        sizes = [int(size.replace(",", "")) for size in (context, response, batch)]
        quoted = [f"{value:.1f}" for value in teacher_model.speedups(models.SHAPES["Qwen3-8B"], *sizes)]
        assert quoted == [rebuilt, kept]
