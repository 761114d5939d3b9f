"""The dual kernels, compiled for chips that are not here: no spills, asynchronous matrix products, wide loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
CAPABILITIES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes one program may use
# ptxas prefers one spilled register outside the loops to more than 128, which would be one program less.
TOLERATED_STACK = {(120, "loss_only_two_heads"): 8}
SCRIPT = Path(__file__).with_name("compile_dual.py")


def compiled(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(report):
    capability = report["capability"]
    if not report["sass"]:
        return  # the nvdisasm of this Triton cannot read the chip's code
    if capability == 120 and report["triton"].startswith("3.6") and not report["kernel"].startswith("rows"):
        # Triton 3.6 spills up to four registers there, three of them in the K loop.
        assert report["STACK"] <= 16 and max(report["spills"]) <= 3, report
    else:
        assert report["STACK"] <= TOLERATED_STACK.get((capability, report["kernel"]), 0), report
        assert report["LOCAL"] == 0 and not any(report["spills"]), report
    assert report["SHARED"] <= SHARED_LIMIT[capability], report
    if report["kernel"].startswith("rows"):
        check_rows(report)
    else:
        check_projection(report)


def check_rows(report):
    # At least two programs per multiprocessor (65,536 registers).
    assert report["REG"] * 32 * report["warps"] * 2 <= 65_536, report
    # One loop; logits and differences 128 bits wide, the two offsets of a tile one scalar each, no barrier.
    assert report["loads"] == [4] and report["wide_loads"] == [2], report
    assert report["synchronising"] == [0], report


def check_projection(report):
    assert report["REG"] * 32 * report["warps"] <= 65_536, report
    assert report["mma"] > 0, report
    assert not any(report["loads"]), report  # every operand of the K loop goes to shared memory asynchronously
    if report["capability"] != 90:
        return
    # Present is not enough: a wait until all have finished behind one product serialises the loop.
    loops = 2 if "two_heads" in report["kernel"] else 1
    assert len(report["mainloops"]) == loops, report
    assert all(loop["hgmma"] > 0 and loop["full_waits"] == 0 for loop in report["mainloops"]), report


def test_compiles_without_spills_and_asynchronously():
    reports = compiled(*CAPABILITIES)  # one process: most of a short one is the import of torch
    assert {report["capability"] for report in reports} == set(CAPABILITIES)
    for report in reports:
        check(report)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_compiles(capability):
    for report in compiled("--all", capability):
        check(report)
