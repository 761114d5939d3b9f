"""The kernels, compiled for chips that are not here: no spills, wide loads, no barrier in their loops."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")
OLD = version("triton").startswith("3.6.")
CAPABILITIES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes one program may use
SCRIPT = Path(__file__).with_name("compile_kernels.py")


def compiled(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(report):
    capability, warps, constants = report["capability"], report["warps"], report["constants"]
    if not report["sass"]:
        pytest.skip(f"nvdisasm of this Triton cannot read sm_{capability}")
    # None with Triton 3.7. Triton 3.6 reads one pair of registers again in each pass of a loop, in small launch shapes.
    assert report["LOCAL"] == 0 and report["STACK"] <= (8 if OLD else 0) and sum(report["spills"]) <= OLD, report
    assert report["SHARED"] <= SHARED_LIMIT[capability], report
    # At least two programs of 8 warps per multiprocessor (65,536 registers).
    assert report["REG"] * 32 * warps * (16 // warps) <= 65_536, report
    # One for each pass over the row; a loop that only clears a gradient reads nothing.
    assert sum(loads > 0 for loads in report["loads"]) == report["expected_reading_loops"], report
    # The number of columns was not declared a multiple of 16; still every load in the loops is 128 bits wide.
    assert report["wide_loads"] == report["loads"], report
    assert not any(report["synchronising"]), report
    if report["kernel"] == "merge":
        # All threads of a multiprocessor in flight hide memory's latency: 16 programs of 4 warps at least half.
        assert report["REG"] * 32 * warps * 8 <= 65_536, report
        pieces = constants["PAIRS"] * constants["BLOCK"] // (32 * warps) // 8  # 8 half-precision numbers are 128 bits
        assert report["all_wide_loads"] == (1 + constants["HAS_B"]) * pieces and report["half_loads"] == 0, report
        assert report["all_wide_stores"] == pieces, report


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [(90, ()), *((capability, ("normalisers", "terms", "statistics", "merge")) for capability in (80, 100, 120))],
)
def test_compiles_without_spills_and_with_wide_loads(capability, kernels):
    for report in compiled(capability, *kernels):
        check(report)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", ["normalisers", "variation", "terms", "statistics", "logprob", "merge"])
def test_every_variant_and_launch_shape_compiles(kernel, capability):
    for report in compiled("--all", capability, kernel):
        check(report)
