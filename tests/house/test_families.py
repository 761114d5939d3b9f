"""docs/models.md is what scripts/families.py finds today, and what runs for each family there is exact."""

import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import families

PAGE = families.PAGE.read_text(encoding="utf-8")
SAME = f"transformers {transformers.__version__})" in PAGE  # other versions have other models


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family(family):
    found = families.look_at(family)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    assert set(found.differences) == set(families.WHAT)
    for what, difference in found.differences.items():
        apart = what == "sampler" and families.APART in found.ways[what]
        assert difference <= (0.2 if apart else families.TOLERANCE), what
    rows = [line for line in families.tables({family: found}).splitlines() if line.startswith(f"| {family} |")]
    assert len(rows) == 3
    if SAME:
        assert rows[:2] == [line for line in PAGE.splitlines() if line in rows[:2]]


def test_the_page_has_every_family_in_its_order():
    named = [line.split("|")[1].strip() for line in PAGE.split(families.MARKER)[1].splitlines() if line[:2] == "| "]
    some = [name for name in named if name not in ("family", "---")]
    assert some[: 3 * len(families.FAMILIES)] == [*families.FAMILIES] * 3


def test_what_a_shared_state_costs():
    assert PAGE.endswith(families.costs(families.newest()))
    lines = PAGE.split("## What a shared state costs")[1].splitlines()
    ratios = [line.split("|")[4:6] for line in lines if " x " in line]
    assert len(ratios) == 9 and all(float(cell) <= 1.3 for row in ratios[1:] for cell in row)


def test_what_fails_is_a_line_of_the_table():
    def fails():
        raise ValueError("two\nlines")

    found = families.Found()
    found.look("teacher", fails)
    assert found.ways == {"teacher": "refused: two lines"} and not found.differences
    assert "| x | refused: two lines |" in families.table(["family", "teacher"], [["x", found.ways["teacher"]]])


def test_a_name_that_is_no_family(capsys):
    assert families.main(["GPT-5"]) == 2
    assert "no family 'GPT-5'" in capsys.readouterr().err
