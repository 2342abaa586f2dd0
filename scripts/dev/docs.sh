#!/usr/bin/env bash
# Builds the site from docs/ into runs/docs/site; a dead link or a page outside of the nav is an error.
#
#   bash scripts/dev/docs.sh          # build
#   bash scripts/dev/docs.sh serve    # show it, anew at every change
#
#   FASTCACHE_DOCS_VENV  environment with MkDocs; default runs/docs/venv, made where it is not there
#   PYTHON               interpreter to make it with; default python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv="${FASTCACHE_DOCS_VENV:-runs/docs/venv}"
if [[ ! -x "$venv/bin/mkdocs" ]]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check \
        "mkdocs-material>=9.6,<10" "mkdocstrings[python]>=0.29,<2"
fi
# Of a successor, at each build.
export NO_MKDOCS_2_WARNING=1
exec "$venv/bin/mkdocs" "${1:-build}" --strict
