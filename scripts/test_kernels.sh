#!/usr/bin/env bash
# Check the GPU's kernels: on a GPU where there is one, else in Triton's interpreter, for which Triton is installed beside
# the project's environment (200 MB), since torch's CPU build comes without it.
# Usage: bash scripts/test_kernels.sh [arguments of pytest]
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
version=3.9.0

skip() {
    echo "skipped: $1"
    exit 0
}

if ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    [ "$(uname -sm)" = "Linux x86_64" ] || skip "no GPU, and Triton has wheels for Linux on x86_64 only"
    folder=.venv/triton-$version
    [ -d "$folder/triton" ] || .venv/bin/pip install -q --no-deps --target "$folder" "triton==$version" ||
        skip "no GPU, and the wheel of Triton $version cannot be had here"
    export TRITON_INTERPRET=1 PYTHONPATH="$PWD/$folder${PYTHONPATH:+:$PYTHONPATH}"
fi
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -p no:cacheprovider tests/kernels "$@"
