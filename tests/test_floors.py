"""The floors of CONTRIBUTING.md: every module has one, and none imports from a floor above its own."""

import ast
import re
from pathlib import Path

import pytest

from opcd_fast import _HOME

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "opcd_fast"


def floors() -> list[tuple[str, list[str]]]:
    """Name and entries of each floor, bottom up: "heads" for a module, "tasks" for a folder."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| floor | files |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("|") and "---" not in line]
    return [(name.strip(), re.findall(r"`(\w+)(?:\.py|/)`", files)) for name, files in rows]


FLOORS = floors()
FLOOR_OF = {entry: height for height, (_, entries) in enumerate(FLOORS) for entry in entries}
MODULES = sorted(
    path for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    if "kernels" not in path.relative_to(ROOT).parts[1:] and path != PACKAGE / "__init__.py"
)  # fmt: skip


def entry_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] == "kernels" else parts[1].removesuffix(".py")


def imported(source: str) -> set[str]:
    """Entries that a module imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            if node.module == "opcd_fast":  # names that it fetches when they are asked for
                names |= {f"opcd_fast.{_HOME[alias.name]}" for alias in node.names if alias.name in _HOME}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = [name.split(".")[1] for name in names if name.startswith("opcd_fast.")]
    return {name for name in ours if name in FLOOR_OF}


def climbs(height: int, source: str) -> list[str]:
    return sorted(f"{name} ({FLOORS[FLOOR_OF[name]][0]})" for name in imported(source) if FLOOR_OF[name] > height)


def test_every_module_has_one_floor():
    listed = [entry for _, entries in FLOORS for entry in entries]
    assert len(listed) == len(set(listed))
    assert {entry_of(path) for path in MODULES} == set(listed)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).with_suffix("").as_posix())
def test_imports_go_down(path):
    assert not climbs(FLOOR_OF[entry_of(path)], path.read_text())


def test_an_import_that_climbs_is_found():
    loss, loop = FLOOR_OF["loss"], FLOOR_OF["trainer"]
    for source in ("from opcd_fast.trainer import OPCDTrainer", "def f():\n    import opcd_fast.trainer",
                   "from opcd_fast import trainer", "from opcd_fast import OPCDTrainer",
                   "from opcd_fast.report.page import x"):  # fmt: skip
        assert climbs(loss, source)
    assert not climbs(loop, "from opcd_fast.loss import LMHead\nfrom opcd_fast import heads, InputError")
