#!/usr/bin/env bash
# Runs ruff and the whole test suite, in an environment that it makes where there is none. Flags go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source utils/environment.sh
choose_python tests/requirements.txt
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest "$@"
