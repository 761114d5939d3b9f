"""What docs/rollouts.md says of measured decoding, beside the files that it names."""

import re
from pathlib import Path

import pytest

from benchmarks.schema import read

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8")


def times(file, table):
    """{(case, implementation): milliseconds}"""
    assert f"benchmarks/results/{file}" in PAGE
    rows = read(ROOT / "benchmarks" / "results" / file).of(table)
    return {(row.case, row.implementation): row.get("time") for row in rows if row.get("time") is not None}


def test_a_beginning_held_once_and_copied():
    found = times("held_once_cpu_2026-12-01.jsonl", "held_once")
    (heading,) = re.findall(r"\| numbers a layer that copies add \|(.*)\|", PAGE)
    powers = re.findall(r"2\^(\d+)", heading)
    told = re.findall(r"\| (\d+) rows \|(.*)\|", PAGE)
    assert len(told) == 3 and len(powers) == 5
    for rows, cells in told:
        for power, cell in zip(powers, cells.split("|"), strict=True):
            case = f"2^{power} numbers, {rows} rows"
            ratio = found[case, "opcd_fast-held once"] / found[case, "opcd_fast-copied"]
            assert float(cell) == pytest.approx(ratio, abs=0.006), (case, ratio)
