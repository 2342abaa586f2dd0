#!/usr/bin/env bash
# Sets up the environment (see setup.sh), then runs all checks in it. Arguments go to pytest.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${FASTCACHE_VENV:-.venv}"
[[ "$venv" == /* ]] || venv="$root/$venv"

bash "$root/scripts/setup.sh"
PATH="$venv/bin:$PATH" exec bash "$root/scripts/check.sh" "$@"
