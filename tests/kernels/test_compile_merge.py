"""The merge of attention, compiled for chips that are not here: no spills, every load and store of outputs wide."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
CAPABILITIES = (80, 90, 100, 120)
SCRIPT = Path(__file__).with_name("compile_merge.py")


def compiled(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(report):
    assert report["ptx_half_loads"] == 0, report
    if not report["sass"]:
        return  # the nvdisasm of this Triton cannot read the chip's code
    assert report["STACK"] == report["LOCAL"] == 0, report
    # All threads of a multiprocessor in flight is what hides memory's latency: 16 programs of 4 warps at least half.
    assert report["REG"] * 32 * report["warps"] * 8 <= 65_536, report
    pieces = report["elements"] // 8  # 8 half-precision numbers are 128 bits
    assert report["wide_loads"] == report["sets"] * pieces and report["half_loads"] == 0, report
    assert report["wide_stores"] == pieces, report


def test_compiles_without_spills_and_with_wide_loads():
    reports = compiled(*CAPABILITIES)
    assert {report["capability"] for report in reports} == set(CAPABILITIES)
    for report in reports:
        check(report)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_compiles(capability):
    for report in compiled("--all", capability):
        check(report)
