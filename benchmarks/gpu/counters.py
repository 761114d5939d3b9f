"""One launch of each kernel under Nsight Compute: bytes, registers, occupancy, what limits it.

The clocks are left as they are (`--clock-control none`). Where ncu is missing or may not read the hardware's counters,
a skipped row says so.
"""

from __future__ import annotations

import csv
import glob
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.environment import ROOT
from benchmarks.schema import Values, value
from benchmarks.session import Session, Skip

METRICS = (
    "gpu__time_duration.sum", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum", "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread", "launch__occupancy_limit_registers",
)  # fmt: skip
KERNELS = "_rows_kernel|_terms_kernel|_normaliser_kernel|_merge_attention_kernel"
PLACES = ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
WITHOUT = ("LibraryNotLoaded", "ERR_NVGPUCTRPERM", "No kernels were profiled", "Failed to initialize")


def run(session: Session) -> None:
    found: dict[str, Values] = {}
    session.row("ncu", lambda: _profile(session, found))
    for kernel, values in found.items():
        session.row(kernel, lambda values=values: values)  # type: ignore[misc]


def _profile(session: Session, found: dict[str, Values]) -> Values:
    program = [sys.executable, "-m", "benchmarks.gpu.launches", *(["--dry-run"] if session.dry else [])]
    tool = shutil.which("ncu") or next((path for place in PLACES for path in sorted(glob.glob(place))), None)
    if session.dry or tool is None:
        # The program alone, so that what ncu would be given is known to run.
        subprocess.run(program, cwd=ROOT, check=True, timeout=max(1.0, session.left()))
        raise Skip("ncu is not installed" if tool is None else "nothing runs on a device")
    for metrics in (METRICS, METRICS[:2]):  # one that this ncu does not know ends it before it starts
        command = [tool, "--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(metrics),
                   "--kernel-name", f"regex:{KERNELS}", "--target-processes", "all", *program]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, session.left()))
        print(done.stdout[-20_000:], done.stderr[-4000:], sep="\n")
        found.update(parse(done.stdout))
        if found:
            break
    else:
        said = next((line for line in (done.stdout + done.stderr).splitlines() if any(w in line for w in WITHOUT)), "")
        if said:
            raise Skip(f"ncu cannot read the counters: {said.strip()[:200]}")
        raise RuntimeError(f"ncu gave no table; exit status {done.returncode}: {(done.stderr or done.stdout)[-300:]}")
    return {"kernels": value(len(found), "1")}


def parse(text: str) -> dict[str, Values]:
    """By kernel, the metrics of its last launch. Reads both forms of ncu's tables: a line a metric, or a line a launch
    with the units in the line under the names."""
    rows = list(_table(text))
    if not rows:
        return {}
    names = rows[0]
    found: dict[str, Values] = {}
    if "Metric Name" in names:
        for row in rows[1:]:
            line = dict(zip(names, row, strict=False))
            if (number := _number(line.get("Metric Value", ""))) is not None:
                kernel = found.setdefault(_short(line["Kernel Name"]), {})
                kernel[line["Metric Name"]] = value(number, line.get("Metric Unit") or "1")
        return found
    units = dict(zip(names, rows[1], strict=False))
    for row in rows[2:]:
        line = dict(zip(names, row, strict=False))
        numbers = {name: _number(text) for name, text in line.items() if "__" in name}
        found[_short(line.get("Kernel Name", "?"))] = {
            name: value(number, units.get(name) or "1") for name, number in numbers.items() if number is not None
        }
    return found


def _table(text: str) -> Iterator[list[str]]:
    """The lines of the CSV, which stand among the program's own and ncu's remarks."""
    start = re.search(r'^"ID",', text, re.MULTILINE)
    if start is None:
        return
    for row in csv.reader(io.StringIO(text[start.start() :])):
        if len(row) > 5:
            yield row


def _short(kernel: str) -> str:
    return kernel.split("(")[0].strip() or "?"


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
