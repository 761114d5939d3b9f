"""What is asked of a machine with a GPU in one short lease. `scripts/gpu.sh` is the door.

One small file a phase, each with `run(session)`; `phases.py` says in which order, how long and why; `runner.py` gives
every phase a process of its own; `session.py` writes the rows.
"""
