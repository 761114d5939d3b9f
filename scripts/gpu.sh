#!/usr/bin/env bash
# What a machine with a GPU is asked for: the tests marked `gpu`, the table of the teacher, and the table of the loss
# beside its peers, in under 9 minutes. Each table does its most important cases first and the others with the time
# that is left; a case that gets none is in the file as skipped.
#
#   scripts/gpu.sh                     on a machine with a CUDA device
#   scripts/gpu.sh teacher loss        only some of the parts: tests, teacher, loss; one alone has all the time,
#                                      and tests alone runs those marked `slow` as well
#   scripts/gpu.sh step                whole training steps beside TRL's; alone, it takes all of the time
#   scripts/gpu.sh --dry-run [PART…]   the same flow on the CPU with tiny shapes; the tests are only collected
#
# Leaves gpu_tests.txt, teacher_<device>_<date>.json and loss_<device>_<date>.json in $OUT (default:
# benchmarks/results/; for a dry run a temporary folder), also when a test fails or a part runs out of time. Exit
# status: 0 if all parts passed. `python -m benchmarks.report` makes docs/performance.md of the JSON, anywhere.
#
# Installs nothing. It runs with $PYTHON, else .venv/bin/python, else python3; opcd_fast is imported from this
# tree, whatever is installed. Packages that are missing there can be put into a folder named by PYTHONPATH or
# SITE. OPCD_GIT_COMMIT names the commit where the tree has come without its history.
#
# The peers are optional, each missing one is a row that says so. To carry them to a machine without a network,
# make a folder where there is one, and name it in SITE over there:
#
#   pip download --no-deps --dest wheels trl==1.16.0 liger-kernel==0.8.5 datasets==5.2.0 dill multiprocess
#   pip install --no-deps --no-index --target peers wheels/*.whl
#   SITE=$PWD/peers scripts/gpu.sh
#
# --no-deps: TRL and Liger-Kernel ask for a torch of their own choice. The two functions that `loss` times need torch,
# triton and packaging alone; `step` runs TRL's whole trainer, which needs datasets with its dill and multiprocess (of the
# Python over there: pip download --python-version), and accelerate, pandas, pyarrow, xxhash, requests. What is missing
# is a skipped row. A dry run with these and torch 2.11, triton 3.6, transformers 5.17, Python 3.12 ran every part.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

dry_run=
parts=
for argument in "$@"; do
    case "$argument" in
    --dry-run) dry_run=1 ;;
    tests | teacher | loss | step) parts="$parts $argument" ;;
    *)
        echo "usage: scripts/gpu.sh [--dry-run] [tests] [teacher] [loss] [step]" >&2
        exit 2
        ;;
    esac
done
parts="${parts:- tests teacher loss} "
if [ "${parts#* step }" != "$parts" ] && [ "$parts" != " step " ]; then
    echo "scripts/gpu.sh: step takes all of the time; ask for it alone" >&2
    exit 2
fi

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi
site=${SITE:-}
[ -d "$site" ] && PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$site"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# The parts' limits add up to 8 minutes and 45 seconds, kills included.
tests_seconds=120 teacher_seconds=150 loss_seconds=240
which="gpu and not slow"
alone=525
case "$parts" in
" tests " | " teacher " | " loss ") which=gpu tests_seconds=$alone teacher_seconds=$alone loss_seconds=$alone ;;
esac
if [ -n "$dry_run" ]; then
    out=${OUT:-$(mktemp -d)}
    export OMP_NUM_THREADS=1 # tiny shapes: threads would only wait for each other
    test_options=(--collect-only)
    # torch.compile takes longer for a tiny shape than all the rest.
    loss_options=(--quick --device cpu --case-seconds 0.1 --limit-seconds 60
        --without compile-fp32,compile-bf16-logits,liger-chunked)
    teacher_options=(--quick --device cpu --case-seconds 0.1 --limit-seconds 60)
    step_options=(--quick --device cpu --steps 1 --rounds 1)
else
    out=${OUT:-benchmarks/results}
    unset TRITON_INTERPRET
    if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "scripts/gpu.sh: $python sees no CUDA device; try scripts/gpu.sh --dry-run" >&2
        exit 2
    fi
    test_options=(--durations=10)
    # The last case to start can overrun its limit by the time of a large case with its compilations.
    loss_options=(--device cuda --case-seconds 5 --limit-seconds $((loss_seconds - 70)))
    teacher_options=(--device cuda --case-seconds 5 --limit-seconds $((teacher_seconds - 45)))
    step_options=(--device cuda --steps 2 --rounds 1 --limit-seconds $((alone * 2 / 3)))
fi
mkdir -p "$out" || exit 2

failed=
asked_for() { [ "${parts#* "$1" }" != "$parts" ]; }

run_tests() {
    echo "== tests marked gpu (at most $tests_seconds s)"
    # One module that does not import must not keep the others from running; it still fails the run.
    timeout --kill-after=5 "$tests_seconds" "$python" -m pytest -m "$which" tests --continue-on-collection-errors \
        -p no:cacheprovider -o timeout=100 "${test_options[@]}" 2>&1 | tee "$out/gpu_tests.txt"
    local status=${PIPESTATUS[0]}
    if [ "$status" = 5 ]; then
        echo "no test is marked gpu" | tee -a "$out/gpu_tests.txt"
        [ -n "$dry_run" ] && status=0
    fi
    [ "$status" = 124 ] && echo "stopped after $tests_seconds s" | tee -a "$out/gpu_tests.txt"
    finish tests "$status"
}

run_table() { # NAME SECONDS OPTION...
    local name=$1 seconds=$2
    shift 2
    echo "== table of the $name (at most $seconds s)"
    timeout --kill-after=5 "$seconds" "$python" -m "benchmarks.${name}_table" --out "$out" "$@"
    local status=$?
    [ "$status" = 124 ] && echo "stopped after $seconds s; the JSON holds the cases that were done"
    finish "$name" "$status"
}

finish() { # NAME STATUS
    echo "== $1: exit status $2"
    [ "$2" = 0 ] || failed="$failed $1"
}

asked_for tests && run_tests
asked_for teacher && run_table teacher "$teacher_seconds" "${teacher_options[@]}"
asked_for loss && run_table loss "$loss_seconds" "${loss_options[@]}"
asked_for step && run_table step "$alone" "${step_options[@]}"

echo "== results in $out; failed:${failed:- nothing}"
[ -z "$failed" ]
