#!/usr/bin/env bash
# Makes the virtual environment and installs the package with its test tools, editable.
#
#   FASTCACHE_VENV  where it lies; default .venv, a relative path starts at the repository root
#   PYTHON          interpreter to make it with; default python3
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${FASTCACHE_VENV:-.venv}"
[[ "$venv" == /* ]] || venv="$root/$venv"
stamp="$venv/.fastcache-setup"

die() {
    echo "setup.sh: $*" >&2
    exit 1
}

# Prints the version of interpreter $1, or stops: missing, broken or too old.
version_of() {
    local found
    found="$("$1" -c 'import platform; print(platform.python_version())')" ||
        die "'$1' does not run. Set PYTHON to a Python 3.10 or newer, e.g. PYTHON=python3.11 $0"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "'$1' is Python $found, but 3.10 or newer is needed." \
            "Set PYTHON, e.g. PYTHON=python3.11 $0, and remove $venv if it was made with $found"
    echo "$found"
}

# The root is hashed too, since an editable install points at one checkout.
fingerprint() {
    {
        cat "$root/setup.py" "$root/pyproject.toml" "$root/scripts/setup.sh"
        echo "$root $1"
    } | "$venv/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

has_gpu() {
    [[ "$(nvidia-smi -L 2>/dev/null || true)" == *"GPU "* ]]
}

# Errors only. What is imported gets its bytecode then; most of the 15,000 files never are.
pip_install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-compile "$@"
}

wanted=""
if [[ -n "${PYTHON:-}" ]]; then
    wanted="$(version_of "$PYTHON")"
fi

if [[ -x "$venv/bin/python" ]]; then
    version="$(version_of "$venv/bin/python")"
    if [[ -n "$wanted" && "${wanted%.*}" != "${version%.*}" ]]; then
        die "$venv holds Python $version, but PYTHON is $wanted. Remove it or set FASTCACHE_VENV"
    fi
    if [[ -f "$stamp" && "$(<"$stamp")" == "$(fingerprint "$version")" ]]; then
        exit 0
    fi
fi

python="${PYTHON:-python3}"
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    version_of "$python" >/dev/null
    echo "setup.sh: creating $venv"
    options=()
    # A GPU machine often comes with a torch built for its driver: that one is used.
    if has_gpu && "$python" -c 'import torch' 2>/dev/null; then
        options+=(--system-site-packages)
    fi
    "$python" -m venv ${options[@]+"${options[@]}"} "$venv" ||
        die "'$python -m venv' failed; on Debian and Ubuntu it needs the package python3-venv"
fi
version="$(version_of "$venv/bin/python")"

cd "$root"
rm -f "$stamp"
echo "setup.sh: installing into $venv (Python $version)"
if ! has_gpu; then
    # Pinned and first, so that no later requirement picks its own: a CPU wheel that pip is
    # offered for this version ranks above the CUDA build, which takes several GB.
    pip_install "torch==2.13.0"
    pip_install 'triton; platform_system == "Linux"'
fi
pip_install -e ".[test]"
fingerprint "$version" >"$stamp"
