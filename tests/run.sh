#!/usr/bin/env bash
# Runs ruff and the whole test suite, in an environment that it makes where there is none. Flags go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source utils/environment.sh
choose_python tests/requirements.txt
"$PYTHON" -m ruff check .
# One thread a process, and a process for each core; the tests of a file stay in one process, for their shared fixtures.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -n auto --dist loadfile "$@"
