"""Maps the repository's `kernels/` folder to `opcd_fast.kernels`.

An importable top-level package called `kernels` would collide with the Hugging Face package of that name,
so the folder has no `__init__.py` and is only reachable as `opcd_fast.kernels`.
"""

from setuptools import setup

setup(
    packages=["opcd_fast", "opcd_fast.kernels"],
    package_dir={"opcd_fast": "opcd_fast", "opcd_fast.kernels": "kernels"},
    package_data={"opcd_fast": ["py.typed", "demo_data/*"]},
)
