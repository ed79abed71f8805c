# Sourced by run_cifar.sh and tests/run.sh: chooses the Python to use and says which in $PYTHON.
#   choose_python REQUIREMENTS   uses the active environment when it satisfies the file, else .venv, made where absent.

satisfies() { # PYTHON REQUIREMENTS: whether the packages are there, torch >= 2.4, without importing them
    "$1" - "$2" <<'PY' 2>/dev/null
import re, sys
from importlib.metadata import version
from pathlib import Path
assert sys.version_info >= (3, 10)
def names(file):
    for line in Path(file).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from names(Path(file).parent / line[3:].strip())
        elif line:
            yield re.match(r"[\w-]+", line)[0]
found = {name: version(name) for name in names(sys.argv[1])}
assert tuple(map(int, found["torch"].split("+")[0].split(".")[:2])) >= (2, 4)
PY
}

choose_python() {
    local requirements=$1 candidate base="" venv
    venv="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv"
    for candidate in python python3; do
        if command -v "$candidate" >/dev/null && satisfies "$candidate" "$requirements"; then
            PYTHON=$(command -v "$candidate")
            echo "environment: $PYTHON"
            return
        fi
    done
    if [[ -x $venv/bin/python ]] && satisfies "$venv/bin/python" "$requirements"; then
        PYTHON=$venv/bin/python
        echo "environment: .venv"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [[ -z $base ]]; then
        echo "error: no Python 3.10 or newer found; install one, with its venv module" >&2
        exit 2
    fi
    echo "environment: making .venv with $("$base" --version) and the packages of $requirements (once, some minutes)"
    if ! "$base" -m venv "$venv"; then
        echo "error: $base cannot make a virtual environment; install its venv module (Debian: python3-venv)" >&2
        exit 2
    fi
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"; then
        echo "error: pip could not install $requirements; check the network, then run this again" >&2
        exit 2
    fi
    PYTHON=$venv/bin/python
}
