"""How many cases, and from which seed: the same few in the default suite, others and more by `make fuzz`.

OPCD_FUZZ: how many times as many cases; then they are drawn anew, from pytest's --hypothesis-seed.
"""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("OPCD_FUZZ", "0"))
settings.register_profile(
    "opcd", deadline=None, database=None, derandomize=not TIMES, print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.load_profile("opcd")
