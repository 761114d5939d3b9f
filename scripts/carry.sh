#!/usr/bin/env bash
# Fetch the wheels of the peers that the GPU run compares with into carried/, for a machine without a network.
#
#   scripts/carry.sh [PACKAGE==VERSION …]     those of the list below, or others
#
# For Python 3.12 on x86-64 Linux, without what they depend on: torch, transformers and the rest are there. carried/ is
# ignored by git; carried/COMMIT says which commit the tree is. Fails if carried/ and the tree do not fit into 64 MiB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LIMIT=$((64 << 20))
packages=("$@")
[ $# -gt 0 ] || packages=(trl==1.16.0 liger-kernel==0.8.5 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19)

if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi

rm -rf carried
mkdir carried
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest carried "${packages[@]}"
git rev-parse HEAD >carried/COMMIT

bytes_of() { # of the files whose names come in, each ended by a zero byte
    xargs -0 -r stat -c %s -- | awk '{ sum += $1 } END { print sum + 0 }'
}
wheels=$(find carried -type f -print0 | bytes_of)
# Of the tree what is there: a file may be deleted and not yet committed.
tree=$(git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' name; do
    if [ -f "$name" ] && [ ! -L "$name" ]; then printf '%s\0' "$name"; fi
done | bytes_of)
ls -l carried
echo "carried $((wheels >> 10)) KiB, tree $((tree >> 10)) KiB, of $((LIMIT >> 10)) KiB"
if [ $((wheels + tree)) -gt $LIMIT ]; then
    echo "scripts/carry.sh: too large together" >&2
    exit 1
fi
