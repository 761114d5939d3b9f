"""The phases of a GPU run, as far as a CPU can tell: what they ask for, compare and read is right."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package

from benchmarks.gpu.session import BROKEN, Session  # noqa: E402
from benchmarks.phase_rows import Value, read, value  # noqa: E402

from benchmarks.gpu import counters, kernel_times, launches, runner, session  # noqa: E402
from benchmarks.gpu.phases import RUNS, Phase  # noqa: E402
from opcd_fast.kernels.triton import launch_shapes  # noqa: E402

CUDA = torch.device("cuda")


def run_of(folder):
    (path,) = folder.glob("gpu_first_*.jsonl")
    return read(path)


def make_session(tmp_path, **options):
    settings = {"dry": True, "seconds": 60.0, "command": "python -m x", **options}
    return Session("smoke", tmp_path / "gpu.jsonl", **settings)


def kept():
    """The launch table that an earlier run on a device has left in this tree."""
    path = ROOT / ".cache" / "gpu" / "launch_shapes.json"
    return path.read_bytes() if path.exists() else None


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
    before = kept()
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
    assert kept() == before, "a dry run's table is none to launch with"


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
    recorded, tables = Recorded(), []
    if phase == "sweep":
        monkeypatch.setattr(module, "_write", lambda *arguments: tables.append(arguments))
    module.run(recorded)
    least = {"smoke": 24, "accuracy": 15, "loss": 22, "sweep": 30, "decoding": 9, "teacher": 6, "retimed": 6}
    assert len(recorded.names) >= least.get(phase, 1)
    if phase == "sweep":
        assert len(tables) == 4, "a table after every kernel, for a run that is cut off"
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
    from opcd_fast.training.settings.config import OPCDConfig

    assert OPCDConfig(**case_settings(JOB, tmp_path)).rollout_batch == JOB.prompts
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


def test_what_smoke_compares_with_is_right(tmp_path, monkeypatch):
    """Stand-ins for what only a device has: every row passes with them, and fails with a wrong one."""
    from benchmarks.gpu import smoke
    from opcd_fast.attention import kernels as attention_kernels
    from opcd_fast.attention.blocked import blocked_attention

    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a, b, *, out_dtype=None, out=None):
        return mm(a, b, out=out) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype), out=out)

    def wide_addmm(c, a, b, *, beta=1.0, alpha=1.0, out_dtype=None, out=None):
        given = (a, b) if out_dtype is None else (a.to(out_dtype), b.to(out_dtype))
        return addmm(c, *given, beta=beta, alpha=alpha, out=out)

    def varlen(q, k, v, bounds, scale, softcap, window, with_lse):
        sizes = [bounds.cu_q.diff().tolist(), *[bounds.cu_k.diff().tolist()] * 2]
        pieces = zip(*(x.split(size, 2) for x, size in zip((q, k, v), sizes)))
        found = [blocked_attention(*piece, scale, causal=True, window=window) for piece in pieces]
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])

    monkeypatch.setattr(session.Session, "on_device", lambda self, what: None)
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    monkeypatch.setattr(attention_kernels, "varlen_ready", lambda: True)
    monkeypatch.setattr(attention_kernels, "varlen_torch", varlen)
    for name in ("prefix_flash", "prefix_efficient"):
        monkeypatch.setattr(attention_kernels, name, attention_kernels.prefix_blocked)

    def rows(name):
        (tmp_path / name).mkdir()
        one = make_session(tmp_path / name)
        smoke._products(one, 5, 1003, 64)
        smoke._attention(one)
        return {row.name: row for row in read(tmp_path / name / "gpu.jsonl").rows}

    right = rows("right")
    assert {row.status for row in right.values()} == {"ok"} and len(right) == 12, right

    def wrong(function):
        def call(*arguments, **options):
            found = function(*arguments, **options)
            (found[0] if isinstance(found, tuple) else found)[..., :1] *= 1.5
            return found

        return call

    for place, name in ((torch, "mm"), (torch, "addmm"), (attention_kernels, "varlen_torch"), (smoke, "scale_into"),
                        (attention_kernels, "prefix_flash"), (attention_kernels, "prefix_efficient"),
                        (attention_kernels, "row_on_grid"), (smoke.F, "scaled_dot_product_attention")):  # fmt: skip
        monkeypatch.setattr(place, name, wrong(getattr(place, name)))
    found = rows("wrong")
    assert {row.status for row in found.values()} == {"failed"}, found
    assert all("is above" in row.reason or "errors" in row.reason for row in found.values())


TESTS = """
import os, pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="no such kernel")
def test_skipped(): pass
def test_breaks(): raise RuntimeError("CUDA error")
def test_dies():
    os.abort()
def test_last(): pass
"""
DRIVER = """
import sys
from pathlib import Path
from benchmarks.gpu import gpu_tests, session
session.Session.broken = lambda self: "breaks" in list(self._done)[-1]
one = session.Session("gpu_tests", Path(sys.argv[1]), dry=True, seconds=60.0, command="x")
one.row("pytest", lambda: gpu_tests._pytest(one, ["-p", "no:cacheprovider", "-c", "/dev/null", sys.argv[2]]))
"""


def test_a_test_that_breaks_the_device_or_the_process_costs_the_others_nothing(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    lines = tmp_path / "gpu.jsonl"
    phase, statuses = Phase("gpu_tests", 60, "tests"), []
    for _ in range(3):
        command = [sys.executable, "-c", DRIVER, str(lines), str(tmp_path / "test_some.py")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        runner._unwritten(phase, lines, done.returncode, "Aborted")
        statuses.append(done.returncode)
    assert statuses == [BROKEN, -signal.SIGABRT, 0], done.stderr
    rows = {row.name.rpartition("::")[2]: row for row in read(lines).of("gpu_tests")}
    found = {name: row.status for name, row in rows.items()}
    assert found == {"test_good": "ok", "test_bad": "failed", "test_skipped": "skipped", "test_breaks": "failed",
                     "test_dies": "failed", "test_last": "ok", "pytest": "ok"}  # fmt: skip
    assert "assert 1 == 2" in rows["test_bad"].reason and rows["test_skipped"].reason == "Skipped: no such kernel"
    assert rows["test_dies"].reason == "the process ended with status -6: Aborted"


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

    sdpa = pytest.importorskip("opcd_fast.attention.sdpa")
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
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); "
        "from opcd_fast import OPCDTrainer; import benchmarks.step_worker"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
