#!/usr/bin/env bash
# Check the strategy deepspeed: two processes of a CPU under ZeRO 1, 2 and 3 against one, and whole runs. Makes an
# environment of its own (a few minutes), since DeepSpeed is built where it is installed and speaks when it is imported.
# Usage: bash scripts/test_deepspeed.sh [folder of the environment, .venv-deepspeed if not given] [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=0.19.8
venv="${1:-.venv-deepspeed}"
[ $# -gt 0 ] && shift

stamp="$venv/installed-deepspeed-$version"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    pip="$venv/bin/pip"
    "$pip" install -q -c constraints.txt torch
    "$pip" install -q -c constraints.txt -e . pytest jaxtyping beartype setuptools wheel
    # its build wants to see the torch that is here, and not to fetch another
    DS_BUILD_OPS=0 "$pip" install -q -c constraints.txt --no-build-isolation "deepspeed==$version"
    touch "$stamp"
fi
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
"$venv/bin/python" -m pytest -p no:cacheprovider tests/distributed/test_deepspeed.py "$@"
