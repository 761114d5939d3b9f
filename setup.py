"""Maps the repository's `kernels/` folder to `opcd_fast.kernels`, and builds the CPU library where that is possible.

An importable top-level package called `kernels` would collide with the Hugging Face package of that name, so the
folder has no `__init__.py` and is only reachable as `opcd_fast.kernels`. In a checkout the link opcd_fast/kernels
leads there: an editable install cannot map a folder without `__init__.py` into a package.

The CPU library needs CMake and a C++ compiler. Without them the install goes on, and `opcd info` says what is missing.
`OPCD_BUILD_NATIVE=0` leaves it out. ctypes loads it, so a wheel that holds it is for one platform and any Python.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
LIBRARIES = ("libopcd_native.so", "libopcd_native.dylib", "libopcd_native.dll")


def can_build() -> bool:
    if os.environ.get("OPCD_BUILD_NATIVE") == "0":
        return False
    return shutil.which("cmake") is not None and any(map(shutil.which, ("c++", "g++", "clang++", "cl")))


class BuildWithNative(build_py):
    def run(self) -> None:
        super().run()
        if not can_build():
            print("opcd-fast: no CMake or C++ compiler, or not wanted: the CPU library is left out", file=sys.stderr)
            return
        target = ROOT / "opcd_fast" if self.editable_mode else Path(self.build_lib) / "opcd_fast"
        try:
            with tempfile.TemporaryDirectory() as scratch:
                build = ["cmake", "-S", str(ROOT), "-B", scratch, "-DCMAKE_BUILD_TYPE=Release"]
                subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
                build = ["cmake", "--build", scratch, "--config", "Release", "--parallel"]
                subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
                for found in (path for name in LIBRARIES for path in Path(scratch).rglob(name)):
                    # A new file: writing into the old one would crash whoever has it loaded.
                    (target / found.name).unlink(missing_ok=True)
                    shutil.copy2(found, target / found.name)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"opcd-fast: the CPU library did not build ({error}), it is left out", file=sys.stderr)


class OnePlatformAnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if can_build() else (python, abi, platform)


class PlatformDistribution(Distribution):
    """A wheel that holds a compiled library must say for which platform."""

    def has_ext_modules(self) -> bool:
        return can_build()


setup(
    packages=[
        "opcd_fast",
        "opcd_fast.attention",
        "opcd_fast.commands",
        "opcd_fast.contexts",
        "opcd_fast.data",
        "opcd_fast.data.tasks",
        "opcd_fast.evaluation",
        "opcd_fast.evaluation.compare",
        "opcd_fast.evaluation.report",
        "opcd_fast.export",
        "opcd_fast.integrations",
        "opcd_fast.kernels.csrc",
        "opcd_fast.kernels.reference",
        "opcd_fast.kernels.triton",
        "opcd_fast.loss",
        "opcd_fast.loss.chunks",
        "opcd_fast.models",
        "opcd_fast.models.caches",
        "opcd_fast.planning",
        "opcd_fast.planning.rehearsal",
        "opcd_fast.rollout",
        "opcd_fast.runtime",
        "opcd_fast.teacher",
        "opcd_fast.teacher.paths",
        "opcd_fast.teacher.prefix",
        "opcd_fast.training",
        "opcd_fast.training.answers",
        "opcd_fast.training.engines",
        "opcd_fast.training.monitoring",
        "opcd_fast.training.run",
        "opcd_fast.training.settings",
        "opcd_fast.training.step",
    ],
    package_dir={"opcd_fast": "opcd_fast", "opcd_fast.kernels": "kernels"},
    package_data={
        "opcd_fast": ["py.typed", "demo_data/*", "engines/*", "prompt_data/*"],
        "opcd_fast.evaluation.report": ["*.jinja"],
        "opcd_fast.kernels.triton": ["*.json"],
    },
    # What belongs in the source archive (MANIFEST.in) is not what gets installed: with the default, True, the C++
    # sources would follow into the wheel, and setuptools would take the data folder for a forgotten package.
    include_package_data=False,
    cmdclass={"build_py": BuildWithNative, "bdist_wheel": OnePlatformAnyPython},
    distclass=PlatformDistribution,
)
