"""scripts/versions.sh: what it refuses, and which versions it takes for the oldest."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "say which versions"),
        (["latest"], {}, "no 'latest'"),
        (["oldest", "--torch", "2.13.0"], {}, "--torch goes with newest"),
        (["newest", "--torch"], {}, "--torch needs a version, such as 2.13.0"),
        (["newest", "--torch", "tests/test_x.py"], {}, "this is 'tests/test_x.py'"),
        (["newest"], {"PYTHON": "no-such-python"}, "there is no 'no-such-python'"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_made(arguments, environment, said):
    done = subprocess.run(
        ["bash", SCRIPTS / "versions.sh", *arguments], capture_output=True, text=True, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 2 and said in done.stderr and "usage:" in done.stderr, done.stderr


def test_the_oldest_is_the_lower_end_of_each_range():
    from lowest import lowest

    project = {
        "dependencies": ["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
        "optional-dependencies": {"trl": ["trl>=1.16,<1.17; python_version >= '3.11'"], "dev": ["build"]},
    }
    assert lowest(project) == ["torch==2.11", "triton==3.6", "trl==1.16"]


def test_pins_are_within_the_ranges():
    from lowest import Requirement, tomllib

    root = SCRIPTS.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (root / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower(): version for name, version in pinned.items()}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    ranges = [Requirement(line) for group in groups for line in group]
    checked = [one for one in ranges if one.name.lower() in pinned]
    assert len(checked) > 20
    assert not [str(one) for one in checked if not one.specifier.contains(pinned[one.name.lower()])]
