#!/usr/bin/env bash
# Set up and run the whole test suite: format, lint, types, the GPU's kernels, then pytest, whose summary comes last.
# Arguments go to pytest, e.g. `bash scripts/test.sh tests/algorithm`.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
[ $# -gt 0 ] || bash scripts/test_kernels.sh
# Two processes with one thread each: tiny tensors gain nothing from threads.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
