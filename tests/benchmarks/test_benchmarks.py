"""The benchmarks run, and their files say what they must; how fast anything is, is not tested here."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks.loss_implementations import Implementation, implementations  # noqa: E402

from benchmarks import loss_table, peers  # noqa: E402
from benchmarks.loss_cases import Case, cases, make_inputs, oracle, oracle_rows  # noqa: E402
from benchmarks.measure import Failure, attempt, time_interleaved, with_peak  # noqa: E402
from benchmarks.schema import (  # noqa: E402
    BOUND,
    FIRST_SCHEMA,
    GROUPS,
    OURS,
    SECOND_SCHEMA,
    Device,
    GradientError,
    Report,
    Row,
    Time,
    from_json,
    read,
    select,
)

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
        (lambda d: d["rows"][0].update(group="speed"), r"rows\[0\].group is 'speed'"),
        (lambda d: d["rows"][0]["gradient_error"][0].update(of="bias"), "of 'bias'"),
    ],
)
def test_schema_refuses(change, named):
    data = json.loads(json.dumps(dataclasses.asdict(_report())))
    change(data)
    with pytest.raises(ValueError, match=named):
        from_json(data)


def test_files_of_older_schemas_are_read():
    data = json.loads(json.dumps(dataclasses.asdict(_report())))
    data["schema"] = SECOND_SCHEMA
    del data["teacher"]
    assert from_json(data) == _report()
    data["schema"] = FIRST_SCHEMA
    for row in data["rows"]:
        del row["group"], row["workspace_bytes"]
        for error in row["gradient_error"]:
            del error["of"]
    assert from_json(data) == _report()


def test_stored_results_are_valid():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        report = read(path)
        assert report.complete and (report.rows or report.teacher or report.steps), path.name


def test_oracle_is_autograd_in_float64():
    case = cases(CPU, quick=True)[0]
    inputs = make_inputs(case, CPU, 1e-2)
    kl, dh, dw = oracle(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t, weight=True)
    h = inputs.h_s.detach().double().requires_grad_()
    w = inputs.w_s.detach().double().requires_grad_()
    log_p = torch.log_softmax(h @ w.T, -1)
    log_q = torch.log_softmax(inputs.h_t.double() @ inputs.w_t.double().T, -1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(kl, expected.detach())
    for gradient, reference in zip((dh, dw), torch.autograd.grad(expected.sum(), (h, w))):
        torch.testing.assert_close(gradient, reference)
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
    arguments = [
        "--out",
        str(tmp_path),
        "--quick",
        "--device",
        "cpu",
        "--case-seconds",
        "0",
        "--without",
        "compile-fp32",
    ]
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


def test_cases():
    for device in (CPU, torch.device("cuda")):
        chosen = cases(device, quick=False)
        assert len({case.name for case in chosen}) == len(chosen)
        assert {case.group for case in chosen} == set(GROUPS)
        # What must not be lost.
        assert [case.group for case in chosen[:3]] == ["main", "main", "accuracy"]
        assert {case.frozen for case in chosen if case.group == "main"} == {False, True}
        assert all((case.workspace_bytes is not None) == (case.group == "workspace") for case in chosen)
        assert {case.group for case in select(chosen, ["N", "D"], GROUPS)} == {"N", "D"}
        with pytest.raises(ValueError, match="'speed'"):
            select(chosen, ["speed"], GROUPS)


def test_implementations():
    case = Case("c", 8, 64, 16, torch.bfloat16, False)
    found = {i.name: i for i in implementations(case, CPU)}
    names = {"trl", "liger-fused", "liger-chunked", "eager-fp32", "eager-bf16-logits", "compile-bf16-logits", BOUND}
    assert names < set(found) and "opcd_fast-torch" in found
    assert all(i.ours == (name in OURS) for name, i in found.items())
    assert {name for name, i in found.items() if not i.exact} == {n for n in names if "bf16" in n} | {
        "liger-fused",
        "liger-chunked",
    }
    of_group = {
        group: {i.name for i in implementations(dataclasses.replace(case, group=group), CPU)} for group in GROUPS
    }
    assert of_group["workspace"] == {name for name in found if name in OURS} | {BOUND}
    assert of_group["accuracy"] == set(found) - {BOUND, "compile-bf16-logits"}
    assert of_group["N"] < set(found)


def test_ours_gets_the_workspace():
    case = dataclasses.replace(cases(CPU, quick=True)[0], group="workspace", workspace_bytes=1)
    inputs = make_inputs(case, CPU, 1e-2)
    (mine,) = (i for i in implementations(case, CPU) if i.name == "opcd_fast-torch")
    with pytest.raises(ValueError, match="workspace_bytes"):
        mine.build(inputs)()


def _forget_peers():
    for loader in (peers.load_trl, peers.load_liger):
        loader.cache_clear()
    for name in [n for n in sys.modules if n.startswith(peers._TRL_ALIAS)]:
        del sys.modules[name]


@pytest.fixture
def no_peers(monkeypatch):
    def folder(package):
        raise peers.Missing(f"{package} is not installed")

    _forget_peers()
    monkeypatch.setattr(peers, "_folder", folder)
    yield
    _forget_peers()


@pytest.mark.usefixtures("no_peers")
def test_missing_peers_are_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_table, "cases", lambda device, quick: [cases(CPU, quick=True)[0]])
    arguments = ["--quick", "--device", "cpu", "--case-seconds", "0", "--without", "compile-fp32"]
    assert loss_table.main(["--out", str(tmp_path), *arguments]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = {row.implementation: row for row in read(path).rows}
    assert rows["trl"].status == "skipped" and rows["trl"].note == "trl is not installed"
    assert rows["liger-fused"].note == rows["liger-chunked"].note == "liger_kernel is not installed"
    assert rows["compile-fp32"].status == "skipped" and "--without" in rows["compile-fp32"].note
    assert rows["opcd_fast-torch"].status == "ok"


def test_trl_is_loaded_without_its_package(tmp_path, monkeypatch):
    """From its own files, with neither __init__.py running: a stand-in for trl whose packages cannot be imported."""
    kernels = tmp_path / "trl" / "kernels"
    kernels.mkdir(parents=True)
    for folder in (tmp_path / "trl", kernels):
        (folder / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    (kernels / "sibling.py").write_text("from transformers.utils import is_triton_available\n")
    (kernels / "chunked_divergence.py").write_text(
        "from ..trainer.utils import maybe_gather_lm_head_ctx\n"
        "from .sibling import is_triton_available\n"
        "class ChunkedDivergenceFunction:\n"
        "    gather = maybe_gather_lm_head_ctx\n"
    )
    _forget_peers()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    try:
        function = peers.load_trl()
        with function.gather(None, None):
            pass
        assert function.__module__ == f"{peers._TRL_ALIAS}.kernels.chunked_divergence"
        assert peers.why_not("trl", CPU) is None
    finally:
        _forget_peers()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_contenders_compute_the_same_gradient(dtype, frozen):
    """Sign, normalisation and exactness of everything that can run here, peers where they are installed. Slow
    because of torch.compile."""
    case = Case("c", 70, 4_100, 64, dtype, frozen)
    inputs = make_inputs(case, CPU, 1e-2)
    index = oracle_rows(inputs.h_s, case.N)
    _, *references = oracle(inputs.h_s[index], inputs.w_s, inputs.h_t[index], inputs.w_t, weight=True)
    for contender in implementations(case, CPU):
        if contender.skip or not contender.is_loss:
            continue
        gradients = contender.build(inputs)()
        assert len(gradients) == (1 if frozen else 2), contender.name
        for gradient, reference in zip(gradients, references):
            error = float((gradient.double() - reference / case.N).norm() / (reference / case.N).norm())
            assert error <= (3e-3 if contender.exact else 0.5), (contender.name, error)


def test_the_quick_table_has_every_row(tmp_path):
    """Without what torch.compile would take longer for than all the rest."""
    left_out = "compile-fp32,compile-bf16-logits,liger-chunked"
    options = ["--quick", "--device", "cpu", "--case-seconds", "0.1", "--without", left_out]
    assert loss_table.main(["--out", str(tmp_path), *options]) == 0
    (path,) = tmp_path.glob("loss*.json")
    report = read(path)
    assert report.complete and report.benchmark == "loss-quick"
    for case in cases(CPU, quick=True):
        rows = {row.implementation: row for row in report.rows if row.case == case.name}
        assert set(rows) == {i.name for i in implementations(case, CPU)}
        assert {row.group for row in rows.values()} == {case.group}
        for row in rows.values():
            if row.status == "skipped":
                assert row.implementation not in OURS and row.note
                continue
            assert row.status == "ok" and (row.bound_fraction is not None) == case.timed
            if row.implementation == BOUND:
                assert row.peak_bytes is None and row.note
                continue
            assert row.workspace_bytes == case.workspace_bytes
            hidden = [e.mean_kl for e in row.gradient_error if e.of == "hidden"]
            weight = [e.mean_kl for e in row.gradient_error if e.of == "weight"]
            assert row.peak_bytes and hidden == pytest.approx(case.kls, rel=0.06)
            assert weight == ([] if case.timed else hidden)
            if row.exact:
                assert max(e.relative_error for e in row.gradient_error) <= 3e-3
        if case.group == "accuracy":
            errors = [e.relative_error for e in rows["eager-bf16-logits"].gradient_error if e.of == "hidden"]
            assert not rows["eager-bf16-logits"].exact
            assert errors == sorted(errors) and errors[0] > 3e-3 and errors[-1] > 0.5
