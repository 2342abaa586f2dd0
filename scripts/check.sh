#!/usr/bin/env bash
# All checks, cheapest first, with the tools found on PATH. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Ranks spawned by tests share the cores, and nothing is fetched while testing.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# Hundreds of interpreters are started, and each would compile all that it imports.
unset PYTHONDONTWRITEBYTECODE

ruff check .
ruff format --check .

# Each keeps one core busy.
mypy &
types=$!

# Doctests. Modules in xdit/ may import xfuser, which fails without a GPU until the CPU platform
# is switched on. Status 5 means that there are none yet.
doctests=0
python -m pytest -q --doctest-modules --ignore=xfuser_fastcache/xdit \
    xfuser_fastcache diffusers_adapters || doctests=$?
wait "$types"
[[ $doctests -eq 0 || $doctests -eq 5 ]]

# Last, so that the output ends with pytest's summary. A file's tests stay in one process, since
# they share what is costly to make; most of them keep one core busy, and two is what CI has.
python -m pytest -n 2 --dist loadfile "$@"
