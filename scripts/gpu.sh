#!/usr/bin/env bash
# What is asked of a machine with a GPU in a lease of 15 minutes, of which one command may take 10.
#
#   scripts/gpu.sh                      every phase, most valuable first; 560 s in all, whatever hangs
#   scripts/gpu.sh second               the main cases of the loss again with the launch table of the first run's sweep,
#                                       and its kernels under compute-sanitizer; 200 s
#   scripts/gpu.sh --dry-run [second]   every phase on the CPU with tiny shapes: checks the flow, measures nothing
#
# The phases, their order and their seconds are in benchmarks/gpu/phases.py; each is a process of its own. Results are
# JSON lines in $OUT (default: benchmarks/results/gpu; for a dry run a temporary folder), written row by row,
# beside a log, the launch table and a trace of at most 12 MiB. The last lines of the output, 40 at most, are the summary.
# `python -m benchmarks.report` puts what came back, whole or not, into docs/performance.md.
#
# It runs with $PYTHON, else .venv/bin/python, else python3, and imports opcd_fast from this tree. Peers that are not
# installed are skipped rows; `scripts/carry.sh` fetches their wheels into carried/ beforehand, and they are used from a
# temporary folder. A tree that comes without its history says which commit it is in carried/COMMIT or OPCD_GIT_COMMIT.
#
# `second` takes the table that OPCD_LAUNCH_SHAPES names, else .cache/gpu/launch_shapes.json, which the first run leaves
# in the tree. On another machine put the launch_shapes.json that came back there.
#
# Exit status: 0 if nothing failed, 1 if something did, 2 if nothing could run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

run=first total=560 dry_run=
for argument in "$@"; do
    case "$argument" in
    --dry-run) dry_run=--dry-run ;;
    second) run=second total=200 ;;
    *)
        echo "usage: scripts/gpu.sh [--dry-run] [second]" >&2
        exit 2
        ;;
    esac
done

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi

if [ -n "$dry_run" ]; then
    total=350 out=${OUT:-$(mktemp -d)}
else
    out=${OUT:-benchmarks/results/gpu}
    if ! "$python" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null; then
        echo "scripts/gpu.sh: no CUDA driver here; try scripts/gpu.sh --dry-run" >&2
        exit 2
    fi
fi

if compgen -G 'carried/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    if timeout 25 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" carried/*.whl; then
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    else
        echo "scripts/gpu.sh: the wheels in carried/ do not install here; peers are skipped rows"
    fi
fi
if [ -z "${OPCD_GIT_COMMIT:-}" ] && [ -f carried/COMMIT ] && ! git rev-parse HEAD >/dev/null 2>&1; then
    OPCD_GIT_COMMIT=$(cat carried/COMMIT)
    export OPCD_GIT_COMMIT
fi

# The runner keeps its own time; timeout is for the case that it does not.
timeout --kill-after=3 $((total - SECONDS - 4)) "$python" -m benchmarks "$run" --out "$out" \
    --seconds $((total - SECONDS - 6)) $dry_run
