"""Prints pip constraints: the lower end of each range in pyproject.toml, so `torch>=2.11` becomes `torch==2.11`.

Needs nothing but pip, in whose copies of tomli and packaging an empty environment can read the file.
"""

from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

INTERPRETER = "numpy<2.4"  # the interpreter of Triton 3.6 does not work with newer ones


def lowest(project: dict) -> list[str]:
    """project: the file's [project] table."""
    asked = [*project["dependencies"], *(line for group in project["optional-dependencies"].values() for line in group)]
    ranges = [Requirement(line) for line in asked]
    return [f"{one.name}=={part.version}" for one in ranges for part in one.specifier if part.operator == ">="]


if __name__ == "__main__":
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        print(*lowest(tomllib.load(file)["project"]), INTERPRETER, sep="\n")
