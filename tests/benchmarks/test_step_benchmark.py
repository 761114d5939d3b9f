"""The table of whole steps runs, its targets are judged from rows alone, and the page shows them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks import step_report, step_table, step_worker  # noqa: E402
from benchmarks.measure import Failure  # noqa: E402
from benchmarks.schema import STEP_GROUPS, Device, Report, StepRow, Time, from_json, read, select  # noqa: E402
from benchmarks.step_cases import cases, make_job  # noqa: E402

CPU = torch.device("cpu")


def _row(implementation: str, seconds: float | None, case: str = "demo-bf16-checkpointed", **changes) -> StepRow:
    row = StepRow(case, implementation, "SmolLM2-135M", 16, 24, 150, "bfloat16", True)
    if seconds is None:
        row.status, row.note = "skipped", "No module named 'trl'"
    else:
        row.time_ms, row.answer_tokens = Time(1e3 * seconds, 1e3 * seconds, 1e3 * seconds, 3), 384.0
        row.peak_bytes = 1 << 30
    return dataclasses.replace(row, **changes)


def _report(rows: list[StepRow], name: str = "A CPU") -> Report:
    device = Device("cpu" if "CPU" in name else "cuda", name, 2, None, None, None)
    date = "2030-01-02T03:04:05+00:00"
    return Report("step", date, "python -m x", "abc", False, device, {}, complete=True, steps=rows)


def _verdict(measure: str, rows: list[StepRow], name: str = "A CPU"):
    (found,) = [v for v in step_report.judge([_report(rows, name)]) if v.target.measure == measure and v.device == name]
    return found


@pytest.mark.parametrize(("ours", "status"), [(7.0, "met"), (7.1, "missed")])
def test_time_target(ours, status):
    verdict = _verdict("time", [_row("opcd_fast", ours), _row("trl-sdft", 14.0)])
    assert verdict.status == status and verdict.value == pytest.approx(ours / 14)


def test_rate_counts_tokens_and_memory_counts_bytes():
    case = {"case": "1.7b-4k-64x512-checkpointed"}
    rows = [_row("opcd_fast", 10.0, answer_tokens=300.0, peak_bytes=1 << 29, **case), _row("trl-sdft", 25.0, **case)]
    rate, memory = (_verdict(measure, rows, "NVIDIA H100 80GB HBM3") for measure in ("rate", "memory"))
    assert rate.value == pytest.approx((300 / 10) / (384 / 25)) and rate.status == "missed"
    assert memory.value == 0.5 and memory.status == "missed"


@pytest.mark.parametrize("rows", [[], [_row("opcd_fast", None)], [_row("opcd_fast", 5.0), _row("trl-sdft", None)]])
def test_what_was_not_measured_is_neither_met_nor_missed(rows):
    assert _verdict("time", rows).status == "unmeasured"


def test_a_failure_of_ours_is_a_miss():
    rows = [_row("opcd_fast", None, status="out of memory", note="x"), _row("trl-sdft", 14.0)]
    assert _verdict("time", rows).status == "missed"


def test_rows_are_checked(tmp_path):
    assert from_json(dataclasses.asdict(_report([_row("opcd_fast", 1.0)]))).steps[0].answer_tokens == 384
    for changes, field in (({"answer_tokens": None}, "answer_tokens"), ({"group": "other"}, "group")):
        with pytest.raises(ValueError, match=field):
            _report([_row("opcd_fast", 1.0, **changes)]).validate()
    with pytest.raises(ValueError, match="twice"):
        _report([_row("opcd_fast", 1.0)] * 2).validate()


def test_page():
    rows = [_row("opcd_fast", 5.0, parts_ms={"rollout": 2000.0}), _row("trl-sdft", 14.0), _row("in trl", None)]
    text = "\n".join(step_report.section([("step_cpu.json", _report(rows))], lambda name, report: [name]))
    assert "| opcd_fast | 5.00 (5.00 to 5.00, 3 steps) | 0.36 | 384 | 76.8 | 1,024 | rollout 2.00 |" in text
    assert "skipped: No module named 'trl'" in text and "**met**" in text
    assert "No results file" in "\n".join(step_report.section([], lambda name, report: []))


def test_cases_are_named_once_and_grouped():
    for device in (CPU, torch.device("cuda")):
        every = cases(device, quick=False)
        assert len({case.name for case in every}) == len(every) and {case.group for case in every} <= set(STEP_GROUPS)
        assert all(case.prompts % case.micro_batch == 0 for case in every)
    names = {case.name for device in ("cpu", "cuda") for case in cases(torch.device(device), quick=False)}
    assert {target.case for target in step_report.TARGETS} <= names
    with pytest.raises(ValueError, match="unknown group"):
        select(cases(CPU, False), ["other"], STEP_GROUPS)


def test_job_is_the_same_for_all():
    (case,) = cases(CPU, quick=True)
    one, two = make_job(case, CPU), make_job(case, CPU)
    assert one.context == two.context and one.questions == two.questions
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    ids = one.tokenizer.apply_chat_template(one.context, return_dict=False)
    assert len(ids) == case.context_words + 2 and max(ids) < one.model.config.vocab_size  # <system>, words, <end>
    assert one.tokenizer.unk_token_id not in ids and one.tokenizer.eos_token_id == one.model.config.eos_token_id


def test_ours_is_timed_in_a_process_of_its_own(tmp_path):
    options = ["--steps", "2", "--rounds", "1", "--trainers", "opcd_fast"]
    assert step_table.main(["--quick", "--out", str(tmp_path), *options]) == 0
    (path,) = tmp_path.glob("step-quick_cpu_*.json")
    (row,) = read(path).steps
    assert row.status == "ok" and row.time_ms.count == 2 and row.answer_tokens == 24 and row.peak_bytes > 0
    assert set(row.parts_ms) >= {"rollout", "teacher", "student", "loss", "backward", "optimizer"}
    assert sum(row.parts_ms.values()) < 2 * row.time_ms.max and json.loads(path.read_text())["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", step_table.TRAINERS[1:])
def test_peers_run(trainer):
    pytest.importorskip("trl")
    outcome = step_table.one_process(cases(CPU, quick=True)[0], trainer, CPU, steps=1, timeout=300)
    assert not isinstance(outcome, Failure), outcome
    assert outcome["answer_tokens"] == [24.0] and len(outcome["seconds"]) == 1


def test_a_peer_that_fails_is_a_row(monkeypatch, tmp_path):
    def one_process(case, trainer, device, steps, timeout):
        if trainer != "opcd_fast":
            return Failure("failed", "ValueError: no")
        return {"seconds": [1.0, 3.0], "answer_tokens": [24.0, 22.0], "peak_bytes": 5, "context": 26, "parts": {}}

    monkeypatch.setattr(step_table, "one_process", one_process)
    assert step_table.main(["--quick", "--out", str(tmp_path), "--rounds", "2"]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = {row.implementation: row for row in read(path).steps}
    assert rows["opcd_fast"].time_ms == Time(2000.0, 1000.0, 3000.0, 4) and rows["opcd_fast"].answer_tokens == 23
    assert rows["trl-sdft"].status == "failed" and rows["trl-sdft"].note == "ValueError: no"


def test_a_process_that_fails_later_leaves_what_was_measured(monkeypatch, tmp_path):
    left = [{"seconds": [2.0], "answer_tokens": [24.0], "peak_bytes": 5, "context": 26, "parts": {}}]
    monkeypatch.setattr(step_table, "one_process", lambda *_, **__: left.pop() if left else Failure("failed", "late"))
    options = ["--rounds", "2", "--trainers", "opcd_fast"]
    assert step_table.main(["--quick", "--out", str(tmp_path), *options]) == 0
    (row,) = read(next(tmp_path.glob("*.json"))).steps
    assert row.time_ms.count == 1 and row.note == "a later process failed: late"


def test_what_a_process_says_when_it_fails(monkeypatch):
    def run(*_, **__):
        return subprocess.CompletedProcess([], 1, "", "Traceback\nModuleNotFoundError: No module named 'trl'\n")

    monkeypatch.setattr(step_table.subprocess, "run", run)
    outcome = step_table.one_process(cases(CPU, quick=True)[0], "trl-sdft", CPU, 1, 5)
    assert outcome == Failure("skipped", "ModuleNotFoundError: No module named 'trl'")


@pytest.mark.parametrize("trainer", ["opcd_fast", "trl-sdft"])
def test_peers_are_spared_cudnns_plans(trainer, monkeypatch):
    seen = {}

    def run(*_, env, **__):
        seen.update(env)
        return subprocess.CompletedProcess([], 1, "", "ValueError: x")

    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    monkeypatch.setattr(step_table.subprocess, "run", run)
    step_table.one_process(cases(CPU, quick=True)[0], trainer, CPU, 1, 5)
    assert seen["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert seen.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == (None if trainer == "opcd_fast" else "1")


def test_bad_arguments(tmp_path, capsys):
    assert step_table.main(["--quick", "--out", str(tmp_path), "--groups", "other"]) == 2
    for arguments in (["--steps", "0"], ["--trainers", "nobody"]):
        with pytest.raises(SystemExit) as stop:
            step_table.main(["--quick", "--out", str(tmp_path), *arguments])
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        step_worker.main(["tiny", "nobody", "--steps", "1"])
