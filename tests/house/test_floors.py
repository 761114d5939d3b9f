"""The rooms of CONTRIBUTING.md: every module is in one, imports go down through doors, and nothing grows too large.

Tests mirror the rooms and go through doors too.
"""

import ast
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "opcd_fast"
TESTS = ROOT / "tests"
MOST_FILES = 14
MOST_LINES_IN_A_FILE = 400  # what can be read in one sitting
MOST_LINES = 31_672  # package and kernels: what they have; it is to fall, to 27,500
# folders of tests that are no room
BESIDE_ROOMS = {"house", "support", "gpu", "benchmarks", "kernels", "experiments", "fuzz"}
# Modules of other rooms than its own that a test may import, and why.
BEHIND_DOORS = {
    "runtime.timing": "a stopwatch's parts leave marks in a profile",
    "attention.kernels": "on a device each kernel is tried by itself",
    "attention.blocked": "what they are compared with there",
    "attention.pairs": "which of two kernels a device takes",
}
LARGE = {"commands"}  # one file a command
HOUSE_DOORS = {"commands", "integrations"}  # whatever is in them
TOP = {"__init__.py", "__main__.py", "errors.py", "cli.py", "py.typed"}


def rooms() -> dict[str, list[str]]:
    """The rooms, bottom up, and the names that the table says are public."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| room | its subject | public through its door |")[1]
    rows = [line.split("|")[1:4] for line in table.split("\n\n")[0].splitlines() if line.startswith("| `")]
    return {room.strip().strip("`/"): re.findall(r"`(\w+)`", public) for room, _, public in rows}


def listed_in(door: Path) -> dict[str, str]:
    """What a door says to type checkers: its names, and the modules that they come from."""
    nodes = [node for node in ast.walk(ast.parse(door.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if node.module.startswith("opcd_fast.") and node.module != "opcd_fast.runtime.doors"]
    return {alias.name: node.module.removeprefix("opcd_fast.") for node in ours for alias in node.names}


ROOMS = rooms()
HOME_OF = listed_in(PACKAGE / "__init__.py")  # names that the package fetches when they are asked for
HEIGHT = {room.replace("/", "."): height for height, room in enumerate(ROOMS)}
FOLDERS = {room: (ROOT if room.startswith("kernels/") else PACKAGE) / room for room in ROOMS}
MODULES = sorted(path for folder in FOLDERS.values() for path in folder.glob("*.py"))


def name_of(path: Path) -> str:
    """Below opcd_fast: "loss.chunks.loop" for a module, "loss.chunks" for a door."""
    parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str | None:
    """The room that a module, a door, or a name in one of them belongs to; None outside of all rooms."""
    parts = name.split(".")
    ends = range(len(parts), 0, -1)
    return next((".".join(parts[:end]) for end in ends if ".".join(parts[:end]) in HEIGHT), None)


def around_doors(name: str, source: str) -> list[str]:
    """Imports from another room that are not in its door's list, and private names of other rooms' modules."""
    own, found, modules = room_of(name), [], set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("opcd_fast.")]
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith("opcd_fast."):
            continue
        module = node.module.removeprefix("opcd_fast.")
        room = room_of(module)
        if room == own or room is None or module == "runtime.doors":
            continue
        public = importlib.import_module(f"opcd_fast.{room}").__all__ if room not in HOUSE_DOORS else []
        for alias in node.names:
            if module != room or alias.name not in public:
                found.append(f"{module}.{alias.name}")
            modules.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and re.match("_[^_]", node.attr):
            found += [f"{node.value.id}.{node.attr}"] if node.value.id in modules else []
    return found


def behind_doors(source: str, own: str = "") -> set[str]:
    """Modules that a test reaches around another room's door. `own`: the room that it tests, those in it included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opcd_fast."):
            module = node.module.removeprefix("opcd_fast.")
            room = room_of(module)
            if room is None or room in HOUSE_DOORS or f"{room}.".startswith(f"{own}."):
                continue
            names = {alias.name for alias in node.names}
            if module != room:
                found.add(module)
            elif hidden := names - set(importlib.import_module(f"opcd_fast.{room}").__all__):
                found |= {f"{module}.{name}" for name in hidden}
    return found


def imported(source: str) -> set[str]:
    """Rooms that a module imports from, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = {name.removeprefix("opcd_fast.") for name in names if name.startswith("opcd_fast.")}
    ours = {HOME_OF.get(name, name) for name in ours}
    return {room for room in map(room_of, ours) if room}


def climbs(name: str, source: str) -> list[str]:
    """Rooms above a module's own; a door may pass on what its subfolders have."""
    own = room_of(name)
    above = {room for room in imported(source) if HEIGHT[room] > HEIGHT[own]}
    return sorted(room for room in above if not (name == own and room.startswith(f"{own}.")))


def test_every_module_is_in_a_room():
    tracked = [path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts]
    tracked += (ROOT / "kernels").rglob("*.py")
    assert sorted(path for path in tracked if path.parent != PACKAGE) == MODULES
    assert all((folder / "__init__.py").exists() for folder in FOLDERS.values())


def test_nothing_else_lies_beside_the_rooms():
    beside = {path.name for path in PACKAGE.iterdir() if path.is_file() and not path.name.startswith("libopcd_native")}
    assert beside <= TOP
    assert not list((ROOT / "kernels").glob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_few_files(room):
    files = [path for path in FOLDERS[room].iterdir() if path.is_file() and not path.name.startswith(".")]
    assert 1 < len(files) <= MOST_FILES or room in LARGE, sorted(path.name for path in files)


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def sources(*folders: Path) -> list[Path]:
    """All .py, .cpp and .h below; the package's link to the kernels is not followed."""
    found = (path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    return [path for path in found if PACKAGE / "kernels" not in path.parents]


def test_a_file_can_be_read_in_one_sitting():
    large = {str(path.relative_to(ROOT)): lines_of(path) for path in sources(PACKAGE, ROOT / "kernels", TESTS)}
    assert not {name: count for name, count in large.items() if count > MOST_LINES_IN_A_FILE}


def test_the_house_does_not_grow_unseen():
    assert sum(map(lines_of, sources(PACKAGE, ROOT / "kernels"))) <= MOST_LINES


def test_tests_stand_in_the_rooms_they_test():
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")} - {"."}
    assert folders <= set(ROOMS) | BESIDE_ROOMS


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_tests_go_through_doors(path):
    found = behind_doors(path.read_text(), own=path.parent.relative_to(TESTS).as_posix().replace("/", "."))
    assert not found - set(BEHIND_DOORS)


def test_what_tests_need_behind_doors_is_still_there():
    used: set[str] = set()
    for path in TESTS.rglob("*.py"):
        used |= behind_doors(path.read_text(), own=path.parent.relative_to(TESTS).as_posix().replace("/", "."))
    assert set(BEHIND_DOORS) <= used


def test_files_named_in_the_guide_exist():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    section = guide.split("## Where would you change")[1].split("\n## ")[0]
    named = re.findall(r"`([\w/]+\.(?:py|cpp|h))`", section)
    assert len(named) >= 10
    assert not [name for name in named if not ((ROOT / name).is_file() or (PACKAGE / name).is_file())]


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_lists_what_the_table_says(room):
    door = importlib.import_module("opcd_fast." + room.replace("/", "."))
    names = getattr(door, "__all__", [])
    assert set(ROOMS[room]) <= set(names) == set(listed_in(FOLDERS[room] / "__init__.py"))
    for name in names:
        found = getattr(door, name)  # the module itself, where that is listed
        assert found.__name__.endswith(f".{name}") if isinstance(found, ModuleType) else found is not None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path):
    assert not climbs(name_of(path), path.read_text())


@pytest.mark.parametrize("path", [PACKAGE / "cli.py", *MODULES], ids=name_of)
def test_imports_go_through_doors(path):
    own, source = name_of(path), path.read_text()
    if path.name == "__init__.py":  # a door lists its own room, and the doors of the rooms in it
        names = listed_in(path)
        assert all(room_of(home) == own or home in HEIGHT and home.startswith(f"{own}.") for home in names.values())
    elif path.name == "cli.py":
        assert around_doors(own, source) == ["commands.COMMANDS"]
    else:
        assert not around_doors(own, source)


def test_an_import_around_a_door_is_found():
    for source in ("from opcd_fast.loss.heads import LMHead", "from opcd_fast.loss import heads",
                   "from opcd_fast.models import seam\nseam._x()", "from opcd_fast.loss import _x",
                   "import opcd_fast.loss"):  # fmt: skip
        assert around_doors("training.trainer", source)
    for source in ("from opcd_fast.loss import LMHead", "from opcd_fast.training import scorer", "import torch"):
        assert not around_doors("training.trainer", source)


def test_an_import_that_climbs_is_found():
    for source in ("from opcd_fast.training.trainer import OPCDTrainer", "def f():\n    import opcd_fast.training",
                   "from opcd_fast.training import trainer", "from opcd_fast import OPCDTrainer",
                   "from opcd_fast import training",  "from opcd_fast.evaluation.report.page import x"):  # fmt: skip
        assert climbs("loss.api", source)
    assert climbs("training.run.folder", "from opcd_fast.training import OPCDConfig")
    assert not climbs("training.trainer", "from opcd_fast.loss import LMHead\nfrom opcd_fast import loss, InputError")
    assert not climbs("training", "from opcd_fast.training.settings import OPCDConfig")
