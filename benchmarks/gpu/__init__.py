"""What is asked of a machine with a GPU in one short lease. `scripts/gpu.sh` is the door.

A benchmark a file, as in the folder above; `phases.py` says in which order, how long and why; `runner.py` gives every
phase a process of its own; `summary.py` ends a run with what it found.
"""
