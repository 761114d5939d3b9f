"""The table of the teacher runs, its rows say what they must, and the page is made of them alone."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks.teacher_implementations import Contender, Implementation, implementations  # noqa: E402
from benchmarks.teacher_report import table  # noqa: E402

from benchmarks import report as report_page  # noqa: E402
from benchmarks import (  # noqa: E402
    teacher_cases,
    teacher_implementations,
    teacher_model,
    teacher_plots,
    teacher_table,
    teacher_targets,
)
from benchmarks.measure import time_interleaved  # noqa: E402
from benchmarks.schema import (  # noqa: E402
    BOUND,
    TEACHER_GROUPS,
    TIMED_TEACHER_GROUPS,
    Device,
    Report,
    TeacherRow,
    Time,
    from_json,
    read,
    select,
)
from benchmarks.teacher_cases import Case, cases, make_setting, references, tiny_model  # noqa: E402
from benchmarks.teacher_model import QWEN3_8B, SMOLLM2_135M, Shape  # noqa: E402

CPU = torch.device("cpu")
SMALL = Case(20, 5, 3)


@pytest.fixture(scope="module")
def setting():
    return make_setting(tiny_model(CPU), SMALL)


# --- the model ----------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_modules(setting):
    """2 for each weight of a linear map, against the model itself; and the sizes that rows and tables quote."""
    weights = sum(m.weight.numel() for m in setting.body.modules() if isinstance(m, torch.nn.Linear))
    assert Shape.of(setting.model.config).flops_per_token == 2 * weights
    assert QWEN3_8B.flops_per_token == 13_891_534_848 and QWEN3_8B.flops_per_pair == 589_824
    assert QWEN3_8B.kv_bytes(8192, 2) == 9 * 2**30 // 8  # 1.125 GiB
    assert SMOLLM2_135M.flops_per_pair == 4 * 30 * 576


@pytest.mark.parametrize(("context", "response", "batch"), [(7, 3, 4), (1, 1, 1), (2, 9, 2)])
def test_pairs_are_counted_one_by_one(context, response, batch):
    shape = Shape(layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, intermediate=1)
    pairs = sum(key <= query for query in range(context + response) for key in range(context + response))
    of_context = sum(key <= query for query in range(context) for key in range(context))
    whole = batch * ((context + response) * 14 + 4 * pairs)
    assert teacher_model.concat_flops(shape, context, response, batch) == whole
    built = teacher_model.shared_flops(shape, context, response, batch, build=False)
    assert built == batch * (response * 14 + 4 * (pairs - of_context))
    rebuilt = teacher_model.shared_flops(shape, context, response, batch, build=True)
    assert rebuilt - built == context * 14 + 4 * of_context
    assert batch > 1 or rebuilt == whole


def test_modelled_speedups():
    """Known to be large with long contexts and many answers, small with long answers."""
    assert teacher_model.speedups(QWEN3_8B, 8192, 512, 64) == pytest.approx((12.2, 14.8), abs=0.05)
    assert teacher_model.speedups(QWEN3_8B, 2048, 4096, 64) == pytest.approx((1.4, 1.4), abs=0.05)
    assert len(teacher_model.markdown()) == 4 + len(teacher_model.CASES)


def test_figures_in_the_docs_are_the_model_s():
    """docs/teacher.md quotes arithmetic, and says so."""
    text = (ROOT / "docs" / "teacher.md").read_text(encoding="utf-8")
    assert "python -m benchmarks.teacher_model" in text
    row = r"^\| ([\d,]+) \| (\d+) of ([\d,]+) tokens \| ([\d.]+) \| ([\d.]+) \|$"
    found = re.findall(row, text, re.MULTILINE)
    assert len(found) == 4
    for context, batch, response, kept, rebuilt in found:
        sizes = [int(size.replace(",", "")) for size in (context, response, batch)]
        assert [f"{value:.1f}" for value in teacher_model.speedups(QWEN3_8B, *sizes)] == [rebuilt, kept]


# --- the contenders -----------------------------------------------------------------------------------------


def _contenders(setting, case):
    return {one.name: one for one in implementations(case, setting)}


def test_all_contenders_give_the_same_hidden_states(setting):
    """Every answer of the batch, again in a second call: no cache may have grown or moved."""
    body, start = setting.body, setting.context.numel()
    with torch.no_grad():
        alone = [body(input_ids=torch.cat([setting.context, ids])[None]).last_hidden_state[0, start:]
                 for ids in setting.answers]  # fmt: skip
    found = _contenders(setting, SMALL)
    assert len(found) == 7
    one = setting.shape.kv_bytes(start, 4)
    copies = {"concat": 0, "transformers-cache": 3, "transformers-cache-rebuilt": 3}
    for name, implementation in found.items():
        assert implementation.skip is None
        contender = implementation.build(setting)
        for _ in range(2):
            hidden = contender.call()
            if name != BOUND:
                torch.testing.assert_close(hidden, torch.cat(alone), atol=1e-5, rtol=0)
        if name != BOUND:
            assert contender.held() == copies.get(name, 1) * one, name


def test_each_call_runs_the_tokens_that_its_limit_counts(setting):
    """Kept prefixes are not read again, rebuilt ones in every call."""
    seen: list[int] = []
    mlp = setting.body.layers[0].mlp
    hook = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    try:
        for name, implementation in _contenders(setting, SMALL).items():
            contender = implementation.build(setting)
            for _ in range(2):
                seen.clear()
                contender.call()
                expected = {"concat": 3 * 25, BOUND: 0}.get(name, 3 * 5 + (20 if "rebuilt" in name else 0))
                assert sum(seen) == expected, name
    finally:
        hook.remove()


def test_references_are_the_first_and_the_last_answer(setting):
    exact = references(setting.model, [SMALL])[SMALL.name]
    hidden = _contenders(setting, SMALL)["concat"].build(setting).call().view(3, 5, -1)
    torch.testing.assert_close(hidden[[0, 2]], exact, atol=1e-5, rtol=0)
    assert torch.equal(make_setting(setting.model, SMALL).answers, setting.answers)


@pytest.mark.parametrize(("layers", "name"), [(None, "Qwen3-8B"), (3, "3 layers of a Qwen3-8B")])
def test_the_model_on_a_gpu_has_the_modelled_shape(layers, name):
    model, found, _ = teacher_cases._large_model(torch.device("meta"), layers)
    assert found == name and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert Shape.of(model.config) == dataclasses.replace(QWEN3_8B, layers=layers or 36)
    weights = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    assert 2 * weights == Shape.of(model.config).flops_per_token
    longest = max(case.context + case.response for case in cases(torch.device("cuda"), quick=False))
    assert longest <= model.config.max_position_embeddings
    with pytest.raises(ValueError, match="1 to 36"):
        teacher_cases._large_model(torch.device("meta"), 37)


def test_concat_in_parts(setting, monkeypatch):
    whole = _contenders(setting, SMALL)["concat"].build(setting)
    monkeypatch.setattr(teacher_implementations, "CONCAT_TOKENS", 51)
    parts = _contenders(setting, SMALL)["concat"].build(setting)
    assert (whole.at_once, parts.at_once) == (None, 2)
    torch.testing.assert_close(parts.call(), whole.call(), atol=1e-5, rtol=0)


def test_flex_is_a_row_with_a_reason(setting):
    found = _contenders(setting, dataclasses.replace(SMALL, group="flex"))
    assert set(found) == {"opcd_fast-merge", "flex-mask", BOUND}
    assert "GPU" in found["flex-mask"].skip


@pytest.mark.slow
def test_flex_gives_the_same_hidden_states():
    """It is compared on a GPU only, but its mask and positions are right or wrong anywhere. Compiles for half a
    minute."""
    case = Case(140, 8, 4, "flex")
    setting = make_setting(tiny_model(CPU), case)
    contender = teacher_implementations._flex(setting)
    exact = _contenders(setting, dataclasses.replace(case, group="main"))["concat"].build(setting).call()
    torch.testing.assert_close(contender.call(), exact, atol=1e-5, rtol=0)
    assert contender.held() == setting.shape.kv_bytes(140, 4)
    assert setting.model.config._attn_implementation == "sdpa"


def test_cases():
    for device in (CPU, torch.device("cuda")):
        chosen = cases(device, quick=False)
        assert len({case.name for case in chosen}) == len(chosen)
        targets = [t for t in teacher_targets.TARGETS if t.sizes and (t.devices == ("cpu",)) == (device == CPU)]
        assert targets
        for target in targets:  # what must not be lost comes first
            assert target.sizes == (chosen[0].context, chosen[0].response, chosen[0].batch)
        assert chosen[0].group == "main" and chosen[-1].group == "flex"
        assert select(chosen, ["flex"], TIMED_TEACHER_GROUPS) == chosen[-1:]
        with pytest.raises(ValueError, match="'speed'"):
            select(chosen, ["speed"], TIMED_TEACHER_GROUPS)


# --- the table ----------------------------------------------------------------------------------------------


def _run(tmp_path, *options):
    status = teacher_table.main(["--out", str(tmp_path), "--quick", "--device", "cpu", "--case-seconds", "0", *options])
    (path,) = tmp_path.glob("*.json")
    return status, read(path)


def test_quick_table(tmp_path):
    status, report = _run(tmp_path)
    assert status == 0 and report.complete and report.benchmark == "teacher-quick" and not report.rows
    assert {row.group for row in report.teacher} == set(TEACHER_GROUPS)
    for case in cases(CPU, quick=True):
        rows = {row.implementation: row for row in report.teacher if row.case == case.name}
        for name, row in rows.items():
            assert (row.context, row.response, row.batch) == (case.context, case.response, case.batch)
            if name == "flex-mask" and row.status == "skipped":
                assert row.note
                continue
            assert row.status == "ok" and row.time_ms.count >= 3
            if name == BOUND:
                assert "one layer" in row.note and row.peak_bytes is row.max_error is row.limit_ms is None
                continue
            assert row.max_error <= 1e-5 and row.peak_bytes > 0 and row.note is None
            assert row.limit_ms == pytest.approx(row.flops / rows[BOUND].flops * rows[BOUND].time_ms.median)
            if name.startswith("opcd_fast"):
                assert row.prefix_bytes == row.one_prefix_bytes
    (check,) = (row for row in report.teacher if row.group == "check")
    assert "'merge'" in check.note and check.time_ms.count == 3


def test_peak_memory_counts_what_a_call_builds(setting):
    """The prefix belongs to the peak of the call that builds it, and to no other."""
    rows = {row.implementation: row for row in teacher_table.measure_case(SMALL, setting, "m", None, 0.0)}
    grown = rows["opcd_fast-merge-rebuilt"].peak_bytes - rows["opcd_fast-merge"].peak_bytes
    assert grown >= 0.9 * rows["opcd_fast-merge"].one_prefix_bytes
    assert "no error" in rows["opcd_fast-merge"].note and rows["opcd_fast-merge"].max_error is None


def test_wrong_slow_and_failing_contenders(tmp_path, monkeypatch):
    def no_memory():
        raise torch.OutOfMemoryError("tried to allocate 80.00 GiB")

    def contenders(case, setting):
        mine, *_, bound = implementations(case, setting)
        right = mine.build(setting)
        made = {
            "far": lambda: right.call() + 1.0,
            "broken": lambda: right.call() * float("nan"),
            "large": no_memory,
            "slow": right.call,
        }
        return [
            mine,
            *(Implementation(n, lambda s, c=c: Contender(c, right.held), mine.flops) for n, c in made.items()),
            bound,
        ]

    monkeypatch.setattr(teacher_table, "implementations", contenders)
    monkeypatch.setattr(teacher_table, "SLOW_MS", 0.0)
    status, report = _run(tmp_path, "--groups", "main")
    rows = {row.implementation: row for row in report.teacher}
    assert status == 0 and report.benchmark == "teacher-quick-main"
    assert rows["far"].max_error == pytest.approx(1.0, abs=1e-4) and rows["opcd_fast-merge"].max_error < 1e-5
    assert rows["broken"].status == "failed" and "NaN" in rows["broken"].note
    assert rows["large"].status == "out of memory"
    assert rows["slow"].time_ms.count == 2


def test_ours_failing_fails_the_table(tmp_path, monkeypatch):
    def contenders(case, setting):
        mine, *_ = implementations(case, setting)
        wrong = lambda setting: (_ for _ in ()).throw(RuntimeError("no kernel image"))  # noqa: E731
        return [dataclasses.replace(mine, build=wrong), implementations(case, setting)[-1]]

    monkeypatch.setattr(teacher_table, "implementations", contenders)
    status, report = _run(tmp_path, "--groups", "main")
    assert status == 1 and report.teacher[0].status == "failed" and "kernel image" in report.teacher[0].note


def test_no_case_starts_too_late_and_bad_arguments(tmp_path, capsys):
    status, report = _run(tmp_path, "--limit-seconds", "-1")
    assert status == 0 and {row.status for row in report.teacher if row.group != "check"} == {"skipped"}
    assert teacher_table.main(["--out", str(tmp_path), "--quick", "--groups", "speed"]) == 2
    assert "unknown group 'speed'" in capsys.readouterr().err
    assert teacher_table.main(["--out", str(tmp_path), "--quick", "--layers", "2"]) == 2
    assert "--layers is for the model on a GPU" in capsys.readouterr().err


def test_rounds_of_slow_contenders():
    done: list[str] = []
    calls = {name: (lambda name=name: done.append(name)) for name in "ab"}
    times = time_interleaved(calls, CPU, seconds=0.0, min_rounds=3, warm=True, at_most={"a": 1})
    assert done == ["a", "b", "b", "b"] and times["a"].count == 1 and times["b"].count == 3
    assert "a" not in time_interleaved(calls, CPU, seconds=0.0, warm=True, at_most={"a": 0})


# --- the page -----------------------------------------------------------------------------------------------


def _row(implementation: str, ms: float | None, **changes) -> TeacherRow:
    row = TeacherRow(
        "c", implementation, "SmolLM2-135M", 30, 1024, 64, 16, "float32", peak_bytes=1 << 20, max_error=1e-5,
        prefix_bytes=100, one_prefix_bytes=100, flops=1.0, sequences_at_once=16,
    )  # fmt: skip
    if ms is None:
        row.status, row.note = "skipped", "not here"
    else:
        row.time_ms = Time(ms, ms, ms, 3)
    return dataclasses.replace(row, **changes)


def _report(rows: list[TeacherRow], name: str = "a CPU", date: str = "2030-01-02T03:04:05+00:00") -> Report:
    device = Device("cpu" if "CPU" in name else "cuda", name, 2, None, None, None)
    return Report("teacher", date, "python -m x", "abc", False, device, {"torch": "2.13"}, complete=True, teacher=rows)


def _verdicts(rows, name="a CPU"):
    found = teacher_targets.judge([_report(rows, name)])
    return {(v.target.measure, v.target.implementation): v for v in found if v.device == name}


@pytest.mark.parametrize(("ms", "status"), [(125.0, "met"), (126.0, "missed")])
def test_speed_target(ms, status):
    verdicts = _verdicts([_row("opcd_fast-merge", ms), _row("concat", 1000.0)])
    verdict = verdicts["speed", "opcd_fast-merge"]
    assert verdict.status == status and verdict.value == pytest.approx(1000 / ms)
    assert verdicts["speed", "opcd_fast-merge-rebuilt"].status == "unmeasured"


def test_targets_without_a_measurement():
    assert {v.status for v in teacher_targets.judge([])} == {"unmeasured"}
    fast, slow = _row("opcd_fast-merge", 1.0), _row("concat", 1000.0)
    for change in ({"batch": 8}, {"group": "flex"}, {"model": "12 layers of a Qwen3-8B"}):
        rows = [dataclasses.replace(row, **change) for row in (fast, slow)]
        assert _verdicts(rows)["speed", "opcd_fast-merge"].status == "unmeasured", change
    assert _verdicts([fast, _row("concat", None)])["speed", "opcd_fast-merge"].status == "unmeasured"
    broken = _row("opcd_fast-merge", None, status="failed", note="no kernel")
    assert _verdicts([broken, slow])["speed", "opcd_fast-merge"].status == "missed"
    large = {"model": "Qwen3-8B", "context": 8192, "response": 512, "batch": 64, "layers": 36}
    rows = [dataclasses.replace(row, **large) for row in (fast, slow)]
    verdicts = _verdicts(rows, "NVIDIA H100 80GB")
    assert verdicts["speed", "opcd_fast-merge"].status == "met"
    assert verdicts["attention", "opcd_fast-merge"].status == "unmeasured"


def test_copies_and_first_use():
    rows = [_row("opcd_fast-merge", 1.0), _row("opcd_fast-pad", 1.0, batch=4, case="d")]
    assert _verdicts(rows)["copies", "opcd_fast-merge"].status == "met"
    rows.append(_row("opcd_fast-merge", 1.0, case="e", prefix_bytes=101))
    assert _verdicts(rows)["copies", "opcd_fast-merge"].value == pytest.approx(1.01)
    assert _verdicts(rows)["copies", "opcd_fast-merge"].status == "missed"
    check = _row("opcd_fast-auto", 900.0, group="check", case="f")
    assert _verdicts([check])["seconds", "opcd_fast-auto"].status == "met"
    check.time_ms = Time(900.0, 900.0, 1100.0, 3)  # the longest counts: it is what a user waits for
    assert _verdicts([check])["seconds", "opcd_fast-auto"].status == "missed"


def test_table_of_a_case():
    rows = [
        _row("opcd_fast-merge", 50.0, limit_ms=25.0),
        _row("concat", 500.0, prefix_bytes=0, sequences_at_once=7),
        _row("transformers-cache", 100.0, prefix_bytes=1600),
        _row("flex-mask", None),
    ]
    lines = table(rows)[2:]
    assert lines[0].startswith("| opcd_fast-merge | 50 (50 to 50) | 10.0× | 50% | 1 | 1× (0.0 MiB) | 1.0e-05 |")
    assert "| 1.0× |" in lines[1] and "not kept" in lines[1] and "7 answers at a time" in lines[1]
    assert "| 5.0× |" in lines[2] and "16× (0.0 MiB)" in lines[2]
    assert lines[3].endswith("skipped: not here |")


def _curves():
    rows = []
    for context in (256, 1024):
        for batch in (4, 16):
            sizes = {"case": f"{context}-{batch}", "context": context, "batch": batch}
            rows.append(_row("opcd_fast-merge", 10.0, **sizes, flops=1.0))
            rows.append(_row("concat", 1.0 * context, **sizes, flops=20.0))
    return rows


def test_plots_vary_one_size():
    panels = teacher_plots.swept(_curves(), "context", teacher_plots.speedup, with_model=True)
    assert set(panels) == {f"response = 64, batch = {batch}, SmolLM2-135M" for batch in (4, 16)}
    panel = panels["response = 64, batch = 4, SmolLM2-135M"]
    assert panel["opcd_fast-merge"] == [(256, 25.6), (1024, 102.4)]
    assert panel["opcd_fast-merge, model"] == [(256, 20.0), (1024, 20.0)]
    assert teacher_plots.swept(_curves(), "response", teacher_plots.speedup) == {}


@pytest.mark.parametrize("with_teacher", [False, True])
def test_page(tmp_path, with_teacher):
    pytest.importorskip("matplotlib")
    results, out = tmp_path / "results", tmp_path / "docs" / "performance.md"
    Report(
        "loss", "2030-01-01T00:00:00+00:00", "c", None, None, Device("cpu", "a CPU", 2, None, None, None), {},
        complete=True,
    ).write(results / "loss.json")  # fmt: skip
    if with_teacher:
        stale = _report([_row("opcd_fast-merge", 777.0), _row("concat", 778.0)], date="2029-01-02T03:04:05+00:00")
        for one in (stale, _report(_curves())):
            one.write(results / one.file_name())
    assert report_page.main(["--results", str(results), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "## The shared-prefix teacher" in text and "| 8,192 | 512 | 64 |" in text and "777" not in text
    assert ("the numbers below are arithmetic" in text) == (not with_teacher)
    images = sorted(path.name for path in out.parent.glob("images/*"))
    if with_teacher:
        assert images == ["teacher_cpu_memory_batch.svg", "teacher_cpu_speedup_context.svg"]
        assert all(f"images/{name}" in text for name in images) and "teacher_cpu_2030-01-02.json" in text
        assert "#### Context 1,024, 16 answers of 64, SmolLM2-135M, float32" in text and "102.4×" in text
    else:
        assert images == [] and "**met**" not in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d["teacher"][0].update(group="speed"), r"teacher\[0\].group is 'speed'"),
        (lambda d: d["teacher"][0].update(batch=0), "must be positive"),
        (lambda d: d["teacher"][0].update(time_ms=None), "time_ms is missing"),
        (lambda d: d["teacher"][0].update(max_error=None), "why max_error is missing"),
        (lambda d: d["teacher"][0].update(peak_bytes=None), "why peak_bytes is missing"),
        (lambda d: d["teacher"][0].update(max_error=-1.0), "not negative"),
        (lambda d: d["teacher"][1].update(note=None), r"teacher\[1\].note"),
        (lambda d: d["teacher"][1].update(implementation="opcd_fast-merge"), "appears twice"),
    ],
)
def test_schema_refuses(change, named):
    data = dataclasses.asdict(_report([_row("opcd_fast-merge", 1.0), _row("flex-mask", None)]))
    assert from_json(json.loads(json.dumps(data))).teacher
    change(data)
    with pytest.raises(ValueError, match=named):
        from_json(data)
